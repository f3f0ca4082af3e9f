"""What a client is given: messages, each with a lease to keep, by a subscription."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from message_queue.client_link import Reply

log = logging.getLogger(__name__)

EXTENDS_PER_LEASE = 3
CLOSE_WITHIN_S = 2.0
_json = msgspec.json.Encoder()


class QueueError(Exception):
    """Base of all errors of this client."""


class Refused(QueueError):
    """The cluster said no; `status` and `body` of the HTTP answer."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {body.get('error', 'refused')}")
        self.status = status
        self.body = body


class Unavailable(QueueError):
    """No node could be reached in time: nothing was done."""


class OutcomeUnknown(QueueError):
    """No answer in time: it may have been done. A retry of a produce with the same `dedupe_id` is
    safe, and so is one of an ack."""


class LeaseLost(QueueError):
    """The message is not this client's any more: its lease ended, and it may have been, or will be,
    delivered again."""

    def __init__(self, message_id: str) -> None:
        super().__init__(f"the lease of {message_id} is lost")
        self.message_id = message_id


class Asking(Protocol):
    """What is needed of the client."""

    async def ask(self, item: dict[str, Any], *, repeatable: bool) -> Reply:
        """The answer to an item. Raises OutcomeUnknown."""

    def say(self, item: bytes) -> None:
        """Send an item that needs no answer."""

    def tell(self) -> None:
        """There is credit to pass on."""

    def forget(self, subscription: Subscription) -> None:
        """It is closed."""


class Delivered(msgspec.Struct, frozen=True):
    id: str
    queue: str
    attempt: int
    receipt: str
    enqueued_at: str
    body: msgspec.Raw
    headers: dict[str, Any]
    source_id: str | None = None
    source: str | None = None
    reason: str | None = None


delivered_decoder = msgspec.json.Decoder(Delivered)


class Together:
    """Messages that came together, with a receipt for all of them. If all are acked in one turn of
    the loop, one item says so; else each is acked by itself."""

    def __init__(self, client: Asking, receipt: str, count: int) -> None:
        self._client = client
        self._receipt = receipt
        self._count = count
        self._acked = 0
        self._whole: asyncio.Task[Reply] | None = None

    async def ack(self) -> Reply | None:
        """One of them is done. What became of all of them; None: it has to be acked by itself."""
        self._acked += 1
        await asyncio.sleep(0)  # for company
        if self._acked < self._count:
            self._count = -1  # some go alone: it is no whole any more
        if self._count < 0:
            return None
        if self._whole is None:
            item = {"op": "ack", "delivery": self._receipt}
            self._whole = asyncio.create_task(self._client.ask(item, repeatable=True))
            # Whoever waited for it may be gone when it fails.
            self._whole.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._whole)


class Message:
    """One delivery. `async with message:` acks at the end of the body, or nacks if it raises (and
    the error goes on); `ack`, `nack` and `extend` do the same by hand, once."""

    def __init__(
        self, raw: Delivered, subscription: Subscription, together: Together | None = None
    ) -> None:
        self._raw = raw
        self._subscription = subscription
        self._together = together
        self._settled = False
        self.lost = False
        """The lease is gone: whatever is done now, somebody else may do again."""

    @property
    def id(self) -> str:
        """Its name in the cluster."""
        return self._raw.id

    @property
    def queue(self) -> str:
        """Where it came from."""
        return self._raw.queue

    @property
    def body(self) -> Any:
        """The JSON value that was produced."""
        return msgspec.json.decode(self._raw.body)

    @property
    def headers(self) -> dict[str, Any]:
        """As produced."""
        return self._raw.headers

    @property
    def attempt(self) -> int:
        """1 for the first delivery."""
        return self._raw.attempt

    @property
    def receipt(self) -> str:
        """Names this delivery."""
        return self._raw.receipt

    @property
    def enqueued_at(self) -> str:
        """ISO 8601."""
        return self._raw.enqueued_at

    @property
    def dead_letter(self) -> dict[str, str | None]:
        """Of a dead letter: `source_id`, `source` and `reason`."""
        raw = self._raw
        return {"source_id": raw.source_id, "source": raw.source, "reason": raw.reason}

    async def ack(self) -> None:
        """It is done, for ever. Raises LeaseLost, OutcomeUnknown."""
        self._settle()
        whole = await self._together.ack() if self._together is not None else None
        if whole is not None and whole.status in (404, 409):
            # Of the others, all are acked.
            lost = whole.body.get("overtaken") or whole.body.get("unknown") or ()
            whole = whole if self.id in lost or not lost else Reply(200, {})
        reply = whole if whole is not None else await self._ask("ack")
        if reply.status in (404, 409):
            self.lost = True
            raise LeaseLost(self.id)
        check(reply)

    async def nack(self, delay_ms: int = 0) -> None:
        """Deliver it again, after `delay_ms`. Raises LeaseLost, OutcomeUnknown."""
        self._settle()
        reply = await self._ask("nack", delay_ms=delay_ms)
        if reply.status in (404, 409):
            self.lost = True
            raise LeaseLost(self.id)
        check(reply)

    async def extend(self, visibility_ms: int) -> None:
        """Let the lease end that much later than now (this happens by itself while it is held).
        Raises LeaseLost, OutcomeUnknown, Refused (12 hours in total)."""
        reply = await self._ask("extend", visibility_ms=visibility_ms)
        if reply.status in (404, 409):
            if not self._settled:
                self.lost = True
            raise LeaseLost(self.id)
        check(reply)

    async def give_back(self) -> None:
        """Nobody has seen it: let others have it, as if it had not been delivered."""
        self._settled = True
        await self._ask("release")

    async def _ask(self, op: str, **fields: Any) -> Reply:
        item = {"op": op, "message_id": self.id, "receipt": self.receipt, **fields}
        return await self._subscription.client.ask(item, repeatable=True)

    def _settle(self) -> None:
        if self._settled:
            raise QueueError(f"{self.id} was settled before")
        self._settled = True
        self._subscription.settled(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._settled:
            return
        if error is None:
            await self.ack()
            return
        try:
            await asyncio.shield(self.nack())
        except QueueError as e:
            # The body's own error says more; the lease ends by itself.
            log.warning("could not give back %s: %s", self.id, e)


class Subscription:
    """Invariant: credit at the node + owed + unsettled messages here = prefetch."""

    def __init__(
        self, client: Asking, cid: int, queue: str, prefetch: int, visibility_ms: int
    ) -> None:
        self.client = client
        self.cid = cid
        self.opened = False
        self._queue = queue
        self._prefetch = prefetch
        self._visibility_ms = visibility_ms
        self._buffer: deque[Message] = deque()
        self._held: set[Message] = set()
        """Delivered and not settled, the buffer included."""
        self._owed = 0
        self._arrived = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._refusal: Refused | None = None

    def open(self) -> None:
        """Subscribe, now and after each reconnection."""
        self.opened = True
        self._keeper = asyncio.create_task(self._keep(), name=f"leases of {self._queue}")

    def subscribing(self) -> bytes:
        """The item that makes it (again), with the credit that is free."""
        self._owed = 0
        return _json.encode({
            "op": "subscribe", "cid": self.cid, "queue": self._queue,
            "credit": max(0, self._prefetch - len(self._held)),
            "visibility_ms": self._visibility_ms,
        })  # fmt: skip

    def crediting(self) -> bytes | None:
        """What became free since last asked."""
        if not self._owed or not self.opened:
            return None
        owed, self._owed = self._owed, 0
        return _json.encode({"op": "credit", "subscription": self.cid, "credit": owed})

    def take(self, messages: list[msgspec.Raw], receipt: str | None) -> None:
        """A delivery."""
        together = None
        if receipt is not None and len(messages) > 1:
            together = Together(self.client, receipt, len(messages))
        for raw in messages:
            message = Message(delivered_decoder.decode(raw), self, together)
            self._buffer.append(message)
            self._held.add(message)
        self._arrived.set()

    def refused(self, error: Refused) -> None:
        """There will be no deliveries."""
        self.opened = False
        self._refusal = error
        self._arrived.set()

    async def next(self) -> Message | None:
        """The next one, in order; None when the subscription is closed. Raises Refused."""
        while not self._buffer:
            if self._refusal is not None:
                raise self._refusal
            if self._closed:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._buffer.popleft()

    def settled(self, message: Message) -> None:
        """Another may come in its place."""
        if message in self._held:
            self._held.discard(message)
            self._owed += 1
            self.client.tell()
            if self._closed and not self._held:
                self.end()

    def end(self) -> None:
        """Keep no leases any more."""
        if self._keeper is not None:
            self._keeper.cancel()
        self.client.forget(self)

    async def _keep(self) -> None:
        """Extend what is held, three times a lease."""
        while True:
            await asyncio.sleep(self._visibility_ms / 1000 / EXTENDS_PER_LEASE)
            await asyncio.gather(*(self._extend(message) for message in list(self._held)))

    async def _extend(self, message: Message) -> None:
        try:
            await message.extend(self._visibility_ms)
        except LeaseLost:
            if message.lost and message in self._buffer:  # nobody has seen it: as if it never came
                self._buffer.remove(message)
                self.settled(message)
        except QueueError as e:
            log.warning("could not extend the lease of %s: %s", message.id, e)

    async def close(self) -> None:
        """Unsubscribe, and give back what nobody has begun to work on."""
        if self._closed:
            return
        self._closed = True
        self._arrived.set()
        if self.opened:
            self.opened = False
            self.client.say(_json.encode({"op": "unsubscribe", "subscription": self.cid}))
        unseen, self._buffer = list(self._buffer), deque()
        for message in unseen:
            self._held.discard(message)
        try:
            async with asyncio.timeout(CLOSE_WITHIN_S):
                await asyncio.gather(*(message.give_back() for message in unseen))
        except (TimeoutError, QueueError) as e:
            log.info("could not give back %d messages: %s", len(unseen), e)
        if not self._held:  # else somebody works on a message still
            self.end()


def check(reply: Reply) -> dict[str, Any]:
    """The body of a success. Raises Refused."""
    if reply.status >= 400:
        raise Refused(reply.status, reply.body)
    return reply.body
