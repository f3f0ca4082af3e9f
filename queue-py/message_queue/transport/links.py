"""One long-lived WebSocket per ordered pair of nodes: the link a->b carries what a sends to b.

Datagram semantics, as in the simulation: a message may be lost (link down, outbox full), never
corrupted; within one connection the order holds. Replies travel on the other direction's own link.

Group sending needs no timer: whatever one step of the core has to say to a peer leaves as one frame
(a msgpack array of tagged structs) in the same turn of the loop, without a task that would have to
be woken first; frames of clients' operations, which come one by one, leave at the end of the turn.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from message_queue.metrics import Metrics
from message_queue.transport.outgoing import Outgoing
from message_queue.turn import Turn
from message_queue.websocket import BINARY, WebSocket

log = logging.getLogger(__name__)

LINK_PATH = "/peer/link"
SECRET_HEADER = "X-Cluster-Secret"  # noqa: S105 - the header's name
MAX_FRAME_BYTES = (
    64 << 20
)  # the receiver's bound; a sender's frame holds one oversized message at most
HELLO_TIMEOUT_S = 2.0
KEEPALIVE_S = 2.0
HAS_LEFT_CODE = 4001
"""Close code (RFC 6455 leaves 4000 to 4999 to applications): the dialler is a member no more."""
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


class HasLeft(Refused):
    """The other side was a member, and never will be one again."""


class Dismissed(Refused):
    """The other side says that of this node."""

    def __init__(self) -> None:
        super().__init__("this node has left the cluster")


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
        on_left: Callable[[int], None] = lambda position: None,
        has_left: Callable[[int], bool] = lambda position: False,
        may_be_new: Callable[[int], bool] = lambda position: False,
        turn: Turn | None = None,
    ) -> None:
        """``has_left``: that position was a member, and never will be one again. ``on_left(peer)``:
        a peer says so of this node. ``may_be_new``: a change of which this node has not heard may
        have given that position, so who has it is listened to (it may bring the news). ``turn``:
        at its end `send` writes."""
        self._turn = turn if turn is not None else Turn()
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
        self._on_left = on_left
        self._has_left = has_left
        self._may_be_new = may_be_new
        self._outgoing = {position: Outgoing(metrics) for position in urls}
        self._known_ids: dict[int, str] = {me.position: me.node_id}
        self._told: set[str] = set()
        self._incoming: dict[int, WebSocket] = {}
        self._held: set[Outgoing] | None = None
        """Were told something while `together` runs."""
        self._talking: list[Outgoing] = []
        """Were told something one by one in this turn of the loop."""
        self._session: aiohttp.ClientSession | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._calls: dict[int, asyncio.Event] = {}
        """A peer whose link to this node stands need not be waited for any longer."""

    # --- sending -------------------------------------------------------------------------------

    def send(self, position: int, message: M) -> bool:
        """Queue `message` for the peer; False: dropped (and counted), its link is down or full. It
        leaves when the present step is over, with what else was said in it."""
        link = self._outgoing.get(position)
        if link is None or not link.put(self._encoder.encode(message)):
            self._metrics.peer_messages_dropped += 1
            return False
        if not link.talking:
            link.talking = True
            if not self._talking:
                self._turn.at_end(self._flush)
            self._talking.append(link)
        return True

    def send_all(self, messages: Sequence[tuple[int, M]]) -> None:
        """Like `send` for each, but at once, behind what was said before. What goes to several
        peers is encoded once."""
        last: M | None = None
        encoded = b""
        touched: list[Outgoing] = []
        for position, message in messages:
            link = self._outgoing.get(position)
            if link is None or not link.up:
                # What is queued for a peer that is away would arrive stale: the core sends anew.
                self._metrics.peer_messages_dropped += 1
                continue
            if message is not last:
                encoded = self._encoder.encode(message)
                last = message
            if not link.put(encoded):
                self._metrics.peer_messages_dropped += 1
            elif link not in touched:
                touched.append(link)
        if self._held is not None:
            self._held.update(touched)
            return
        for link in touched:
            link.write()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What several steps send leaves as one frame a peer, when the body has run."""
        if self._held is not None:
            yield
            return
        held = self._held = set()
        try:
            yield
        finally:
            self._held = None
            for link in held:
                link.write()

    def _flush(self) -> None:
        talking, self._talking = self._talking, []
        for link in talking:
            link.talking = False
            link.write()

    @property
    def connected(self) -> frozenset[int]:
        """Positions whose outgoing link is up."""
        return frozenset(position for position, link in self._outgoing.items() if link.up)

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
            self._outgoing[position] = Outgoing(self._metrics)
            if self._session is not None:
                self._start(position)

    def remove(self, position: int) -> None:
        """That node has left."""
        if self._urls.pop(position, None) is None:
            return
        task = self._tasks.pop(position, None)
        if task is not None:
            task.cancel()
        del self._outgoing[position]
        self._calls.pop(position, None)
        incoming = self._incoming.get(position)
        if incoming is not None:
            # Not with HAS_LEFT_CODE: it may be this node that has left.
            incoming.close(aiohttp.WSCloseCode.OK, "")

    async def stop(self) -> None:
        """Flush what is queued on links that are up (0.2 s at most), then close all of them."""
        self._flush()
        flushing = [asyncio.ensure_future(o.drained()) for o in self._outgoing.values() if o.up]
        if flushing:
            await asyncio.wait(flushing, timeout=0.2)
        tasks = [*flushing, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        for ws in list(self._incoming.values()):
            ws.close(aiohttp.WSCloseCode.GOING_AWAY, "node is stopping")

    async def _dial(self, position: int) -> None:
        refusal = ""
        backoff_s = RECONNECT_S[0]
        called = self._calls[position] = asyncio.Event()
        while True:
            called.clear()
            try:
                await self._hold_link(position)
                backoff_s = RECONNECT_S[0]
            except Refused as e:
                if isinstance(e, Dismissed):
                    self._on_left(position)
                if str(e) != refusal:  # once per reason, not five times a second
                    refusal = str(e)
                    log.error("peer %s refused: %s", self._urls[position], e)
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as e:
                log.debug("link to %s: %s", self._urls[position], e)
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff_s * random.uniform(0.5, 1.0)):  # noqa: S311 - jitter
                    await called.wait()
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
                if ws.close_code == HAS_LEFT_CODE:
                    raise Dismissed
                raise Refused(str(reply.extra or "closed before its greeting"))
            hello = msgspec.msgpack.decode(reply.data, type=Hello)
            self._check(hello, position)
            link = self._outgoing[position]
            link.raise_up(ws)
            self._on_up(hello)
            try:
                # Nothing but a close (or a missed pong) ever comes back on this direction.
                await ws.receive()
            finally:
                link.lower()
                self._on_down(position)
        finally:
            await ws.close()

    # --- receiving -----------------------------------------------------------------------------

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The handler of `GET /peer/link`."""
        given = request.headers.get(SECRET_HEADER, "").encode("latin-1", "replace")
        if self._secret is not None and not hmac.compare_digest(given, self._secret):
            raise web.HTTPForbidden(text="Cluster secret required")
        greeted: list[Hello] = []

        def on_message(opcode: int, payload: bytes) -> None:
            if not greeted:
                hello = self._greet(ws, payload)
                if hello is not None:
                    greeted.append(hello)
            elif opcode != BINARY or self._incoming.get(greeted[0].position) is not ws:
                ws.close(aiohttp.WSCloseCode.UNSUPPORTED_DATA, "frames are binary")
            else:
                self._read(ws, greeted[0], payload)

        def no_hello() -> None:
            if not greeted:
                ws.close(aiohttp.WSCloseCode.POLICY_VIOLATION, "no greeting in time")

        ws = await WebSocket.open(request, max_bytes=MAX_FRAME_BYTES, heartbeat_s=KEEPALIVE_S)
        timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, no_hello)
        try:
            ws.listen(on_message)
            await ws.closed()
        finally:
            timer.cancel()
            ws.end()
            if greeted and self._incoming.get(greeted[0].position) is ws:
                del self._incoming[greeted[0].position]
        return ws.response

    def _greet(self, ws: WebSocket, payload: bytes) -> Hello | None:
        """The first frame: who dials. None: refused, and told so."""
        try:
            hello = msgspec.msgpack.decode(payload, type=Hello)
            self._check(hello, hello.position, incoming=True)
        except (Refused, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
            self._tell_refusal(f"refused a link from {ws.remote}: {e}")
            left = isinstance(e, HasLeft)
            ws.close(HAS_LEFT_CODE if left else aiohttp.WSCloseCode.POLICY_VIOLATION, str(e))
            return None
        ws.send(self._encoder.encode(self._me), BINARY)
        before = self._incoming.get(hello.position)
        self._incoming[hello.position] = ws
        if (called := self._calls.get(hello.position)) is not None:
            called.set()
        if before is not None:  # the peer dialled again: its older connection is dead or dying
            before.close(aiohttp.WSCloseCode.GOING_AWAY, "dialled again")
        return hello

    def _tell_refusal(self, sentence: str) -> None:
        """Once each: who is refused dials again five times a second."""
        if sentence not in self._told:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told.add(sentence)
            log.warning("%s", sentence)

    def _read(self, ws: WebSocket, hello: Hello, payload: bytes) -> None:
        try:
            messages = self._decoder.decode(payload)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
            log.error("malformed frame from peer %d, link closed: %s", hello.position, e)
            ws.close(aiohttp.WSCloseCode.INVALID_TEXT, "malformed frame")
            return
        self._on_batch(hello.position, hello.incarnation, messages)

    def _check(self, hello: Hello, expected_position: int, *, incoming: bool = False) -> None:
        if hello.cluster != self._me.cluster:
            raise Refused(f"it belongs to cluster {hello.cluster}, this node to {self._me.cluster}")
        if self._has_left(hello.position):
            raise HasLeft(f"node {hello.position} has left the cluster")
        known = hello.position in self._urls or (incoming and self._may_be_new(hello.position))
        if hello.position != expected_position or not known:
            raise Refused(f"it calls itself position {hello.position}")
        bound = self._known_ids.setdefault(hello.position, hello.node_id)
        if bound != hello.node_id:
            raise Refused(f"position {hello.position} is {bound!r}, not {hello.node_id!r}")
