"""One long-lived connection per ordered pair of nodes: the link a->b carries what a sends to b.

It begins as an HTTP request (`GET /peer/link`, `Upgrade: mesi-link`) on the port that clients use;
from the 101 on it is frames both ways (see stream.py), first a greeting each, then batches of
messages from the dialling side.

Datagram semantics, as in the simulation: a message may be lost (link down, outbox full), never
corrupted; within one connection the order holds. Replies travel on the other direction's own link.

Group sending needs no timer: whatever one turn of the loop has to say to a peer leaves together
as one frame (a msgpack array of tagged structs); while the connection is full, more gathers.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from mesi_cache.metrics import Metrics
from mesi_cache.transport.stream import Dialled, FrameStream

log = logging.getLogger(__name__)

LINK_PATH = "/peer/link"
UPGRADE = "mesi-link"
SECRET_HEADER = "X-Cluster-Secret"  # noqa: S105 - the header's name
# The receiver's bound; a sender's frame holds one oversized message at most.
MAX_FRAME_BYTES = 64 << 20
MAX_HELLO_BYTES = 4096
FRAME_TARGET_BYTES = 1 << 20
OUTBOX_BYTES = 32 << 20
MAX_FRAME_MESSAGES = 0xFFFF
HELLO_TIMEOUT_S = 2.0
KEEPALIVE_S = 2.0  # a link that is silent for so long is asked, and dropped after as long again
RECONNECT_S = (0.02, 0.2)
_SWITCHING = (
    f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: {UPGRADE}\r\nConnection: Upgrade\r\n\r\n"
).encode()

M = TypeVar("M")


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame in both directions: who speaks. URLs name members, ids are bound to them."""

    url: str
    node_id: str
    cluster: str  # fingerprint of the member list: two clusters never mix
    incarnation: int  # grows with every start of the sender


class Refused(Exception):
    """The other side is not the peer that this link is for; the text says why."""


class OtherMembers(Refused):
    """It is the peer, but it was started with another list of members."""


class Links(Generic[M]):
    """All links of one node. Everything is called on the node's event loop.

    `on_batch(hello, messages)` gets each incoming frame and who sent it. `on_up(hello)` and
    `on_down(url)` tell about the *outgoing* link: a reset is a hint that the peer died, not a
    proof. `on_other_members(url)` tells at every attempt to link up with a node whose list of
    members differs from ours.
    """

    def __init__(
        self,
        me: Hello,
        dial: Mapping[str, str],
        *,
        message_type: object,
        on_batch: Callable[[Hello, Sequence[M]], None],
        on_up: Callable[[Hello], None],
        on_down: Callable[[str], None],
        on_other_members: Callable[[str], None],
        secret: bytes | None,
        client_ssl: ssl.SSLContext | None,
        metrics: Metrics,
    ) -> None:
        self._me = me
        self._dials = dict(dial)  # member -> where to reach it
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(
            list[message_type]  # type: ignore[valid-type]  # the tagged union, known at run time
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._on_batch = on_batch
        self._on_up = on_up
        self._on_down = on_down
        self._on_other_members = on_other_members
        self._secret = secret
        self._client_ssl = client_ssl
        self._metrics = metrics
        self._outboxes = {url: _Outbox(metrics) for url in dial}
        self._known_ids: dict[str, str] = {me.url: me.node_id}
        self._incoming: dict[str, FrameStream] = {}
        self._connected: set[str] = set()
        self._last_refusal = ""
        self._tasks: list[asyncio.Task[None]] = []

    # --- sending -------------------------------------------------------------------------------

    def send(self, url: str, message: M) -> None:
        """Queue `message` for the peer; dropped (and counted) while its link is down or full."""
        # What is queued for a peer that is away would arrive stale: the core sends anew later.
        if not self._outboxes[url].put(self._encoder.encode(message)):
            self._metrics.peer_messages_dropped += 1

    @property
    def connected(self) -> frozenset[str]:
        """URLs whose outgoing link is up."""
        return frozenset(self._connected)

    async def start(self) -> None:
        """Begin dialling every peer; returns at once."""
        self._tasks = [
            asyncio.create_task(self._dial(url), name=f"link to {url}") for url in self._dials
        ]

    async def stop(self) -> None:
        """Write what is queued on links that are up, then close all of them."""
        for url in self._connected:
            self._outboxes[url].flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in list(self._incoming.values()):
            stream.close()

    async def _dial(self, url: str) -> None:
        refusal = ""
        backoff_s = RECONNECT_S[0]
        while True:
            try:
                await self._hold_link(url)
                backoff_s = RECONNECT_S[0]
            except Refused as e:
                if str(e) != refusal:  # once per reason, not five times a second
                    refusal = str(e)
                    log.error("no link to %s: %s", url, e)
            except (OSError, TimeoutError, msgspec.MsgspecError) as e:
                log.debug("link to %s: %s", url, e)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(backoff_s * 2, RECONNECT_S[1])

    async def _hold_link(self, url: str) -> None:
        """Connect, greet, then hold the link until it breaks; returns if it had been up."""
        outbox = self._outboxes[url]
        greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            stream = await self._connect(url, partial(_first, greeting), outbox.flush)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                status = await stream.answered
                if status.split(" ")[1:2] != ["101"]:
                    raise Refused(f"it answers {status!r}")
                stream.send(self._encoder.encode(self._me))
                await asyncio.wait((greeting, stream.closed), return_when="FIRST_COMPLETED")
            if not greeting.done():
                raise ConnectionResetError("closed before its greeting")
            hello = msgspec.msgpack.decode(greeting.result(), type=Hello)
            self._check(hello, url)
            outbox.open(stream)
            self._connected.add(url)
            self._on_up(hello)
            try:
                await _while_heard(stream, stream.alive, KEEPALIVE_S)
            finally:
                outbox.shut()
                self._connected.discard(url)
                self._on_down(url)
        finally:
            stream.close()

    async def _connect(
        self, url: str, on_frame: Callable[[bytes], None], on_writable: Callable[[], None]
    ) -> Dialled:
        where = urlsplit(self._dials[url])
        if where.hostname is None:
            raise Refused(f"{self._dials[url]!r} is no address")
        port = where.port or (443 if where.scheme == "https" else 80)
        tls = (
            (self._client_ssl or ssl.create_default_context()) if where.scheme == "https" else None
        )
        _, stream = await asyncio.get_running_loop().create_connection(
            lambda: Dialled(on_frame, on_writable, lambda _: None, MAX_HELLO_BYTES),
            where.hostname, port, ssl=tls,
        )  # fmt: skip
        secret = f"{SECRET_HEADER}: {self._secret.decode('latin-1')}\r\n" if self._secret else ""
        stream.ask(
            f"GET {LINK_PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: Upgrade\r\n"
            f"Upgrade: {UPGRADE}\r\n{secret}\r\n".encode("latin-1")
        )
        return stream

    # --- receiving -----------------------------------------------------------------------------

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The handler of `GET /peer/link`."""
        given = request.headers.get(SECRET_HEADER, "").encode("latin-1", "replace")
        if self._secret is not None and not hmac.compare_digest(given, self._secret):
            raise web.HTTPForbidden(text="Cluster secret required")
        if request.headers.get("Upgrade") != UPGRADE:
            raise web.HTTPUpgradeRequired(text=f"Upgrade: {UPGRADE} required")
        transport, http = request.transport, request.protocol
        if transport is None:
            raise ConnectionResetError("the peer has hung up")
        link = _Incoming(self._decoder, self._on_batch)
        # Whoever held the connection before must hear of its end, too.
        stream = FrameStream(link.frame, lambda: None, http.connection_lost, MAX_HELLO_BYTES)
        transport.write(_SWITCHING)
        transport.set_protocol(stream)
        stream.connection_made(transport)
        try:
            await self._serve(link, stream, request.remote)
        finally:
            stream.close()
            await asyncio.wait((stream.closed,), timeout=HELLO_TIMEOUT_S)
        return web.Response()

    async def _serve(self, link: _Incoming[M], stream: FrameStream, remote: str | None) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await asyncio.wait((link.greeting, stream.closed), return_when="FIRST_COMPLETED")
            if not link.greeting.done():
                return  # it has hung up
            hello = msgspec.msgpack.decode(link.greeting.result(), type=Hello)
            stream.send(self._encoder.encode(self._me))  # also to see what is wrong
            self._check(hello, hello.url)
        except (Refused, msgspec.MsgspecError, TimeoutError, RecursionError) as e:
            self._log_refused(remote, e)
            return
        before = self._incoming.get(hello.url)
        self._incoming[hello.url] = stream
        if before is not None:  # the peer dialled again: its older connection is dead or dying
            before.close()
        stream.max_bytes, stream.echo = MAX_FRAME_BYTES, True
        link.open(hello, stream)
        try:
            await _while_heard(stream, lambda: None, 2 * KEEPALIVE_S)
        finally:
            link.shut()
            if self._incoming.get(hello.url) is stream:
                del self._incoming[hello.url]

    def _check(self, hello: Hello, expected: str) -> None:
        if hello.cluster != self._me.cluster:
            self._on_other_members(hello.url)
            raise OtherMembers(f"{hello.url} was started with other --peers than this node")
        if hello.url != expected or hello.url not in self._dials:
            raise Refused(f"it calls itself {hello.url}")
        known = self._known_ids.setdefault(hello.url, hello.node_id)
        if known != hello.node_id:
            raise Refused(f"{hello.url} is {known!r}, not {hello.node_id!r}")

    def _log_refused(self, remote: str | None, e: Exception) -> None:
        """Once per reason, not five times a second."""
        if str(e) != self._last_refusal:
            self._last_refusal = str(e)
            log.warning("refused a link from %s: %s", remote, e)


class _Incoming(Generic[M]):
    """What comes in on one connection: a greeting, then batches for as long as it is the link."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[list[M]],
        on_batch: Callable[[Hello, Sequence[M]], None],
    ) -> None:
        self.greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._decoder = decoder
        self._on_batch = on_batch
        self._open: tuple[Hello, FrameStream] | None = None

    def open(self, hello: Hello, stream: FrameStream) -> None:
        self._open = (hello, stream)

    def shut(self) -> None:
        self._open = None

    def frame(self, payload: bytes) -> None:
        if self._open is None:
            _first(self.greeting, payload)
            return
        hello, stream = self._open
        try:
            messages = self._decoder.decode(payload)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
            log.error("malformed frame from %s, link closed: %s", hello.url, e)
            self.shut()
            stream.close()
            return
        self._on_batch(hello, messages)


class _Outbox:
    """Encoded messages for one link; bounded in bytes. A frame is written at the end of the turn of
    the loop that made its messages."""

    __slots__ = ("_bytes", "_due", "_messages", "_metrics", "_stream")

    def __init__(self, metrics: Metrics) -> None:
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._due = False  # `flush` will be called
        self._stream: FrameStream | None = None  # None: the link is down
        self._metrics = metrics

    def open(self, stream: FrameStream) -> None:
        self._stream = stream

    def shut(self) -> None:
        self._stream = None
        self._messages.clear()
        self._bytes = 0

    def put(self, encoded: bytes) -> bool:
        if self._stream is None:
            return False
        if self._bytes + len(encoded) > OUTBOX_BYTES and self._messages:
            return False
        self._messages.append(encoded)
        self._bytes += len(encoded)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self.flush)
        return True

    def flush(self) -> None:
        """Write what waits, as far as the connection has room; it calls again when it has."""
        self._due = False
        stream = self._stream
        while stream is not None and stream.writable and self._messages:
            taken: list[bytes] = []
            size = 0
            while self._messages and size < FRAME_TARGET_BYTES and len(taken) < MAX_FRAME_MESSAGES:
                encoded = self._messages.popleft()
                taken.append(encoded)
                size += len(encoded)
            self._bytes -= size
            self._metrics.peer_frames_sent += 1
            self._metrics.peer_messages_sent += len(taken)
            stream.send(_array_header(len(taken)) + b"".join(taken))


def _array_header(n: int) -> bytes:
    return bytes((0x90 | n,)) if n < 16 else b"\xdc" + n.to_bytes(2, "big")


def _first(into: asyncio.Future[bytes], payload: bytes) -> None:
    if not into.done():
        into.set_result(payload)


async def _while_heard(stream: FrameStream, ask: Callable[[], None], every_s: float) -> None:
    """Until the connection is lost, or nothing came between two looks at it (after `ask`)."""
    while not stream.closed.done():
        stream.heard = False
        ask()
        await asyncio.wait((stream.closed,), timeout=every_s)
        if not stream.heard and not stream.closed.done():
            stream.abort()
            return
