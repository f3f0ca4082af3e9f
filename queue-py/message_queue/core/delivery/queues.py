"""One queue inside a partition: its line, groups, waiters and counters, and what they say."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.line import Line
from message_queue.core.delivery.model import Counts, Entry, default_settings

MAX_IDLE_QUEUES = 10_000
"""Of one partition; beyond it, queues that fall empty are forgotten at once."""


class Waiter(NamedTuple):
    """A consumer in a long poll."""

    token: int
    most: int
    visibility_ms: int | None


class QueueView(NamedTuple):
    """A queue laid open, for `invariants.check`."""

    name: str
    counts: list[int]
    bytes: int
    members: list[Entry]
    line_head: Entry | None
    waiters: int
    heads: dict[str, Entry]


class Group:
    """The members of one group in order; `head` is the only one that may be delivered."""

    __slots__ = ("behind", "head")

    def __init__(self) -> None:
        self.head: Entry | None = None
        self.behind: deque[Entry] = deque()


class Queue:
    __slots__ = (
        "arrivals",
        "bytes",
        "configured",
        "counts",
        "groups",
        "line",
        "name",
        "settings",
        "used",
        "waiters",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings = default_settings(name)
        self.configured = False
        self.used = False
        """It held a message in this epoch: it stays listed, empty or not."""
        self.line = Line()
        self.counts = [0] * len(State)
        self.bytes = 0
        self.groups: dict[str, Group] = {}
        self.waiters: OrderedDict[int, Waiter] = OrderedDict()
        self.arrivals: deque[Entry] = deque()

    @property
    def held(self) -> int:
        return sum(self.counts)

    def figures(self) -> Counts:
        """For those who ask about the queue."""
        at = self.counts
        return Counts(
            ready=at[State.READY] + at[State.BEHIND],
            in_flight=at[State.LEASED] + at[State.SETTLING],
            delayed=at[State.DELAYED],
            bytes=self.bytes,
            oldest_ms=self.arrivals[0].enqueued_ms if self.arrivals else None,
            waiters=len(self.waiters),
        )

    def exhausted(self, entry: Entry) -> bool:
        """Whether one more delivery of `entry` would be too many."""
        most = self.settings.max_deliveries
        # Without a place for dead letters a message is delivered on: nothing is ever dropped.
        return most is not None and entry.attempt >= most and bool(self.settings.dead_letter)

    def expires_ms(self, entry: Entry) -> int:
        """When its lifetime ends, by its own ttl or the queue's retention; 0: never."""
        if self.settings.retention_ms is None:
            return entry.expires_ms
        kept_until = entry.enqueued_ms + self.settings.retention_ms
        return min(entry.expires_ms, kept_until) if entry.expires_ms else kept_until

    def expired(self, entry: Entry, now_ms: int) -> bool:
        expires_ms = self.expires_ms(entry)
        return bool(expires_ms) and expires_ms <= now_ms
