"""What becomes of acks: which messages end with them, and what their clients are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from message_queue.core.delivery.model import Verdict
from message_queue.core.delivery.partition import PartitionDelivery
from message_queue.core.delivery.pending import runs_of
from message_queue.core.operations import Answer, Results, Settle, SettledRuns, SettleRuns

Ending = list[tuple[int, int]]
"""(first, last) of messages that are SETTLING now."""
_msgpack: Final = msgspec.msgpack.Encoder()


def settle(
    delivery: PartitionDelivery, op: Settle, covers: Callable[[int], bool]
) -> tuple[Answer, Ending]:
    """Of messages by their names. `covers`: whether a dot was issued."""
    statuses: list[int] = []
    ending: Ending = []
    for first, last, receipt in runs_of(op.dots, op.receipts):
        for low, high, verdict in delivery.settle_span(first, last, receipt):
            match verdict:
                case Verdict.DONE | Verdict.SETTLING:
                    # One that is settling already is acked once more: it is done when stored.
                    statuses += [200] * (high - low + 1)
                    ending.append((low, high))
                case Verdict.OVERTAKEN:
                    statuses += [409] * (high - low + 1)
                case _:
                    dots = range(low, high + 1)
                    statuses += [200 if covers(dot) else 404 for dot in dots]
    return Answer(200, _msgpack.encode(Results(tuple(statuses)))), ending


def settle_runs(
    delivery: PartitionDelivery, op: SettleRuns, covers: Callable[[int], bool]
) -> tuple[Answer, Ending]:
    """Of whole deliveries."""
    overtaken: list[int] = []
    unknown: list[int] = []
    ending: Ending = []
    total = 0
    for run in op.runs:
        total += run.count
        last = run.first + run.count - 1
        for low, high, verdict in delivery.settle_span(run.first, last, run.receipt):
            match verdict:
                case Verdict.DONE | Verdict.SETTLING:
                    ending.append((low, high))
                case Verdict.OVERTAKEN:
                    overtaken += range(low, high + 1)
                case _:
                    unknown += [dot for dot in range(low, high + 1) if not covers(dot)]
    done = total - len(overtaken) - len(unknown)
    body = _msgpack.encode(SettledRuns(done, tuple(overtaken), tuple(unknown)))
    return Answer(200, body), ending
