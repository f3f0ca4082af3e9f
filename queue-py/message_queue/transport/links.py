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

from message_queue.metrics import Metrics

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
LEFT = "has left the cluster"
RECONNECT_S = (0.02, 0.2)
MAX_TOLD = 256

M = TypeVar("M")


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame in both directions: who speaks. Positions name nodes, ids are bound to them."""

    position: int
    node_id: str
    addr: str  # where clients reach the speaker: peers name it in answers
    cluster: str  # fingerprint of the member list: two clusters never mix
    incarnation: int  # grows with every start of the sender


class Refused(Exception):
    """The other side is not the peer that this link is for; the text says why."""


class RefusedByPeer(Refused):
    """The other side says that of this node."""


class Links(Generic[M]):
    """All links of one node. Everything is called on the node's event loop.

    `on_batch(position, incarnation, messages)` gets each incoming frame. `on_up(hello)` and
    `on_down(position)` tell about the *outgoing* link: a reset is a hint that the peer died, not a
    proof.
    """

    def __init__(
        self,
        me: Hello,
        urls: Mapping[int, str],
        *,
        message_type: object,
        on_batch: Callable[[int, int, Sequence[M]], None],
        on_up: Callable[[Hello], None],
        on_down: Callable[[int], None],
        secret: bytes | None,
        client_ssl: ssl.SSLContext | None,
        metrics: Metrics,
        on_refused: Callable[[int, str], None] = lambda position, reason: None,
        has_left: Callable[[int], bool] = lambda position: False,
    ) -> None:
        """``has_left``: that position was a member, and never will be one again."""
        self._me = me
        self._urls = dict(urls)
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(
            list[message_type]  # type: ignore[valid-type]  # the tagged union, known at run time
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._on_batch = on_batch
        self._on_up = on_up
        self._on_down = on_down
        self._secret = secret
        self._client_ssl = client_ssl
        self._metrics = metrics
        self._on_refused = on_refused
        self._has_left = has_left
        self._outboxes = {position: _Outbox() for position in urls}
        self._known_ids: dict[int, str] = {me.position: me.node_id}
        self._told: set[str] = set()
        self._incoming: dict[int, web.WebSocketResponse] = {}
        self._connected: set[int] = set()
        self._session: aiohttp.ClientSession | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    # --- sending -------------------------------------------------------------------------------

    def send(self, position: int, message: M) -> bool:
        """Queue `message` for the peer; False: dropped (and counted), its link is down or full."""
        return self._put(position, self._encoder.encode(message))

    def send_all(self, messages: Sequence[tuple[int, M]]) -> None:
        """Like `send` for each. What goes to several peers is encoded once."""
        last: M | None = None
        encoded = b""
        for position, message in messages:
            if message is not last:
                encoded = self._encoder.encode(message)
                last = message
            self._put(position, encoded)

    def _put(self, position: int, encoded: bytes) -> bool:
        # What is queued for a peer that is away would arrive stale: the core sends anew later.
        if position in self._connected and self._outboxes[position].put(encoded):
            return True
        self._metrics.peer_messages_dropped += 1
        return False

    @property
    def connected(self) -> frozenset[int]:
        """Positions whose outgoing link is up."""
        return frozenset(self._connected)

    async def start(self) -> None:
        """Begin dialling every peer; returns at once."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._client_ssl or True)
        )
        for position in self._urls:
            self._start(position)

    def _start(self, position: int) -> None:
        self._tasks[position] = asyncio.create_task(
            self._dial(position), name=f"link to {position}"
        )

    def add(self, position: int, url: str) -> None:
        """A new node of the ring: dial it, and let it in."""
        if position not in self._urls and position != self._me.position:
            self._urls[position] = url
            self._outboxes[position] = _Outbox()
            if self._session is not None:
                self._start(position)

    def remove(self, position: int) -> None:
        """That node has left."""
        if self._urls.pop(position, None) is None:
            return
        task = self._tasks.pop(position, None)
        if task is not None:
            task.cancel()
        incoming = self._incoming.get(position)
        if incoming is not None:
            asyncio.ensure_future(incoming.close()).add_done_callback(_consume)

    async def stop(self) -> None:
        """Flush what is queued on links that are up (0.2 s at most), then close all of them."""
        flushing = [self._outboxes[position].drained() for position in self._connected]
        if flushing:
            await asyncio.wait([asyncio.ensure_future(f) for f in flushing], timeout=0.2)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        for ws in list(self._incoming.values()):
            await ws.close()

    async def _dial(self, position: int) -> None:
        refusal = ""
        backoff_s = RECONNECT_S[0]
        while True:
            try:
                await self._hold_link(position)
                backoff_s = RECONNECT_S[0]
            except Refused as e:
                if isinstance(e, RefusedByPeer):
                    self._on_refused(position, str(e))
                if str(e) != refusal:  # once per reason, not five times a second
                    refusal = str(e)
                    log.error("peer %s refused: %s", self._urls[position], e)
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as e:
                log.debug("link to %s: %s", self._urls[position], e)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(backoff_s * 2, RECONNECT_S[1])

    async def _hold_link(self, position: int) -> None:
        """Connect, greet, then write until the link breaks; returns if it had been up."""
        assert self._session is not None  # noqa: S101 - start() made it
        headers = {SECRET_HEADER: self._secret.decode("latin-1")} if self._secret else {}
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            ws = await self._session.ws_connect(
                self._urls[position] + LINK_PATH,
                headers=headers, heartbeat=KEEPALIVE_S, compress=0, max_msg_size=MAX_FRAME_BYTES,
            )  # fmt: skip
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await ws.send_bytes(self._encoder.encode(self._me))
                reply = await ws.receive()
            if reply.type is not aiohttp.WSMsgType.BINARY:
                raise RefusedByPeer(str(reply.extra or "closed before its greeting"))
            hello = msgspec.msgpack.decode(reply.data, type=Hello)
            self._check(hello, position)
            self._outboxes[position].clear()
            self._connected.add(position)
            self._on_up(hello)
            try:
                await self._pump(ws, self._outboxes[position])
            finally:
                self._connected.discard(position)
                self._on_down(position)
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
            self._check(hello, hello.position)
            await ws.send_bytes(self._encoder.encode(self._me))
        except (Refused, msgspec.MsgspecError, TypeError, TimeoutError) as e:
            self._tell_refusal(f"refused a link from {request.remote}: {e}")
            await ws.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=str(e).encode()[:120])
            return ws
        before = self._incoming.get(hello.position)
        self._incoming[hello.position] = ws
        if before is not None:  # the peer dialled again: its older connection is dead or dying
            asyncio.ensure_future(before.close()).add_done_callback(_consume)
        try:
            await self._read(ws, hello)
        finally:
            if self._incoming.get(hello.position) is ws:
                del self._incoming[hello.position]
        return ws

    def _tell_refusal(self, sentence: str) -> None:
        """Once each: who is refused dials again five times a second."""
        if sentence not in self._told:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told.add(sentence)
            log.warning("%s", sentence)

    async def _read(self, ws: web.WebSocketResponse, hello: Hello) -> None:
        position = hello.position
        async for frame in ws:
            if frame.type is not aiohttp.WSMsgType.BINARY or self._incoming.get(position) is not ws:
                return
            try:
                messages = self._decoder.decode(frame.data)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
                log.error("malformed frame from peer %d, link closed: %s", position, e)
                await ws.close(code=aiohttp.WSCloseCode.INVALID_TEXT, message=b"malformed frame")
                return
            self._on_batch(position, hello.incarnation, messages)

    def _check(self, hello: Hello, expected_position: int) -> None:
        if hello.cluster != self._me.cluster:
            raise Refused(f"it belongs to cluster {hello.cluster}, this node to {self._me.cluster}")
        if self._has_left(hello.position):
            raise Refused(f"node {hello.position} {LEFT}")
        if hello.position != expected_position or hello.position not in self._urls:
            raise Refused(f"it calls itself position {hello.position}")
        known = self._known_ids.setdefault(hello.position, hello.node_id)
        if known != hello.node_id:
            raise Refused(f"position {hello.position} is {known!r}, not {hello.node_id!r}")


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
