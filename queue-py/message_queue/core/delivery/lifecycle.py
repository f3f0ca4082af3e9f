"""A message's life at its owner, as a table. Every change of state goes through it.

```
            stored                 delay ends / group's turn
  (nothing) ──────▶ DELAYED ───────────────────────────────▶ READY ◀─────────────┐
      │                ▲                                     │   ▲               │
      │                │ nack with delay                taken│   │lease ends,    │the settling
      ├──────▶ BEHIND ─┼──▶ (READY or DELAYED)               ▼   │nack           │was refused
      │     (its group │                                   LEASED┘               │
      │      is busy)  └─────────────────────────────────────┤                   │
      │                                                      │ack, dead letter   │
      └──────▶ READY          ack, ttl, purge: from anywhere ▼                   │
                                                          SETTLING ──────────────┘
                                                             │ its end is stored on a majority
                                                             ▼
                                                           GONE
```
"""

from __future__ import annotations

from enum import IntEnum


class State(IntEnum):
    """Where a message stands. The owner's memory only: what is durable is stored or gone."""

    BEHIND = 0
    """An earlier message of its group has not left yet."""
    DELAYED = 1
    READY = 2
    LEASED = 3
    SETTLING = 4
    """Its end (ack, expiry, dead letter, purge) was decided and is being made durable."""
    GONE = 5


ALLOWED: dict[State, frozenset[State]] = {
    State.BEHIND: frozenset({State.DELAYED, State.READY, State.SETTLING}),
    State.DELAYED: frozenset({State.DELAYED, State.READY, State.SETTLING}),
    State.READY: frozenset({State.DELAYED, State.LEASED, State.SETTLING}),
    State.LEASED: frozenset({State.LEASED, State.DELAYED, State.READY, State.SETTLING}),
    State.SETTLING: frozenset({State.READY, State.LEASED, State.DELAYED, State.BEHIND, State.GONE}),
    State.GONE: frozenset(),
}
"""From each state, the states that may follow. A record of another node's ack (takeover) goes
through SETTLING like any other."""
