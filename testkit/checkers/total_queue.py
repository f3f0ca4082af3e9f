"""At-least-once queues: everything acknowledged is delivered, nothing comes from nowhere.

Kinds (key: the queue):
  produce  argument: the body, or a list of bodies with `batch` True in info; result: the id (ids)
  consume  result: a list of {"id", "body"} (more fields are welcome); argument {"visibility_ms"}
  ack      argument: the message id, or a list of them
  nack     argument: the message id (or list)
Bodies must be unique per produce call, so that a message can be followed whatever its id is. Only
what was left in doubt may be sent again under the same body, with info {"retry": True}; if it bore
a dedupe id all the way (info {"dedupe": True} in each), it must be one message all the same.

Checked: no acknowledged produce is lost (it is acked, or among `leftovers`); nothing unexpected is
delivered; no delivery was asked for after a successful ack completed; no body under two ids; no two
deliveries that contradict each other (`redelivery.impossible`); with `exclusive`, no second
delivery while a lease certainly ran. Duplicates are counted by cause; with `causes`, one that has
none of these is a failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from testkit.checkers.models import freeze
from testkit.checkers.redelivery import (
    CAUSES,
    LEASE,
    NACK,
    OWNER,
    TWICE,
    UNEXPLAINED,
    Delivery,
    cause,
    impossible,
    in_order,
    may_precede,
)
from testkit.checkers.verdict import Verdict
from testkit.history import History, Operation

__all__ = ["CAUSES", "LEASE", "NACK", "OWNER", "TWICE", "UNEXPLAINED", "check", "fifo"]


@dataclass(slots=True)
class _Message:
    """All that happened to one body."""

    produces: list[Operation]
    ids: set[str] = field(default_factory=set)
    deliveries: list[Delivery] = field(default_factory=list)
    acks: list[Operation] = field(default_factory=list)
    nacks: list[Operation] = field(default_factory=list)

    @property
    def produce(self) -> Operation:
        """The produce that stored it, or the first that may have."""
        for status in ("ok", "unknown"):
            for produce in self.produces:
                if produce.status == status:
                    return produce
        return self.produces[0]

    @property
    def may_be_twice(self) -> bool:
        """Two produces without a common dedupe id may each have stored it."""
        possible = [produce for produce in self.produces if produce.status != "fail"]
        return len(possible) > 1 and not all(_says(produce, "dedupe") for produce in possible)

    def seen(self) -> list[Operation]:
        """The consumes that delivered it."""
        return [delivery.operation for delivery in self.deliveries]


def check(
    history: History | Iterable[Operation],
    *,
    leftovers: Iterable[str] | None = (),
    exclusive: bool = False,
    one_id: bool = True,
    causes: Set[str] | None = None,
    slack_ms: float = 0.0,
) -> Verdict:
    """Judge a history. `leftovers`: ids that are still stored at the end (ready, in flight,
    delayed, dead); None if nobody looked, then losses are not judged.

    `exclusive`: leases must hold (no failover and no pause longer than a lease happened).
    `one_id` False allows a body under several ids (dead-lettering gives new ones).
    `causes`: what may explain a second delivery (CAUSES: anything that the guarantees allow); None
    counts without judging. `slack_ms`: how far the queue's own clock may have jumped ahead.
    """
    operations = sorted(history, key=lambda operation: operation.invoked_us)
    messages = _produced(operations)
    by_id: dict[str, _Message] = {}
    for message in messages.values():
        for known in message.ids:
            by_id[known] = message
    for operation in operations:
        if operation.kind == "consume" and operation.status == "ok":
            problem = _delivered(operation, messages, by_id)
            if problem is not None:
                return problem
    for operation in operations:
        if operation.kind in ("ack", "nack"):
            for message_id in _many(operation.argument):
                settled = by_id.get(message_id)
                if settled is not None:
                    (settled.acks if operation.kind == "ack" else settled.nacks).append(operation)
    stored = None if leftovers is None else set(leftovers)
    counts = {"produced": 0, "delivered": 0, "duplicates": 0, "unknown_delivered": 0, "left": 0}
    explained: Counter[str] = Counter()
    for message in messages.values():
        problem = _judge(message, stored, exclusive=exclusive, one_id=one_id)
        problem = problem or _explain(message, causes, slack_ms, explained)
        if problem is not None:
            return problem
        acknowledged = message.produce.status == "ok"
        counts["produced"] += acknowledged
        counts["delivered"] += bool(message.deliveries)
        counts["duplicates"] += max(0, len(message.deliveries) - 1)
        counts["unknown_delivered"] += bool(message.deliveries) and not acknowledged
        counts["left"] += acknowledged and not message.deliveries
    return Verdict(True, "", (), counts | explained)


def _many(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, list | tuple) else [argument]


def _says(operation: Operation, word: str) -> bool:
    return isinstance(operation.info, dict) and operation.info.get(word) is True


def _is_batch(operation: Operation) -> bool:
    return _says(operation, "batch")


def _produced(operations: list[Operation]) -> dict[Any, _Message]:
    messages: dict[Any, _Message] = {}
    for operation in operations:
        if operation.kind != "produce":
            continue
        bodies = operation.argument if _is_batch(operation) else [operation.argument]
        for body in bodies:
            key = (operation.key, freeze(body))
            if key not in messages:
                messages[key] = _Message([operation])
            elif _says(operation, "retry"):
                messages[key].produces.append(operation)
            else:
                raise ValueError(f"body {body!r} was produced twice: the history cannot be judged")
        if operation.status == "ok" and operation.result is not None:
            ids = operation.result if _is_batch(operation) else [operation.result]
            if len(ids) != len(bodies):
                raise ValueError(f"{len(bodies)} bodies, {len(ids)} ids: {operation}")
            for body, message_id in zip(bodies, ids, strict=True):
                messages[operation.key, freeze(body)].ids.add(message_id)
    return messages


def _delivered(
    operation: Operation, messages: dict[Any, _Message], by_id: dict[str, _Message]
) -> Verdict | None:
    window: tuple[Operation, ...]
    for delivery in operation.result or ():
        message = messages.get((operation.key, freeze(delivery["body"])))
        if message is None:
            return Verdict(
                False, f"{delivery['id']} was delivered but never produced", (operation,)
            )
        if message.produce.status == "fail":
            window = (message.produce, operation)
            return Verdict(False, f"{delivery['id']} was refused and yet delivered", window)
        if operation.completed_us is not None and (
            message.produces[0].invoked_us > operation.completed_us
        ):
            window = (operation, message.produces[0])
            return Verdict(False, f"{delivery['id']} was delivered before it was produced", window)
        message.deliveries.append(Delivery(operation, delivery["id"], delivery.get("receipt")))
        message.ids.add(delivery["id"])
        owner = by_id.setdefault(delivery["id"], message)
        if owner is not message:
            window = (owner.produce, message.produce, operation)
            return Verdict(False, f"id {delivery['id']} names two messages", window)
    return None


def _judge(
    message: _Message, stored: set[str] | None, *, exclusive: bool, one_id: bool
) -> Verdict | None:
    produce = message.produce
    window: tuple[Operation, ...]
    if one_id and len(message.ids) > 1 and not message.may_be_twice:
        window = (*message.produces, *message.seen())
        return Verdict(False, f"one message under several ids {sorted(message.ids)}", window)
    acked = any(ack.status != "fail" for ack in message.acks)
    if produce.status == "ok" and not acked and stored is not None and not message.ids & stored:
        window = (produce, *message.seen())
        return Verdict(False, f"stored, never acked, and lost: {sorted(message.ids)}", window)
    done = [ack for ack in message.acks if ack.status == "ok" and ack.completed_us is not None]
    for named in message.ids:
        acks = [ack for ack in done if named in _many(ack.argument)]
        if not acks:
            continue
        first = min(acks, key=lambda ack: ack.completed_us or 0)
        for delivery in message.deliveries:
            late = delivery.operation
            if (
                delivery.id == named
                and first.completed_us is not None
                and late.invoked_us > first.completed_us
            ):
                return Verdict(
                    False, f"{named} was delivered after its ack", (produce, first, late)
                )
        if stored is not None and named in stored:
            return Verdict(False, f"{named} is still stored after its ack", (first,))
    if exclusive:
        return _overlapping(message)
    return None


def _explain(
    message: _Message, causes: Set[str] | None, slack_ms: float, explained: Counter[str]
) -> Verdict | None:
    """Adds the causes of its second, third … deliveries to `explained`."""
    ids = sorted(message.ids)
    for named in ids:
        deliveries = [delivery for delivery in message.deliveries if delivery.id == named]
        odd = impossible(deliveries)
        if odd is not None:
            reason, first, second = odd
            window = (message.produce, first.operation, second.operation)
            return Verdict(False, f"{named}: {reason}", window)
        for first, second in pairwise(in_order(deliveries)):
            why = cause(first, second, _of(message.nacks, named), slack_ms)
            explained[why] += 1
            if causes is not None and why not in causes:
                reason = f"{named} was delivered again ({why}, {first.receipt}, {second.receipt})"
                window = (message.produce, first.operation, second.operation)
                return Verdict(False, reason, window)
    delivered = sum(any(d.id == named for d in message.deliveries) for named in ids)
    if delivered > 1:
        why = TWICE if message.may_be_twice else UNEXPLAINED
        explained[why] += delivered - 1
        if causes is not None and why not in causes:
            reason = f"delivered under {delivered} ids ({why}): {ids}"
            return Verdict(False, reason, (*message.produces, *message.seen()))
    return None


def _of(settling: list[Operation], named: str) -> list[Operation]:
    return [operation for operation in settling if named in _many(operation.argument)]


def _overlapping(message: _Message) -> Verdict | None:
    """Two deliveries, neither of which can have come after the other's lease: two consumers."""
    deliveries = sorted(message.seen(), key=lambda operation: operation.completed_us or 0)
    for first, second in pairwise(deliveries):
        returned = any(
            nack.status != "fail" and nack.invoked_us < (second.completed_us or 0)
            for nack in message.nacks
        )
        if not returned and not may_precede(first, second) and not may_precede(second, first):
            window = (message.produce, first, second)
            return Verdict(False, f"{sorted(message.ids)} leased to two consumers", window)
    return None


def fifo(history: History | Iterable[Operation]) -> Verdict:
    """One producer's messages first reach one consumer in the order they were produced.

    Only for histories without faults and redeliveries, with a single consumer per queue. A produce
    that completed before the next was invoked is ordered before it; a batch is ordered inside.
    """
    operations = sorted(history, key=lambda operation: operation.invoked_us)
    order: dict[tuple[str, str], list[Any]] = {}
    place: dict[Any, tuple[tuple[str, str], int, Operation]] = {}
    for operation in operations:
        if operation.kind == "produce" and operation.status == "ok":
            line = order.setdefault((operation.key, operation.process), [])
            for body in operation.argument if _is_batch(operation) else [operation.argument]:
                place[operation.key, freeze(body)] = (
                    (operation.key, operation.process),
                    len(line),
                    operation,
                )
                line.append(body)
    reached: dict[tuple[str, str], tuple[int, Operation]] = {}
    met: set[Any] = set()
    for operation in sorted(operations, key=lambda each: each.completed_us or 0):
        if operation.kind != "consume" or operation.status != "ok":
            continue
        for delivery in operation.result or ():
            key = (operation.key, freeze(delivery["body"]))
            if key in met or key not in place:
                continue
            met.add(key)
            producer, number, produce = place[key]
            last, earlier = reached.get(producer, (-1, produce))
            if number < last:
                reason = f"{delivery['id']} of {producer[1]} came after a later message"
                return Verdict(False, reason, (produce, earlier, operation))
            reached[producer] = (number, operation)
    return Verdict(True, "", (), {"ordered": len(met)})
