"""The Python client.

    async with QueueClient(["http://127.0.0.1:8000", "http://127.0.0.1:8001"]) as q:
        await q.produce("jobs", {"resize": "cat.png"})
        async for message in q.consume("jobs", prefetch=10):
            async with message:  # acks at the end; gives it back if the body fails
                resize(message.body)

It keeps one connection (`GET /stream`) to one node, goes on at another when that one stops or
dies, and sends again what was not answered. A produce carries a `dedupe_id`, so that what is sent
twice is stored once. While a message is worked on, or waits here to be, its lease is extended; if
it is lost all the same (this process slept, the cluster was away for too long), somebody else may
have the message: `message.lost` becomes true and the `async with` ends with `LeaseLost`.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from message_queue.client_delivery import (
    LeaseLost,
    Message,
    OutcomeUnknown,
    QueueError,
    Refused,
    Subscription,
    Unavailable,
    check,
    delivered_decoder,
)
from message_queue.client_link import Link, NotDone, Reply

__all__ = [
    "LeaseLost",
    "Message",
    "OutcomeUnknown",
    "QueueClient",
    "QueueError",
    "Refused",
    "Unavailable",
]

_json = msgspec.json.Encoder()


class QueueClient:
    """Connects by itself; `close` (or the end of `async with`) gives back what was fetched ahead.

    In: `urls` of some nodes (`http(s)://host:port`, or `host:port`); `timeout_s`: how long a call
    goes on trying; `tls`: for https with a private CA.

        async with QueueClient("127.0.0.1:8000,127.0.0.1:8001") as q:
            message_id = await q.produce("jobs", {"n": 1}, headers={"trace": "abc"})
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        timeout_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        named = urls.split(",") if isinstance(urls, str) else urls
        bases = [_base(url) for url in named if url.strip()]
        if not bases:
            raise ValueError("urls names no node")
        self.timeout_s = timeout_s
        self._subscriptions: dict[int, Subscription] = {}
        self._link = Link(
            bases,
            tls=tls,
            items_at_connect=self._subscribing,
            items_at_flush=self._credits,
            on_delivery=self._delivered,
            on_answer=self._answered,
        )
        self._life = secrets.token_hex(8)
        self._produced = 0

    async def __aenter__(self) -> Self:
        self._link.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give back what nobody has begun to work on, and disconnect."""
        for subscription in list(self._subscriptions.values()):
            await subscription.close()
        for subscription in list(self._subscriptions.values()):
            subscription.end()
        await self._link.close()

    @property
    def connections(self) -> int:
        """Made so far, for the curious: more than one means that a node went away."""
        return self._link.connections

    @property
    def frames(self) -> int:
        """Sent so far, for the curious: calls that run side by side share them."""
        return self._link.frames

    # ── producing ───────────────────────────────────────────────────────────────────────────────

    async def produce(
        self,
        queue: str,
        body: Any,
        *,
        headers: Mapping[str, Any] | None = None,
        delay_ms: int = 0,
        priority: int = 0,
        ttl_ms: int | None = None,
        dedupe_id: str | None = None,
        group_id: str | None = None,
        once: bool = True,
    ) -> str:
        """Store a message on a majority of its replicas; returns its id.

        `body` is anything that JSON can say. `once`: a retry after a broken connection stores
        nothing twice (by a `dedupe_id` of this client's, unless one is given), which costs the
        cluster a small record; without it such a produce raises OutcomeUnknown instead of being
        retried. Raises OutcomeUnknown, Refused (400, 413; 429, 503, 507 that did not pass in time).
        """
        fields = _fields(headers, delay_ms, priority, ttl_ms, group_id)
        if dedupe_id is None and once:
            dedupe_id = self._next_dedupe_id()
        if dedupe_id is not None:
            fields["dedupe_id"] = dedupe_id
        item = {"op": "produce", "queue": queue, "body": body, **fields}
        reply = await self.ask(item, repeatable=dedupe_id is not None)
        return str(check(reply)["id"])

    async def produce_many(
        self,
        queue: str,
        bodies: Iterable[Any],
        *,
        headers: Mapping[str, Any] | None = None,
        delay_ms: int = 0,
        priority: int = 0,
        ttl_ms: int | None = None,
        group_id: str | None = None,
        once: bool = True,
    ) -> list[str]:
        """Store up to 1000 messages, all or none; returns their ids. Like `produce` otherwise.

        ids = await q.produce_many("jobs", [{"n": n} for n in range(100)])
        """
        fields = _fields(headers, delay_ms, priority, ttl_ms, group_id)
        messages = []
        for body in bodies:
            message = {"body": body, **fields}
            if once:
                message["dedupe_id"] = self._next_dedupe_id()
            messages.append(message)
        item = {"op": "produce", "queue": queue, "messages": messages}
        reply = await self.ask(item, repeatable=once)
        return [str(message_id) for message_id in check(reply)["ids"]]

    def _next_dedupe_id(self) -> str:
        self._produced += 1
        return f"{self._life}-{self._produced:x}"

    # ── consuming ───────────────────────────────────────────────────────────────────────────────

    async def consume(
        self, queue: str, *, prefetch: int = 10, visibility_ms: int = 30_000
    ) -> AsyncGenerator[Message, None]:
        """Messages as they come, for ever; at most `prefetch` (1 to 1000) are held unsettled.

        Work on several at once by handing them to tasks; each must be settled (`async with
        message`, `ack` or `nack`) for the next to come. `visibility_ms` is how long a message stays
        hidden from others when this client dies; while it lives, leases are extended.
        Leaving the loop gives back what was fetched ahead.
        """
        if not 1 <= prefetch <= 1000:
            raise ValueError("prefetch must be 1 to 1000")
        if visibility_ms < 100:
            raise ValueError("visibility_ms must be at least 100")
        subscription = Subscription(self, self._link.next_cid(), queue, prefetch, visibility_ms)
        self._subscriptions[subscription.cid] = subscription
        try:
            subscription.open()
            self.say(subscription.subscribing())
            while (message := await subscription.next()) is not None:
                yield message
        finally:
            await subscription.close()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def ask(self, item: dict[str, Any], *, repeatable: bool) -> Reply:
        """The answer to an item of the stream. Raises Unavailable, OutcomeUnknown."""
        try:
            return await self._link.ask(item, repeatable=repeatable, within_s=self.timeout_s)
        except NotDone as e:
            if not e.sent:
                raise Unavailable(f"no node reached within {self.timeout_s} s") from None
            what = f"no certain answer to {item['op']} within {self.timeout_s} s"
            last = f", the last was {e.last.status} {e.last.body.get('error')}" if e.last else ""
            raise OutcomeUnknown(what + last) from None

    def say(self, item: bytes) -> None:
        """Send an item that needs no answer, if there is a connection."""
        self._link.say(item)

    def tell(self) -> None:
        """There is credit to pass on."""
        self._link.flush_soon()

    def forget(self, subscription: Subscription) -> None:
        """It is closed."""
        self._subscriptions.pop(subscription.cid, None)

    def _subscribing(self) -> list[bytes]:
        return [s.subscribing() for s in self._subscriptions.values() if s.opened]

    def _credits(self) -> list[bytes]:
        return [item for s in self._subscriptions.values() if (item := s.crediting()) is not None]

    def _delivered(self, cid: int, messages: list[msgspec.Raw], receipt: str | None) -> None:
        subscription = self._subscriptions.get(cid)
        if subscription is not None and subscription.opened:
            subscription.take(messages, receipt)
            return
        for raw in messages:  # it was closed meanwhile
            unseen = delivered_decoder.decode(raw)
            item = {"op": "release", "message_id": unseen.id, "receipt": unseen.receipt}
            self.say(_json.encode(item))

    def _answered(self, cid: int, reply: Reply) -> None:
        subscription = self._subscriptions.get(cid)
        if subscription is not None and reply.status >= 400:
            subscription.refused(Refused(reply.status, reply.body))


def _fields(
    headers: Mapping[str, Any] | None,
    delay_ms: int,
    priority: int,
    ttl_ms: int | None,
    group_id: str | None,
) -> dict[str, Any]:
    given = {"headers": headers, "delay_ms": delay_ms, "priority": priority, "ttl_ms": ttl_ms,
             "group_id": group_id}  # fmt: skip
    return {name: value for name, value in given.items() if value}


def _base(url: str) -> str:
    url = url.strip().rstrip("/")
    return url if "://" in url else f"http://{url}"
