"""GET /stream: the service for clients that stay, over one WebSocket. The frames: `frames.py`.

```
frame ─▶ items ─▶ service.begin(operation, done) ─┐ many under way, no task for any
feeders: one a subscription, while it has credit ─┤
                                                  ▼
flush: all that one turn of the loop had to say to a client leaves as one frame
```

Bounded on all sides: items under way (429), credit, subscriptions, connections. Who does not read
what it is sent is not read from either. A delivery that was not handed to the connection when it
closed has leased nothing; one that was stays leased until its time is over, so that a client may
come back, to any node, and settle it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from functools import partial
from typing import assert_never

from aiohttp import WSCloseCode, web

from message_queue.api import frames
from message_queue.api.acking import Acking, whole, whole_answer
from message_queue.api.errors import ApiError
from message_queue.api.frames import (
    AckItem,
    Bad,
    Cid,
    CreditItem,
    ExtendItem,
    Item,
    NackItem,
    ProduceItem,
    ReleaseItem,
    SubscribeItem,
    UnsubscribeItem,
)
from message_queue.api.keys import CONFIG, METRICS, SERVICE, Delivered, Service
from message_queue.api.requests import new_messages
from message_queue.api.schemas import check_name
from message_queue.api.subscription import Subscription
from message_queue.core.ids import MessageName, parse_id, parse_ids
from message_queue.core.operations import (
    MAX_BATCH,
    MAX_WAIT_MS,
    Answer,
    Direct,
    Extend,
    Nack,
    Produce,
    Settle,
    results_decoder,
)
from message_queue.core.placement.ring import PARTITIONS
from message_queue.metrics import Metrics
from message_queue.turn import Turn
from message_queue.websocket import TEXT, WebSocket

log = logging.getLogger(__name__)

MAX_STREAMS = 4096
"""Connections of one node."""
MAX_SUBSCRIPTIONS = 64
"""Of one connection."""
MAX_UNDER_WAY = 4096
"""Items of one connection that are not answered yet; more are refused (429)."""
UNSENT_BYTES = 4 << 20
"""Beyond this nothing is read from the client until it has taken some of it."""
FRAME_BYTES = 1 << 20
HEARTBEAT_S = 15.0
FLUSH_S = 0.3
"""How long a stopping node waits for answers under way."""
PUT_OFF_S = 0.03
"""Half a window is at the client: what credit came with an ack may wait so long for its answer."""
_DRY_S = (0.05, 0.2)
_TROUBLE_S = (0.1, 0.5)


class Streams:
    """All streams of a node."""

    def __init__(self) -> None:
        self.turn = Turn()
        self._open: set[_Stream] = set()
        self._talking: list[_Stream] = []
        """Have something to send at the end of this step."""
        self._closed = False

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The handler of GET /stream."""
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise ApiError(426, "WebSocket upgrade required", headers={"Upgrade": "websocket"})
        if self._closed or len(self._open) >= MAX_STREAMS:
            reason = "Node is stopping" if self._closed else "Too many streams"
            raise ApiError(503, reason, headers={"Retry-After": "1"}, definite=True)
        app = request.app
        stream = _Stream(self, app[SERVICE], app[METRICS])
        self._open.add(stream)
        try:
            return await stream.run(request, app[CONFIG].max_body_bytes)
        finally:
            self._open.discard(stream)

    async def stop(self) -> None:
        """The node stops: no new work, a moment for the answers under way, then 1001 (going away):
        clients go on at another node."""
        self._closed = True
        await asyncio.gather(*(stream.stop() for stream in list(self._open)))

    def flush_soon(self, stream: _Stream) -> None:
        """Have it send what it has when the step that is being taken is over: one frame for all."""
        if not self._talking:
            self.turn.at_end(self._flush)
        self._talking.append(stream)

    def _flush(self) -> None:
        talking, self._talking = self._talking, []
        for stream in talking:
            stream.flush()


STREAMS = web.AppKey("streams", Streams)


class _Stream:
    """One connection. Everything runs on the event loop."""

    def __init__(self, streams: Streams, service: Service, metrics: Metrics) -> None:
        self._ws: WebSocket
        self._streams = streams
        self._service = service
        self._metrics = metrics
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._undelivered: dict[int, Delivered] = {}
        """Those of `_unsent`, by place, that leased something."""
        self._flushing = False
        self._room = asyncio.Event()
        self._room.set()
        self._under_way = 0
        self._subscriptions: dict[Cid, Subscription] = {}
        self._acking = 0
        """Acks under way."""
        self._later: list[Subscription] = []
        """Have credit, and wait for the answers to those; `PUT_OFF_S` at most."""
        self._later_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._stopping = False
        self._idle = asyncio.Event()
        """Stopping, and nothing is under way or unsent."""

    async def run(self, request: web.Request, max_bytes: int) -> web.StreamResponse:
        """Serve until either side closes."""
        self._ws = await WebSocket.open(request, max_bytes=max_bytes, heartbeat_s=HEARTBEAT_S)
        try:
            self._ws.listen(self._take)
            await self._ws.closed()
        finally:
            self._closed = True
            self._ws.end()
            if self._later_timer is not None:
                self._later_timer.cancel()
            feeders = [subscription.task for subscription in self._subscriptions.values()]
            for task in feeders:
                task.cancel()
            await asyncio.gather(*feeders, return_exceptions=True)
            for delivered in self._undelivered.values():
                delivered.undo()
            self._undelivered.clear()
            self._unsent.clear()
        return self._ws.response

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A feeder ended by itself: without it the connection is of no use."""
        if task.cancelled() or self._closed:
            return
        if (failure := task.exception()) is not None:
            log.error("a stream's %s failed", task.get_name(), exc_info=failure)
        self._ws.abort()

    async def stop(self) -> None:
        """Deliver no more, finish what is under way, close."""
        self._stopping = True
        self._note_idle()
        for subscription in self._subscriptions.values():
            subscription.task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self._idle.wait()
        self._ws.close(WSCloseCode.GOING_AWAY, "node is stopping")
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self._ws.closed()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────

    def _take(self, opcode: int, payload: bytes) -> None:
        """A frame came in."""
        if opcode != TEXT:
            self._ws.close(WSCloseCode.UNSUPPORTED_DATA, "frames are text")
            return
        acks: list[Acking] = []
        for item in frames.parse(payload):
            self._metrics.requests += 1
            if isinstance(item, Bad):
                self._fail(item.cid, item.error)
                continue
            try:
                self._do(item, acks)
            except ApiError as error:
                self._fail(item.cid, error)
        if acks:
            self._settle(acks)

    def _do(self, item: Item, acks: list[Acking]) -> None:
        """Begin one item. Raises ApiError for what is refused at once."""
        if self._stopping:
            raise ApiError(503, "Node is stopping", definite=True)
        if self._under_way >= MAX_UNDER_WAY:
            raise ApiError(429, "Too many items under way", limit=MAX_UNDER_WAY, definite=True)
        match item:
            case ProduceItem(queue=queue):
                messages, batch = new_messages(item)
                self._begin(item.cid, Produce(check_name(queue, "queue"), messages, batch))
            case AckItem(delivery=str()):
                operation = whole(item)
                self._under_way += 1
                done = partial(self._acked_whole, item.cid, operation.partition)
                self._service.begin(operation, done)
            case AckItem():
                acks.append(Acking(item))
                self._under_way += 1
                self._acking += 1
            case NackItem(message_id, receipt, delay_ms):
                name = _known(message_id)
                self._begin(item.cid, Nack(name.partition, name.dot, receipt, delay_ms))
            case ReleaseItem(message_id, receipt):
                name = _known(message_id)
                self._begin(item.cid, Nack(name.partition, name.dot, receipt, 0, unseen=True))
            case ExtendItem(message_id, visibility_ms, receipt):
                name = _known(message_id)
                self._begin(item.cid, Extend(name.partition, name.dot, receipt, visibility_ms))
            case SubscribeItem():
                self._subscribe(item)
            case CreditItem(subscription, credit):
                found = self._subscription(subscription)
                found.add(credit)
                self._answer(item.cid, Answer(200, b'{"status":"ok"}'))
                if self._acking and found.has_plenty:
                    self._put_off(found)
                elif found.waits and found.credit:
                    self._feed_now(found)
            case UnsubscribeItem(subscription):
                self._subscription(subscription).task.cancel()
                del self._subscriptions[subscription]
                self._answer(item.cid, Answer(200, b'{"status":"unsubscribed"}'))
            case _:
                assert_never(item)

    def _begin(self, cid: Cid | None, operation: Direct) -> None:
        self._under_way += 1
        self._service.begin(operation, partial(self._done, cid))

    def _done(self, cid: Cid | None, reply: Answer) -> None:
        self._under_way -= 1
        self._answer(cid, reply)
        if self._stopping:
            self._note_idle()

    def _note_idle(self) -> None:
        if self._stopping and not (self._under_way or self._unsent):
            self._idle.set()

    def _fail(self, cid: Cid | None, error: ApiError) -> None:
        self._answer(cid, frames.failure(error))

    # ── acks: those of a frame go to each partition together ────────────────────────────────────

    def _settle(self, acks: list[Acking]) -> None:
        by_partition: dict[int, list[tuple[Acking, int, int, str | None]]] = {}
        for acking in acks:
            names = parse_ids([text for text, _ in acking.named])
            for index, (name, (_, receipt)) in enumerate(zip(names, acking.named, strict=True)):
                if name is None or name.partition >= PARTITIONS:
                    acking.settled(index, 404)
                else:
                    named = by_partition.setdefault(name.partition, [])
                    named.append((acking, index, name.dot, receipt))
            if not acking.open:
                self._acked(acking)
        for partition, named in by_partition.items():
            for start in range(0, len(named), MAX_BATCH):
                part = named[start : start + MAX_BATCH]
                dots = tuple([dot for _, _, dot, _ in part])
                receipts = tuple([receipt for _, _, _, receipt in part])
                operation = Settle(partition, dots, receipts)
                self._service.begin(operation, partial(self._settled, part))

    def _settled(self, part: list[tuple[Acking, int, int, str | None]], reply: Answer) -> None:
        if reply.status == 200:
            statuses = results_decoder.decode(reply.body).statuses
            self._metrics.acked += statuses.count(200)
            for (acking, index, _, _), status in zip(part, statuses, strict=True):
                acking.settled(index, status)
        else:
            for acking, index, _, _ in part:
                acking.failed(index, reply)
        for acking, _, _, _ in part:
            if not acking.open:
                self._acked(acking)

    def _acked_whole(self, cid: Cid | None, partition: int, reply: Answer) -> None:
        acknowledged, answer = whole_answer(partition, reply)
        self._metrics.acked += acknowledged
        self._done(cid, answer)

    def _acked(self, acking: Acking) -> None:
        if not acking.answered:
            acking.answered = True
            self._acking -= 1
            self._done(acking.cid, acking.answer())
            if self._later:
                self._feed_later()

    # ── subscriptions ───────────────────────────────────────────────────────────────────────────

    def _subscribe(self, item: SubscribeItem) -> None:
        if item.cid in self._subscriptions:
            raise ApiError(409, "Subscription exists", subscription=item.cid)
        if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
            raise ApiError(429, "Too many subscriptions", limit=MAX_SUBSCRIPTIONS)
        queue = check_name(item.queue, "queue")
        body = b'{"status":"subscribed"}'
        self._answer(item.cid, Answer(200, body))
        self._subscriptions[item.cid] = Subscription(item.cid, queue, item, self._feed, self._ended)

    def _subscription(self, cid: Cid) -> Subscription:
        found = self._subscriptions.get(cid)
        if found is None:
            raise ApiError(404, "No such subscription", subscription=cid)
        return found

    def _feed_now(self, subscription: Subscription) -> None:
        """Its feeder waits for credit, which has come: what is ready leaves in this very turn, and
        the feeder sleeps on unless there is still credit."""
        if self._room.is_set():
            delivered = self._service.consume_now(subscription.next())
            if delivered is not None:
                reply = delivered.answer
                subscription.credit -= reply.messages
                self._put(frames.delivery(subscription.cid, reply), delivered)
        if subscription.credit:
            subscription.wake()

    def _put_off(self, subscription: Subscription) -> None:
        """What it has credit for leaves in one frame with the answers to the acks under way."""
        if subscription not in self._later:
            self._later.append(subscription)
            if self._later_timer is None:
                loop = asyncio.get_running_loop()
                self._later_timer = loop.call_later(PUT_OFF_S, self._is_late)

    def _is_late(self) -> None:
        self._later_timer = None
        self._feed_later()

    def _feed_later(self) -> None:
        later, self._later = self._later, []
        for subscription in later:
            current = self._subscriptions.get(subscription.cid) is subscription
            if current and subscription.waits and subscription.credit and not self._closed:
                self._feed_now(subscription)

    async def _feed(self, subscription: Subscription) -> None:
        """Lease and send while there is credit. Owners come and go meanwhile: the service finds the
        present one. Cancelling leaves nothing leased."""
        loop = asyncio.get_running_loop()
        while True:
            await subscription.has_credit()
            asked_s = loop.time()
            delivered = await self._service.consume(subscription.next())
            reply = delivered.answer
            if reply.status == 200:
                subscription.credit -= reply.messages
                self._put(frames.delivery(subscription.cid, reply), delivered)
                if not self._room.is_set():
                    await self._room.wait()
            elif reply.status != 204:
                self._put(frames.trouble(subscription.cid, reply), None)
                await asyncio.sleep(random.uniform(*_TROUBLE_S))  # noqa: S311 - jitter
            elif loop.time() - asked_s < MAX_WAIT_MS / 2000:
                # Too many stand in line there: that was no wait at all.
                await asyncio.sleep(random.uniform(*_DRY_S))  # noqa: S311 - jitter

    # ── out ─────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, cid: Cid | None, reply: Answer) -> None:
        if reply.status >= 400:
            self._metrics.errors += 1
        if cid is not None or reply.status >= 400:
            self._put(frames.answer(cid, reply), None)

    def _put(self, item: bytes, delivered: Delivered | None) -> None:
        if self._closed:
            if delivered is not None:
                delivered.undo()
            return
        if delivered is not None:
            self._undelivered[len(self._unsent)] = delivered
        self._unsent.append(item)
        self._unsent_bytes += len(item)
        if not self._flushing:
            self._flushing = True
            self._streams.flush_soon(self)
        if self._unsent_bytes > UNSENT_BYTES and self._room.is_set():
            self._room.clear()
            self._ws.pause_reading()

    def flush(self) -> None:
        """Write what waits, as long as the connection takes it. What it has not taken when it
        closes is undone by `run`."""
        ws = self._ws
        while self._unsent:
            if ws.full:
                ws.when_drained(self.flush)
                return
            part = self._unsent
            if self._unsent_bytes > FRAME_BYTES:
                part = self._first(FRAME_BYTES)
            if not ws.send(b"[" + b",".join(part) + b"]", TEXT):
                return
            self._sent(part)
        self._flushing = False
        if self._stopping:
            self._note_idle()

    def _first(self, most_bytes: int) -> list[bytes]:
        """About that much of what waits, one item at least."""
        size = 0
        for count, item in enumerate(self._unsent, 1):
            size += len(item)
            if size >= most_bytes:
                return self._unsent[:count]
        return self._unsent

    def _sent(self, part: list[bytes]) -> None:
        """The connection has taken it."""
        count = len(part)
        if part is self._unsent:
            self._unsent, self._unsent_bytes = [], 0
            if self._undelivered:
                self._undelivered = {}
        else:
            self._unsent = self._unsent[count:]
            self._unsent_bytes -= sum(map(len, part))
            self._undelivered = {n - count: d for n, d in self._undelivered.items() if n >= count}
        if not self._room.is_set() and self._unsent_bytes <= UNSENT_BYTES // 2:
            self._room.set()
            self._ws.resume_reading()


def _known(text: str) -> MessageName:
    name = parse_id(text)
    if name is None:
        raise ApiError(404, "Message not found", id=text)
    return name
