"""A lean HTTP/1.1 JSON client on asyncio.Protocol: one connection, one request at a time.

For load and for checks: it costs a fraction of aiohttp's client, it never retries behind the
caller's back, and what went wrong is a value, so that a history can tell `fail` from `unknown`.
"""

from __future__ import annotations

import asyncio
import ssl as tls_module
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

import msgspec

Kind = Literal["refused", "reset", "timeout", "protocol"]
MAX_HEAD: Final = 65_536


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. Header names are lower case; a repeated header's values are joined by ', '."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body; raises msgspec.DecodeError if it is not JSON."""
        return msgspec.json.decode(self.body)

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode(errors="replace")

    @property
    def definite(self) -> bool:
        """False if the answer itself says that the outcome is unknown (`"definite": false`)."""
        if self.status < 500:
            return True
        try:
            parsed = self.json
        except msgspec.DecodeError:
            return False
        return isinstance(parsed, dict) and parsed.get("definite", True) is not False


@dataclass(frozen=True, slots=True)
class NoReply:
    """No answer. `definite`: the request certainly never left (nothing can have happened)."""

    kind: Kind
    definite: bool
    why: str = ""


Outcome = Reply | NoReply


class _Broken(Exception):
    def __init__(self, kind: Kind, why: str) -> None:
        super().__init__(why)
        self.kind: Kind = kind


class _Connection(asyncio.Protocol):
    """Parses one response at a time: Content-Length, chunked, or until the end of the stream."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self._buffer = bytearray()
        self._waiter: asyncio.Future[Reply] | None = None
        self._bodiless = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes, *, bodiless: bool) -> asyncio.Future[Reply]:
        assert self.transport is not None
        self._buffer.clear()
        self._bodiless = bodiless
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._waiter

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._try(ended=False)

    def eof_received(self) -> None:
        self._try(ended=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._try(ended=True)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(_Broken("reset", str(exc or "closed without an answer")))

    def close(self) -> None:
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def _try(self, *, ended: bool) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            reply = _parse(self._buffer, bodiless=self._bodiless, ended=ended)
        except ValueError as error:
            self.close()
            waiter.set_exception(_Broken("protocol", str(error)))
            return
        if reply is not None:
            if reply.headers.get("connection", "").lower() == "close":
                self.close()
            waiter.set_result(reply)


def _parse(buffer: bytearray, *, bodiless: bool, ended: bool) -> Reply | None:
    """The response in `buffer`, or None if it is not whole yet. ValueError if it is none."""
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        if len(buffer) > MAX_HEAD:
            raise ValueError("headers too large")
        return None
    lines = bytes(buffer[:head_end]).decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"not HTTP: {lines[0]!r}")
    status = int(rest[:3])
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    body = bytes(buffer[head_end + 4 :])
    if bodiless or status in (204, 304):
        return Reply(status, headers, b"")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        whole = _dechunk(body)
        return None if whole is None else Reply(status, headers, whole)
    if "content-length" in headers:
        length = int(headers["content-length"])
        return Reply(status, headers, body[:length]) if len(body) >= length else None
    return Reply(status, headers, body) if ended else None


def _dechunk(body: bytes) -> bytes | None:
    pieces: list[bytes] = []
    at = 0
    while True:
        line_end = body.find(b"\r\n", at)
        if line_end < 0:
            return None
        size = int(body[at:line_end].split(b";")[0], 16)
        start = line_end + 2
        if len(body) < start + size + 2:
            return None
        if size == 0:
            return b"".join(pieces)
        pieces.append(body[start : start + size])
        at = start + size + 2


class HttpClient:
    """One keep-alive connection to one node; many in parallel need many clients.

    `headers` go with every request. It reconnects by itself before a request, never within one.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: tls_module.SSLContext | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        common = {"Host": f"{host}:{port}", **(headers or {})}
        self._common = "".join(f"{name}: {value}\r\n" for name, value in common.items())
        self._encode = msgspec.json.Encoder().encode

    @classmethod
    def of_url(
        cls,
        url: str,
        *,
        tls: tls_module.SSLContext | None = None,
        headers: dict[str, str] | None = None,
    ) -> HttpClient:
        """A client for the host and port of `url`; https without `tls` does not verify."""
        parts = urlsplit(url)
        if parts.scheme == "https" and tls is None:
            tls = unverified()
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.hostname or "127.0.0.1", port, tls=tls, headers=headers)

    @staticmethod
    def path_of(url: str) -> str:
        """The path and query of a URL."""
        parts = urlsplit(url)
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    async def get(self, path: str, *, timeout_s: float | None = None, **query: object) -> Outcome:
        """GET; keyword arguments become the query (quoted)."""
        if query:
            path += "?" + "&".join(
                f"{name}={quote(str(value), safe='')}" for name, value in query.items()
            )
        return await self.request("GET", path, timeout_s=timeout_s)

    async def post(self, path: str, body: Any, *, timeout_s: float | None = None) -> Outcome:
        """POST a value as JSON."""
        return await self.request("POST", path, body=self._encode(body), timeout_s=timeout_s)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """One request; never raises for what the other side or the network does.

        `path` goes out as it is (quote it yourself). Content-Type is application/json unless
        `headers` says otherwise.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        extra = {} if headers is None else dict(headers)
        if body is not None:
            extra.setdefault("Content-Type", "application/json")
            extra.setdefault("Content-Length", str(len(body)))
        lines = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
        head = f"{method} {path} HTTP/1.1\r\n{self._common}{lines}\r\n"
        return await self._exchange(head.encode() + (body or b""), method == "HEAD", limit_s)

    async def raw(self, data: bytes, timeout_s: float = 5.0) -> Outcome:
        """Send exactly these bytes on a new connection and read one response."""
        self.close()
        outcome = await self._exchange(data, False, timeout_s)
        self.close()
        return outcome

    async def _exchange(self, request: bytes, bodiless: bool, limit_s: float) -> Outcome:
        sent = False
        try:
            async with asyncio.timeout(limit_s):
                connection = await self._connected()
                sent = True
                return await connection.ask(request, bodiless=bodiless)
        except TimeoutError:
            self.close()
            return NoReply("timeout", not sent, f"no answer in {limit_s} s")
        except _Broken as broken:
            self.close()
            return NoReply(broken.kind, False, str(broken))
        except OSError as error:
            self.close()
            kind: Kind = "refused" if isinstance(error, ConnectionRefusedError) else "reset"
            return NoReply(kind, not sent, str(error))
        except asyncio.CancelledError:
            self.close()
            raise

    async def _connected(self) -> _Connection:
        if self._connection is None or self._connection.closed:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(
                _Connection, self._host, self._port, ssl=self._tls
            )
        return self._connection

    def close(self) -> None:
        """Drop the connection; the next request makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def unverified() -> tls_module.SSLContext:
    """A context that checks nothing, as `curl -k` (tests against self-signed nodes only)."""
    context = tls_module.SSLContext(tls_module.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = tls_module.CERT_NONE
    return context
