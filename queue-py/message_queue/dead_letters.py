"""Moves between queues of different partitions: to the dead letter queue, and back from it.

A message is stored at its target before it is removed at its source, so a crash in between leaves
two, never none. The second attempt repeats the dedupe id of the first, so that, within the dedupe
window, there is only one after all.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.model import Entry, Verdict
from message_queue.core.ids import message_id
from message_queue.core.operations import Answer, NewMessage, Produce, Redrive, refusal

if TYPE_CHECKING:
    from message_queue.hosting import Host

log = logging.getLogger(__name__)

_RETRY_S = (0.1, 5.0)
_AT_ONCE = 100
_json = msgspec.json.Encoder()


class Origin(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dead letter's past, as its consumer sees it."""

    source_id: str
    source: str
    reason: str
    deliveries: int = 0
    priority: int = 0
    group_id: str | None = None


_decoder = msgspec.json.Decoder(Origin)


async def bury(host: Host, entry: Entry) -> None:
    """Store an exhausted message at its dead letter queue, then end it here. Tried until done, or
    until the ownership ends (then the next owner finds it exhausted again)."""
    retry_s = _RETRY_S[0]
    source_id = message_id(host.partition, entry.dot)
    origin = Origin(
        source_id, entry.queue, "max_deliveries", entry.attempt, entry.priority, entry.group
    )
    # A consumer that was too slow may still ack it: then it is no dead letter.
    while not host.ended and entry.state is not State.GONE:
        target = host.owner.delivery.settings(entry.queue).dead_letter
        bodies = await host.bodies([entry])
        if bodies is not None and target is not None:
            letter = NewMessage(
                bodies[0],
                entry.headers,
                dedupe_id=f"dead/{source_id}",
                origin=_json.encode(origin)[1:-1],
            )
            answer = await host.around.ask(Produce(target, (letter,)))
            if answer.status in (200, 201):
                break
            log.warning("dead letter %s not stored yet: %d", source_id, answer.status)
        await asyncio.sleep(retry_s)
        retry_s = min(retry_s * 2, _RETRY_S[1])
    if not host.ended and entry.state is not State.GONE:
        host.metrics.dead_lettered += 1
        host.owner.remove([entry.dot])
        host.after()


async def redrive(host: Host, op: Redrive) -> Answer:
    """Send up to `most` dead letters back. What is under way is not delivered meanwhile."""
    if op.queue in host.redriving:
        return refusal(409, "A redrive is under way", queue=op.queue)
    host.redriving.add(op.queue)
    try:
        moved = await _redrive(host, op)
    finally:
        host.redriving.discard(op.queue)
    left = host.owner.delivery.length(op.queue)
    body = {"status": "redriven", "queue": op.queue, "messages": moved, "remaining": left}
    return Answer(200, _json.encode(body))


async def _redrive(host: Host, op: Redrive) -> int:
    by_source: dict[str, list[tuple[Entry, Origin]]] = {}
    for entry in host.owner.delivery.browse(op.queue, op.most):
        origin = _origin(entry)
        if origin is not None and op.source in (None, origin.source):
            by_source.setdefault(origin.source, []).append((entry, origin))
    moved = 0
    for source, letters in by_source.items():
        for start in range(0, len(letters), _AT_ONCE):
            moved += await _send_back(host, source, letters[start : start + _AT_ONCE])
    return moved


async def _send_back(host: Host, source: str, letters: list[tuple[Entry, Origin]]) -> int:
    delivery = host.owner.delivery
    # A consumer may have taken one since it was looked at: it keeps it.
    taken = [
        (entry, origin)
        for entry, origin in letters
        if entry.dot in delivery.ready_only([entry.dot])
        and delivery.settle(entry.dot, None) is Verdict.DONE
    ]
    if not taken or host.ended:
        return 0
    dots = [entry.dot for entry, _ in taken]
    stored = False
    try:
        bodies = await host.bodies([entry for entry, _ in taken])
        if bodies is not None:
            messages = tuple(
                NewMessage(
                    body,
                    entry.headers,
                    priority=origin.priority,
                    dedupe_id=f"redrive/{message_id(host.partition, entry.dot)}",
                    group_id=origin.group_id,
                )
                for (entry, origin), body in zip(taken, bodies, strict=True)
            )
            answer = await host.around.ask(Produce(source, messages, batch=True))
            stored = answer.status in (200, 201)
    finally:
        if not host.ended:
            if stored:
                host.owner.remove(dots)
            else:
                for dot in dots:
                    delivery.unsettle(dot, host.around.cluster_ms())
            host.after()
    return len(taken) if stored else 0


def _origin(entry: Entry) -> Origin | None:
    """A dead letter's past; None for a message that was put here by somebody else."""
    if entry.origin is None:
        return None
    try:
        return _decoder.decode(b"{" + entry.origin + b"}")
    except msgspec.MsgspecError:
        return None
