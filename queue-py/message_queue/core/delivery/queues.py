"""One queue inside a partition: its line, groups, waiters and counters, and what they say."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import NamedTuple

from message_queue.core.delivery.backlog import Backlog, Card, Shelf
from message_queue.core.delivery.lifecycle import State
from message_queue.core.delivery.line import Line
from message_queue.core.delivery.lots import Lot
from message_queue.core.delivery.model import Counts, Entry, Settings, default_settings

QUEUE_BYTES = 3200
"""About what a queue takes in memory besides its messages (measured)."""
MAX_IDLE_QUEUES = 1000
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
    lots: list[Lot]
    line_head: Entry | None
    backlog: Backlog
    waiters: int
    heads: dict[str, Entry]


class Group:
    """The members of one group in order; `head` is the only one that may be delivered."""

    __slots__ = ("behind", "gone", "head")

    def __init__(self) -> None:
        self.head: Entry | None = None
        self.behind: deque[Entry] = deque()
        self.gone = 0
        """Of these, left before their turn came."""

    def lost_one(self) -> None:
        """One that waits behind the head is gone. A head may stay for months: amortised O(1)."""
        self.gone += 1
        if self.gone > len(self.behind) // 2 + 64:
            self.behind = deque(e for e in self.behind if e.state is not State.GONE)
            self.gone = 0


class Queue:
    __slots__ = (
        "arrivals",
        "backlog",
        "bytes",
        "configured",
        "counts",
        "groups",
        "line",
        "name",
        "recalled",
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
        self.recalled: deque[Entry] = deque()
        """Entries that came out of the backlog; both deques are in the order of dots, nearly."""
        self.backlog = Backlog()

    @property
    def held(self) -> int:
        return sum(self.counts) + self.backlog.held

    def entries(self) -> Iterator[Entry]:
        """All that have an object, ended ones too."""
        yield from self.arrivals
        yield from self.recalled

    def tidy(self) -> None:
        """Something is gone. Amortised O(1)."""
        for deque_ in (self.arrivals, self.recalled):
            while deque_ and deque_[0].state is State.GONE:
                deque_.popleft()
        held = sum(self.counts)
        if len(self.arrivals) + len(self.recalled) > 2 * held + 64:
            self.arrivals = deque(e for e in self.arrivals if e.state is not State.GONE)
            self.recalled = deque(e for e in self.recalled if e.state is not State.GONE)
            self.line.trim(held)

    def figures(self, oldest_waiting_ms: int | None) -> Counts:
        """For those who ask about the queue. `oldest_waiting_ms`: when the oldest message of the
        backlog was enqueued."""
        at = self.counts
        oldest = [d[0].enqueued_ms for d in (self.arrivals, self.recalled) if d]
        if oldest_waiting_ms is not None:
            oldest.append(oldest_waiting_ms)
        return Counts(
            ready=at[State.READY] + at[State.BEHIND] + self.backlog.count,
            in_flight=at[State.LEASED] + at[State.SETTLING] + self.backlog.ending,
            delayed=at[State.DELAYED],
            bytes=self.bytes + self.backlog.bytes + self.backlog.ending_bytes,
            oldest_ms=min(oldest, default=None),
            waiters=len(self.waiters),
        )

    def exhausted(self, entry: Entry) -> bool:
        """Whether one more delivery of `entry` would be too many."""
        most = self.settings.max_deliveries
        # Without a place for dead letters a message is delivered on: nothing is ever dropped.
        return most is not None and entry.seen >= most and bool(self.settings.dead_letter)

    def expires_ms(self, entry: Entry) -> int:
        """When its lifetime ends, by its own ttl or the queue's retention; 0: never."""
        if self.settings.retention_ms is None:
            return entry.expires_ms
        kept_until = entry.enqueued_ms + self.settings.retention_ms
        return min(entry.expires_ms, kept_until) if entry.expires_ms else kept_until

    def expired(self, entry: Entry, now_ms: int) -> bool:
        expires_ms = self.expires_ms(entry)
        return bool(expires_ms) and expires_ms <= now_ms


class QueueBook:
    """The queues of a partition by name, and what is asked about them."""

    def __init__(self, shelf: Shelf | None) -> None:
        self.shelf = shelf
        """None: every message has an `Entry`."""
        self._queues: dict[str, Queue] = {}

    def queue_names(self) -> list[str]:
        """Queues that were configured, hold a message or held one in this epoch."""
        return [q.name for q in self._queues.values() if q.configured or q.used]

    def exists(self, queue_name: str) -> bool:
        """Whether `queue_names` has it. O(1)."""
        queue = self._queues.get(queue_name)
        return queue is not None and (queue.configured or queue.used)

    def settings(self, queue_name: str) -> Settings:
        """In force for a queue, whether it exists or not."""
        queue = self._queues.get(queue_name)
        return queue.settings if queue else default_settings(queue_name)

    def length(self, queue_name: str) -> int:
        """Messages held, whatever their state. O(1)."""
        queue = self._queues.get(queue_name)
        return queue.held if queue else 0

    def counts(self, queue_name: str) -> Counts:
        """Figures of a queue, zeros for one that does not exist."""
        queue = self._queues.get(queue_name)
        if queue is None:
            return Counts(0, 0, 0, 0, None, 0)
        oldest = queue.backlog.oldest()
        card = self.card(oldest) if oldest is not None else None
        return queue.figures(card.enqueued_ms if card is not None else None)

    def card(self, dot: int) -> Card | None:
        """What the shelf says."""
        return self.shelf.card(dot) if self.shelf is not None else None

    def _queue(self, name: str) -> Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = Queue(name)
        return queue

    def _drop_if_idle(self, queue: Queue) -> None:
        """A queue that nobody configured, used or waits for leaves no trace."""
        if not (queue.used or queue.waiters or queue.configured):
            self._queues.pop(queue.name, None)
