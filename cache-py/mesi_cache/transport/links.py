"""One long-lived WebSocket per ordered pair of nodes: the link a->b carries what a sends to b.

Datagram semantics, as in the simulation: a message may be lost (link down, outbox full), never
corrupted; within one connection the order holds. Replies travel on the other direction's own link.

Group sending needs no timer: whatever gathered in the outbox while the last frame was being written
leaves together as the next frame (a msgpack array of tagged structs).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from mesi_cache.metrics import Metrics

log = logging.getLogger(__name__)

LINK_PATH = "/peer/link"
SECRET_HEADER = "X-Cluster-Secret"  # noqa: S105 - the header's name
MAX_FRAME_BYTES = (
    64 << 20
)  # the receiver's bound; a sender's frame holds one oversized message at most
FRAME_TARGET_BYTES = 1 << 20
OUTBOX_BYTES = 32 << 20
MAX_FRAME_MESSAGES = 0xFFFF
HELLO_TIMEOUT_S = 2.0
KEEPALIVE_S = 2.0
RECONNECT_S = (0.02, 0.2)

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
        self._outboxes = {url: _Outbox() for url in dial}
        self._known_ids: dict[str, str] = {me.url: me.node_id}
        self._incoming: dict[str, web.WebSocketResponse] = {}
        self._connected: set[str] = set()
        self._last_refusal = ""
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # --- sending -------------------------------------------------------------------------------

    def send(self, url: str, message: M) -> None:
        """Queue `message` for the peer; dropped (and counted) while its link is down or full."""
        self._put(url, self._encoder.encode(message))

    def broadcast(self, urls: Sequence[str], message: M) -> None:
        """Like `send` to each, encoding once."""
        encoded = self._encoder.encode(message)
        for url in urls:
            self._put(url, encoded)

    def _put(self, url: str, encoded: bytes) -> None:
        # What is queued for a peer that is away would arrive stale: the core sends anew later.
        if url not in self._connected or not self._outboxes[url].put(encoded):
            self._metrics.peer_messages_dropped += 1

    @property
    def connected(self) -> frozenset[str]:
        """URLs whose outgoing link is up."""
        return frozenset(self._connected)

    async def start(self) -> None:
        """Begin dialling every peer; returns at once."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._client_ssl or True)
        )
        self._tasks = [
            asyncio.create_task(self._dial(url), name=f"link to {url}") for url in self._dials
        ]

    async def stop(self) -> None:
        """Flush what is queued on links that are up (0.2 s at most), then close all of them."""
        flushing = [self._outboxes[url].drained() for url in self._connected]
        if flushing:
            await asyncio.wait([asyncio.ensure_future(f) for f in flushing], timeout=0.2)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        for ws in list(self._incoming.values()):
            await ws.close()

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
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as e:
                log.debug("link to %s: %s", url, e)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(backoff_s * 2, RECONNECT_S[1])

    async def _hold_link(self, url: str) -> None:
        """Connect, greet, then write until the link breaks; returns if it had been up."""
        assert self._session is not None  # noqa: S101 - start() made it
        headers = {SECRET_HEADER: self._secret.decode("latin-1")} if self._secret else {}
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            ws = await self._session.ws_connect(
                self._dials[url] + LINK_PATH,
                headers=headers, heartbeat=KEEPALIVE_S, compress=0, max_msg_size=MAX_FRAME_BYTES,
            )  # fmt: skip
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await ws.send_bytes(self._encoder.encode(self._me))
                reply = await ws.receive()
            if reply.type is not aiohttp.WSMsgType.BINARY:
                raise Refused(str(reply.extra or "closed before its greeting"))
            hello = msgspec.msgpack.decode(reply.data, type=Hello)
            self._check(hello, url)
            self._outboxes[url].clear()
            self._connected.add(url)
            self._on_up(hello)
            try:
                await self._pump(ws, self._outboxes[url])
            finally:
                self._connected.discard(url)
                self._on_down(url)
        finally:
            await ws.close()

    async def _pump(self, ws: aiohttp.ClientWebSocketResponse, outbox: _Outbox) -> None:
        writer = asyncio.create_task(self._write(ws, outbox))
        try:
            # Nothing but a close (or a missed pong) ever comes back on this direction.
            reader = asyncio.create_task(ws.receive())
            await asyncio.wait((writer, reader), return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.cancel()
            reader.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)

    async def _write(self, ws: aiohttp.ClientWebSocketResponse, outbox: _Outbox) -> None:
        while True:
            messages = await outbox.take()
            await ws.send_bytes(_array_header(len(messages)) + b"".join(messages))
            self._metrics.peer_frames_sent += 1
            self._metrics.peer_messages_sent += len(messages)

    # --- receiving -----------------------------------------------------------------------------

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The handler of `GET /peer/link`."""
        given = request.headers.get(SECRET_HEADER, "").encode("latin-1", "replace")
        if self._secret is not None and not hmac.compare_digest(given, self._secret):
            raise web.HTTPForbidden(text="Cluster secret required")
        ws = web.WebSocketResponse(
            max_msg_size=MAX_FRAME_BYTES, compress=False, heartbeat=KEEPALIVE_S
        )
        await ws.prepare(request)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = msgspec.msgpack.decode(await ws.receive_bytes(), type=Hello)
            await ws.send_bytes(self._encoder.encode(self._me))  # also to see what is wrong
            self._check(hello, hello.url)
        except (Refused, msgspec.MsgspecError, TypeError, TimeoutError) as e:
            self._log_refused(request.remote, e)
            await ws.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=str(e).encode()[:120])
            return ws
        before = self._incoming.get(hello.url)
        self._incoming[hello.url] = ws
        if before is not None:  # the peer dialled again: its older connection is dead or dying
            asyncio.ensure_future(before.close()).add_done_callback(_consume)
        try:
            await self._read(ws, hello)
        finally:
            if self._incoming.get(hello.url) is ws:
                del self._incoming[hello.url]
        return ws

    async def _read(self, ws: web.WebSocketResponse, hello: Hello) -> None:
        async for frame in ws:
            if (
                frame.type is not aiohttp.WSMsgType.BINARY
                or self._incoming.get(hello.url) is not ws
            ):
                return
            try:
                messages = self._decoder.decode(frame.data)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
                log.error("malformed frame from %s, link closed: %s", hello.url, e)
                await ws.close(code=aiohttp.WSCloseCode.INVALID_TEXT, message=b"malformed frame")
                return
            self._on_batch(hello, messages)

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


class _Outbox:
    """Encoded messages waiting for one link; bounded in bytes."""

    __slots__ = ("_bytes", "_empty", "_messages", "_wake")

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def put(self, encoded: bytes) -> bool:
        if self._bytes + len(encoded) > OUTBOX_BYTES and self._messages:
            return False
        self._messages.append(encoded)
        self._bytes += len(encoded)
        self._empty.clear()
        self._wake.set()
        return True

    async def take(self) -> list[bytes]:
        """Wait for messages; all that are there, up to about FRAME_TARGET_BYTES."""
        while not self._messages:
            self._empty.set()
            self._wake.clear()
            await self._wake.wait()
        taken: list[bytes] = []
        size = 0
        while self._messages and size < FRAME_TARGET_BYTES and len(taken) < MAX_FRAME_MESSAGES:
            encoded = self._messages.popleft()
            taken.append(encoded)
            size += len(encoded)
        self._bytes -= size
        return taken

    async def drained(self) -> None:
        await self._empty.wait()

    def clear(self) -> None:
        self._messages.clear()
        self._bytes = 0


def _array_header(n: int) -> bytes:
    return bytes((0x90 | n,)) if n < 16 else b"\xdc" + n.to_bytes(2, "big")


def _consume(future: asyncio.Future[bool]) -> None:
    if not future.cancelled():
        future.exception()
