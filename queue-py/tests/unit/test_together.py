"""The client acks a whole delivery in a word if it is done in one turn of the loop, else singly."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from message_queue.client_delivery import LeaseLost, Message, Subscription
from message_queue.client_link import Reply


class Client:
    """What a subscription asks of its client."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer = Reply(200, {"status": "acknowledged"})

    async def ask(self, item: dict[str, Any], *, repeatable: bool) -> Reply:
        assert repeatable
        self.asked.append(item)
        await asyncio.sleep(0)
        return self.answer if "delivery" in item else Reply(200, {})

    def say(self, item: bytes) -> None:
        raise AssertionError(item)

    def tell(self) -> None:
        """There is credit to pass on."""

    def forget(self, subscription: Subscription) -> None:
        """It is closed."""


async def delivered(client: Client, count: int, receipt: str | None = "r") -> list[Message]:
    subscription = Subscription(client, 1, "q", 10, 1000)
    fields = {"queue": "q", "attempt": 1, "receipt": "1.1", "enqueued_at": "", "headers": {}}
    raws = [{"id": f"m{n}", "body": n, **fields} for n in range(count)]
    subscription.take([msgspec.Raw(msgspec.json.encode(raw)) for raw in raws], receipt)
    found = [await subscription.next() for _ in range(count)]
    return [message for message in found if message is not None]


async def test_messages_that_are_done_together_are_acked_in_a_word() -> None:
    client = Client()
    await asyncio.gather(*(message.ack() for message in await delivered(client, 5)))
    assert client.asked == [{"op": "ack", "delivery": "r"}]


async def test_whoever_is_done_before_the_others_does_not_wait_for_them() -> None:
    client = Client()
    one, two, three = await delivered(client, 3)
    await one.ack()
    await asyncio.gather(two.ack(), three.ack())
    assert [item["message_id"] for item in client.asked] == ["m0", "m1", "m2"]


async def test_a_message_that_goes_back_leaves_the_others_to_be_acked_one_by_one() -> None:
    client = Client()
    one, two, three = await delivered(client, 3)
    await asyncio.gather(one.ack(), two.nack(), three.ack())
    assert sorted(item["op"] for item in client.asked) == ["ack", "ack", "nack"]
    assert not any("delivery" in item for item in client.asked)


async def test_only_those_that_somebody_else_has_are_lost() -> None:
    client = Client()
    client.answer = Reply(409, {"error": "…", "overtaken": ["m1"], "acknowledged": 2})
    messages = await delivered(client, 3)
    done = await asyncio.gather(*(message.ack() for message in messages), return_exceptions=True)
    assert [type(outcome) for outcome in done] == [type(None), LeaseLost, type(None)]
    assert [message.lost for message in messages] == [False, True, False]
    client.answer = Reply(404, {"error": "Delivery not found"})
    again = await delivered(client, 2)
    done = await asyncio.gather(*(message.ack() for message in again), return_exceptions=True)
    assert [type(outcome) for outcome in done] == [LeaseLost, LeaseLost]


async def test_a_delivery_without_a_receipt_is_acked_one_by_one() -> None:
    client = Client()
    await asyncio.gather(*(message.ack() for message in await delivered(client, 2, None)))
    assert [item["message_id"] for item in client.asked] == ["m0", "m1"]
