"""A lean HTTP/1.1 JSON client on asyncio.Protocol: one connection, one request at a time.

For load and for checks: it costs a fraction of aiohttp's client, it never retries behind the
caller's back, and what went wrong is a value, so that a history can tell `fail` from `unknown`.
"""

from __future__ import annotations

import asyncio
import ssl as tls_module
from dataclasses import dataclass
from typing import Any, Final, Literal, cast
from urllib.parse import quote, urlsplit

import msgspec

Kind = Literal["refused", "reset", "timeout", "protocol"]
MAX_HEAD: Final = 65_536


class Reply:
    """An answer: `status`, `body`, and headers, which are parsed only when asked for."""

    __slots__ = ("_head", "_headers", "body", "status")

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        self.status = status
        self.body = body
        self._head = head
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """By lower-case name; a repeated header's values are joined by ', '."""
        if self._headers is None:
            headers: dict[str, str] = {}
            for line in self._head.decode("latin-1").split("\r\n")[1:]:
                name, _, value = line.partition(":")
                name, value = name.strip().lower(), value.strip()
                headers[name] = f"{headers[name]}, {value}" if name in headers else value
            self._headers = headers
        return self._headers

    def __repr__(self) -> str:
        return f"Reply({self.status}, {self.headers}, {self.body[:2000]!r})"

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
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._waiter: asyncio.Future[Reply] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._bodiless = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def ask(self, request: bytes, *, bodiless: bool, limit_s: float) -> asyncio.Future[Reply]:
        """Send; the future holds the reply, or _Broken (also after `limit_s`)."""
        assert self.transport is not None
        self._buffer.clear()
        self._bodiless = bodiless
        self._waiter = self._loop.create_future()
        # A plain timer: asyncio.timeout costs as much as the rest of the request.
        self._timer = self._loop.call_later(limit_s, self._expired, limit_s)
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
        self._break(_Broken("reset", str(exc or "closed without an answer")))

    def close(self) -> None:
        self.closed = True
        self._stop_timer()
        if self.transport is not None:
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self, limit_s: float) -> None:
        self._break(_Broken("timeout", f"no answer in {limit_s} s"))

    def _break(self, broken: _Broken) -> None:
        self._stop_timer()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(broken)

    def _try(self, *, ended: bool) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            parsed = _parse(self._buffer, bodiless=self._bodiless, ended=ended)
        except ValueError as error:
            self.close()
            waiter.set_exception(_Broken("protocol", str(error)))
            return
        if parsed is not None:
            reply, keep = parsed
            self._stop_timer()
            if not keep:
                self.close()
            waiter.set_result(reply)


def _parse(buffer: bytearray, *, bodiless: bool, ended: bool) -> tuple[Reply, bool] | None:
    """The response in `buffer` and whether the connection lives on; None if it is not whole yet.

    ValueError if it is none. Looks for the few headers that matter instead of parsing them all.
    """
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        if len(buffer) > MAX_HEAD:
            raise ValueError("headers too large")
        return None
    head = bytes(buffer[:head_end])
    if not head.startswith(b"HTTP/1."):
        raise ValueError(f"not HTTP: {head[:80]!r}")
    status = int(head[9:12])
    lower = head.lower()
    keep = b"\r\nconnection: close" not in lower and head[7:8] == b"1"
    start = head_end + 4
    if bodiless or status in (204, 304):
        return Reply(status, head, b""), keep
    found = lower.find(b"\r\ncontent-length:")
    if found >= 0:
        line_end = lower.find(b"\r\n", found + 2)
        length = int(lower[found + 17 : line_end if line_end >= 0 else None])
        if len(buffer) < start + length:
            return None
        return Reply(status, head, bytes(buffer[start : start + length])), keep
    if b"\r\ntransfer-encoding: chunked" in lower:
        whole = _dechunk(bytes(buffer[start:]))
        return None if whole is None else (Reply(status, head, whole), keep)
    return (Reply(status, head, bytes(buffer[start:])), False) if ended else None


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
        self._host_line = f"Host: {host}:{port}\r\n"
        self._common = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
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
        lines = self._host_line
        if headers:
            if "Host" in headers:
                lines = ""
            lines += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if body is not None:
            if headers is None or "Content-Type" not in headers:
                lines += "Content-Type: application/json\r\n"
            lines += f"Content-Length: {len(body)}\r\n"
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
            connection = self._connection
            if connection is None or connection.closed:
                async with asyncio.timeout(limit_s):
                    connection = await self._connect()
            sent = True
            return await connection.ask(request, bodiless=bodiless, limit_s=limit_s)
        except TimeoutError:
            self.close()
            return NoReply("timeout", True, f"no connection in {limit_s} s")
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

    async def _connect(self) -> _Connection:
        _, self._connection = await asyncio.get_running_loop().create_connection(
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
