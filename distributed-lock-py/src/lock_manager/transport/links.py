"""One long-lived WebSocket per ordered pair of nodes: the link a->b carries what a sends to b.

Datagram semantics, as in the simulation: a message may be lost (link down, outbox full), never
corrupted; within one connection the order holds. Replies travel on the other direction's own link.

Group sending needs no timer: whatever one turn of the loop has to say to a peer leaves together
as one frame (a MessagePack array of messages), at the end of that turn.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import partial

import aiohttp
import msgspec
from aiohttp import web

from lock_manager.core.peer_book import Hello
from lock_manager.core.raft import Message
from lock_manager.logs import Sparing
from lock_manager.metrics import Metrics

log = logging.getLogger(__name__)

LINK_PATH = "/raft/link"
SECRET_HEADER = "X-Cluster-Secret"  # noqa: S105 - the header's name
MAX_FRAME_BYTES = 64 << 20  # the receiver's bound
FRAME_TARGET_BYTES = 1 << 20  # a sender's frame is closed beyond this
MAX_FRAME_MESSAGES = 0xFFFF
OUTBOX_BYTES = 32 << 20
HELLO_BYTES = 4096
HELLO_TIMEOUT_S = 2.0
KEEPALIVE_S = 2.0
FAREWELL_S = 5.0
RECONNECT_S = (0.02, 0.2)


class Refused(Exception):
    """The other side is not the peer that this link is for; the text says why."""


class LinkCounters:
    """What the metrics show of the links."""

    __slots__ = ("dropped", "frames_sent", "messages_received", "messages_sent", "refused")

    def __init__(self) -> None:
        self.frames_sent = 0
        self.messages_sent = 0
        self.messages_received = 0
        self.dropped = 0  # the link was down or its outbox full
        self.refused = 0  # greetings and messages that were not believed


class Links:
    """All links of one node; everything is called on its event loop.

    `admit(hello)` says why a peer is refused, or None. `on_messages(position, messages)` gets each
    incoming frame; every message in it is from that position and for this node.
    `on_broken(position)` is called when an established link with the peer broke, in either
    direction: a hint that it died, not a proof.
    """

    def __init__(
        self,
        me: Hello,
        *,
        admit: Callable[[Hello], str | None],
        on_messages: Callable[[int, list[Message]], None],
        on_broken: Callable[[int], None],
        secret: bytes | None = None,
        client_ssl: ssl.SSLContext | None = None,
    ) -> None:
        self.counters = LinkCounters()
        self._me = me
        self._admit = admit
        self._on_messages = on_messages
        self._on_broken = on_broken
        self._secret = secret
        self._client_ssl = client_ssl
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[Message])
        self._session: aiohttp.ClientSession | None = None
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, web.WebSocketResponse] = {}
        self._closing: set[asyncio.Task[bool]] = set()
        self._stopped = False
        self._sparing = Sparing()

    # ------------------------------------------------------------------------------------- sending

    def send(self, messages: Iterable[Message]) -> None:
        """Queues each message for the peer that it names; dropped (and counted) while the link is
        down or full: the core sends anew what still matters."""
        touched: list[_Outgoing] = []
        for message in messages:
            link = self._outgoing.get(message.to)
            if link is None or not link.put(self._encoder.encode(message)):
                self.counters.dropped += 1
            elif link not in touched:
                touched.append(link)
        for link in touched:
            link.write()

    def connect(self, addresses: Mapping[int, str]) -> None:
        """Dials exactly these peers (`host:port` by position) from now on. Must run on the loop.
        Unchanged links stay; one to a peer that is not named any more goes a little later, so that
        it can still be told that it was removed."""
        if self._stopped:
            return
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._client_ssl or True)
            )
        scheme = "wss" if self._client_ssl is not None else "ws"
        urls = {position: f"{scheme}://{addresses[position]}{LINK_PATH}" for position in addresses}
        loop = asyncio.get_running_loop()
        for position, link in list(self._outgoing.items()):
            if position not in urls:
                link.farewell = link.farewell or loop.call_later(FAREWELL_S, self._drop, position)
            elif urls[position] != link.url:
                self._drop(position)
            elif link.farewell is not None:
                link.farewell.cancel()
                link.farewell = None
        for position, url in urls.items():
            if position not in self._outgoing and position != self._me.position:
                link = _Outgoing(url, self.counters)
                link.task = asyncio.create_task(
                    self._dial(position, link), name=f"link to {position}"
                )
                self._outgoing[position] = link

    def _drop(self, position: int) -> None:
        link = self._outgoing.pop(position)
        if link.farewell is not None:
            link.farewell.cancel()
        link.task.cancel()

    @property
    def connected(self) -> frozenset[int]:
        """Positions whose outgoing link is up."""
        return frozenset(position for position, link in self._outgoing.items() if link.up)

    def measure(self, metrics: Metrics) -> None:
        """Bring the metrics of the links up to date."""
        metrics.peers_connected = len(self.connected)
        metrics.peer_frames_sent = self.counters.frames_sent
        metrics.peer_messages_sent = self.counters.messages_sent
        metrics.peer_messages_dropped = self.counters.dropped

    async def stop(self) -> None:
        """Sends what is queued on links that are up (0.2 s at most), then closes all of them."""
        self._stopped = True
        links = list(self._outgoing.values())
        for link in links:
            if link.farewell is not None:
                link.farewell.cancel()
        flushing = [asyncio.create_task(link.drained()) for link in links if link.up]
        if flushing:
            await asyncio.wait(flushing, timeout=0.2)
        tasks = [*flushing, *(link.task for link in links)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for socket in list(self._incoming.values()):
            await socket.close()
        if self._session is not None:
            await self._session.close()

    async def _dial(self, position: int, link: _Outgoing) -> None:
        """Keeps one outgoing link up, for ever."""
        refusal = ""
        backoff_s = RECONNECT_S[0]
        while True:
            try:
                await self._hold(position, link)
                refusal, backoff_s = "", RECONNECT_S[0]
            except Refused as error:
                if str(error) != refusal:  # once per reason, not five times a second
                    refusal = str(error)
                    log.error("no link to peer %d at %s: %s", position, link.url, error)
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
                log.debug("no link to %s: %s", link.url, error)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(backoff_s * 2, RECONNECT_S[1])

    async def _hold(self, position: int, link: _Outgoing) -> None:
        """Connects, greets, then writes until the link breaks; returns if it had been up."""
        if self._session is None:
            raise RuntimeError("connect() makes the session before any link")
        headers = {SECRET_HEADER: self._secret.decode("latin-1")} if self._secret else {}
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            socket = await self._session.ws_connect(
                link.url,
                headers=headers,
                heartbeat=KEEPALIVE_S,
                compress=0,
                max_msg_size=HELLO_BYTES,
            )
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await socket.send_bytes(self._encoder.encode(self._me))
                reply = await socket.receive()
            if reply.type is not aiohttp.WSMsgType.BINARY:
                raise Refused(str(reply.extra or "closed before its greeting"))
            hello = msgspec.msgpack.decode(reply.data, type=Hello)
            if hello.position != position:
                raise Refused(f"it calls itself position {hello.position}")
            self._judge(hello)
            link.raise_up(socket)
            log.info("link to %s (peer %d) is up", hello.node_id, position)
            try:
                # Nothing but a close (or a missed pong) ever comes back on this direction.
                await socket.receive()
            finally:
                link.lower()
                if not self._stopped:
                    log.info("link to %s (peer %d) is down", hello.node_id, position)
                    self._on_broken(position)
        finally:
            await socket.close()

    # ----------------------------------------------------------------------------------- receiving

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The handler of `GET /raft/link` on the raft address."""
        given = request.headers.get(SECRET_HEADER, "").encode("latin-1", "replace")
        if self._secret is not None and not hmac.compare_digest(given, self._secret):
            self.counters.refused += 1
            raise web.HTTPForbidden(
                text='{"error":"Cluster secret required"}', content_type="application/json"
            )
        socket = web.WebSocketResponse(
            max_msg_size=MAX_FRAME_BYTES, compress=False, heartbeat=KEEPALIVE_S
        )
        await socket.prepare(request)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                raw = await socket.receive_bytes()
                if len(raw) > HELLO_BYTES:
                    raise Refused("its greeting is too long")
                hello = msgspec.msgpack.decode(raw, type=Hello)
                self._judge(hello)
                await socket.send_bytes(self._encoder.encode(self._me))
        except (Refused, msgspec.MsgspecError, TypeError, TimeoutError, RecursionError) as error:
            self.counters.refused += 1
            self._complain(f"refused a link from {request.remote}: {error}")
            await socket.close(
                code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=str(error).encode()[:120]
            )
            return socket
        self._replace_incoming(hello.position, socket)
        try:
            await self._read(socket, hello.position)
        finally:
            if self._incoming.get(hello.position) is socket:
                del self._incoming[hello.position]
                if not self._stopped:
                    self._on_broken(hello.position)
        return socket

    def _replace_incoming(self, position: int, socket: web.WebSocketResponse) -> None:
        """The peer dialled (again): an older connection of its is dead or dying."""
        before = self._incoming.get(position)
        self._incoming[position] = socket
        if before is not None:
            task = asyncio.create_task(before.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _read(self, socket: web.WebSocketResponse, position: int) -> None:
        async for frame in socket:
            if frame.type is not aiohttp.WSMsgType.BINARY:
                return
            if self._incoming.get(position) is not socket:
                return
            try:
                messages = self._decoder.decode(frame.data)
                self._check_addresses(messages, position)
            except (msgspec.MsgspecError, RecursionError, Refused) as error:
                self.counters.refused += 1
                self._complain(f"malformed frame from peer {position}, link closed: {error}")
                await socket.close(
                    code=aiohttp.WSCloseCode.INVALID_TEXT, message=b"malformed frame"
                )
                return
            self.counters.messages_received += len(messages)
            self._on_messages(position, messages)

    def _check_addresses(self, messages: Iterable[Message], position: int) -> None:
        """A peer speaks only for itself, and only to this node."""
        me = self._me.position
        for message in messages:
            if message.sender != position or message.to != me:
                raise Refused(f"a message from {message.sender} to {message.to}")

    def _complain(self, what: str) -> None:
        text = self._sparing.again(what, asyncio.get_running_loop().time())
        if text is not None:
            log.warning("%s", text)

    def _judge(self, hello: Hello) -> None:
        why = self._admit(hello)
        if why is not None:
            raise Refused(why)


class _Outgoing:
    """One outgoing link: encoded messages that wait for it, bounded in bytes.

    A frame is written in the turn of the loop that made its messages, without a task that would
    have to be woken first: `write` takes the first step of `send_bytes` itself, as an eager task
    would (asyncio has those from 3.12 on). Nearly always it is also the last one.
    """

    def __init__(self, url: str, counters: LinkCounters) -> None:
        self.url = url
        self.socket: aiohttp.ClientWebSocketResponse | None = None  # None: the link is down
        self.task: asyncio.Task[None]
        self.farewell: asyncio.TimerHandle | None = None  # set: the peer is no member any more
        self._counters = counters
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        # The last frame is in the transport's buffer, which is too full for another one.
        self._sending: Coroutine[asyncio.Future[None], None, None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def up(self) -> bool:
        return self.socket is not None

    def raise_up(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    def lower(self) -> None:
        """The link is down. What is queued would arrive stale."""
        self.socket = None
        self._messages.clear()
        self._bytes = 0
        if self._sending is not None:
            self._sending.close()
            self._sending = None

    def put(self, encoded: bytes) -> bool:
        if not self.up or (self._bytes + len(encoded) > OUTBOX_BYTES and self._messages):
            return False
        self._messages.append(encoded)
        self._bytes += len(encoded)
        return True

    def write(self) -> None:
        """Writes what waits; what does not fit into the transport's buffer leaves later."""
        if self.socket is None or self._sending is not None:
            return
        while self._messages:
            sending = self.socket.send_bytes(self._take_frame())
            try:
                room = sending.send(None)
            except StopIteration:
                continue
            except (aiohttp.ClientError, OSError):
                return  # the task that holds the link learns of it as well
            self._sending = sending
            self._empty.clear()
            room.add_done_callback(partial(self._go_on, sending))
            return

    def _go_on(
        self, sending: Coroutine[asyncio.Future[None], None, None], _: asyncio.Future[None]
    ) -> None:
        """There is room again; or the connection broke, or the link was lowered meanwhile."""
        if self._sending is not sending:
            return
        with suppress(StopIteration, aiohttp.ClientError, OSError):
            sending.send(None)
        self._sending = None
        self.write()
        if self._sending is None:
            self._empty.set()

    def _take_frame(self) -> bytes:
        """All that waits, up to about FRAME_TARGET_BYTES."""
        taken: list[bytes] = []
        size = 0
        while self._messages and size < FRAME_TARGET_BYTES and len(taken) < MAX_FRAME_MESSAGES:
            encoded = self._messages.popleft()
            taken.append(encoded)
            size += len(encoded)
        self._bytes -= size
        self._counters.frames_sent += 1
        self._counters.messages_sent += len(taken)
        return _array_header(len(taken)) + b"".join(taken)

    async def drained(self) -> None:
        """All that was queued is in the transport's hands."""
        await self._empty.wait()


def _array_header(count: int) -> bytes:
    """MessagePack's header of an array of so many elements."""
    return bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
