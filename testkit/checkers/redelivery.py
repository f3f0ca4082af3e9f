"""Why a message was delivered again: the causes that an at-least-once queue may have.

```
 lease ran out   the second delivery can have come a whole visibility timeout after the first began
 given back      a nack that was not refused came between them
 owner changed   their receipts name different owners' epochs: leases are forgotten with an owner
 stored twice    the produce was sent again without a dedupe id after an unknown outcome (other ids)
```

An ack of unknown outcome is no cause of its own: until its lease runs out or the owner changes, the
message is either acked or leased. What fits none of these is a defect of the queue.

Receipts are "EPOCH.ATTEMPT" (``receipt`` in a delivery; histories without them are judged by time
alone). They also say what cannot be: two deliveries under one receipt, attempts that go back, and
an owner that delivers after its successor has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from testkit.history import Operation

DEFAULT_VISIBILITY_MS: Final = 30_000
LEASE: Final = "lease ran out"
NACK: Final = "given back"
OWNER: Final = "owner changed"
TWICE: Final = "stored twice"
UNEXPLAINED: Final = "unexplained"
CAUSES: Final = frozenset({LEASE, NACK, OWNER, TWICE})


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message in the answer of one consume."""

    operation: Operation
    id: str
    receipt: str | None = None

    @property
    def place(self) -> tuple[int, int] | None:
        """(the owner's epoch, attempt)."""
        epoch, _, attempt = (self.receipt or "").partition(".")
        return (int(epoch), int(attempt)) if epoch.isdigit() and attempt.isdigit() else None


def in_order(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """As the queue made them, if receipts tell; else as clients saw them."""
    if all(delivery.place is not None for delivery in deliveries):
        return sorted(deliveries, key=lambda delivery: delivery.place or (0, 0))
    return sorted(deliveries, key=lambda delivery: delivery.operation.completed_us or 0)


def impossible(deliveries: Sequence[Delivery]) -> tuple[str, Delivery, Delivery] | None:
    """Two deliveries of one message (one id) that no queue with one owner at a time can make."""
    for first, second in pairwise(in_order(deliveries)):
        if first.place is None or second.place is None:
            continue
        if first.place == second.place:
            return f"delivered twice under receipt {first.receipt}", first, second
        if (second.operation.completed_us or 0) < first.operation.invoked_us:
            return f"receipt {first.receipt} was given after {second.receipt}", first, second
    return None


def cause(
    first: Delivery, second: Delivery, nacks: Sequence[Operation], slack_ms: float = 0.0
) -> str:
    """Why the second came. ``slack_ms``: how far the queue's own clock may jump ahead."""
    one, other = first.operation, second.operation
    for nack in nacks:
        if (
            nack.status != "fail"
            and nack.invoked_us < (other.completed_us or 0)
            and (nack.completed_us is None or nack.completed_us > one.invoked_us)
        ):
            return NACK
    if may_precede(one, other, slack_ms):
        return LEASE
    if first.place is None or second.place is None:
        return LEASE if may_precede(other, one, slack_ms) else UNEXPLAINED
    return OWNER if first.place[0] != second.place[0] else UNEXPLAINED


def may_precede(one: Operation, other: Operation, slack_ms: float = 0.0) -> bool:
    """Could ``other`` have been delivered after the lease of ``one`` ran out? A lease begins no
    sooner than its consume was invoked; a delivery happens no later than its consume completed."""
    argument = one.argument if isinstance(one.argument, dict) else {}
    visibility_ms: float = argument.get("visibility_ms", DEFAULT_VISIBILITY_MS)
    return (other.completed_us or 0) >= one.invoked_us + (visibility_ms - slack_ms) * 1000
