"""What one node remembers of one key, of one client call, and of one home."""

from collections import deque

from mesi_cache.core.cache.table import State
from mesi_cache.core.records import ABSENT, Once, Operation, Outcome, Record

NEVER = float("inf")


class Call:
    """One client's read (`operation` None) or change, from submission to its single answer."""

    __slots__ = (
        "deadline_ms", "done", "joined_ms", "key", "missed", "once", "operation", "operation_id",
        "sent", "token",
    )  # fmt: skip

    def __init__(
        self,
        token: int,
        key: str,
        operation: Operation | None,
        operation_id: int,
        joined_ms: float,
        deadline_ms: float,
        once: Once | None = None,
    ) -> None:
        self.token = token
        self.key = key
        self.operation = operation
        self.operation_id = operation_id
        self.joined_ms = joined_ms
        self.deadline_ms = deadline_ms
        self.once = once  # only the home knows whether that has happened
        self.missed = False  # it waited for a message, so it is no hit
        self.sent = False  # a home may know of it, so giving up leaves the outcome open
        self.done = False


class Request:
    """One GetS or GetM on its way. Invariant: a line has at most one."""

    __slots__ = ("call", "cutoff_token", "first_ms", "first_token", "id", "killed")

    def __init__(self, id: int, call: Call | None, first_ms: float, first_token: int) -> None:
        self.id = id
        self.call = call  # the change that a GetM carries
        self.first_ms = first_ms  # leases count from here, however often it is sent again
        self.first_token = first_token  # calls below it waited before it was sent
        self.killed = 0  # grants at or below this number are dead
        self.cutoff_token: float = NEVER  # calls from here on joined after the data was dead


class Change:
    """An owner's change that its home has not yet acknowledged.

    Invariant: in `Line.changes` the versions are consecutive, from the line's own version + 1.
    """

    __slots__ = ("call", "followers", "outcome", "record", "stop_ms")

    def __init__(self, call: Call, outcome: Outcome, record: Record, stop_ms: float) -> None:
        self.call = call
        self.outcome = outcome
        self.record = record
        self.stop_ms = stop_ms  # as Line.stop_ms, once it is the line's value
        # Calls that changed nothing because of `record` (a failed CAS): they have seen it, so their
        # answers wait until it is safe.
        self.followers: list[tuple[Call, Outcome]] = []


class Session:
    """The lease that all copies from one home share, renewed by one message."""

    __slots__ = ("epoch", "lines", "renew_sent", "renewing", "until_ms", "waiting")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch  # of the home; a restarted home begins another session
        self.until_ms = 0.0
        self.lines = 0  # how many slots it keeps alive
        self.renewing: dict[int, float] = {}  # request -> when it was sent
        self.renew_sent = -NEVER
        self.waiting: dict[str, None] = {}  # keys with calls that wait for the renewal


class Line:
    """One key on one node. It holds a slot exactly in the states of `table.READABLE`."""

    __slots__ = (
        "changes", "home", "key", "number", "put_until_ms", "record", "request", "session", "state",
        "stop_ms", "until_ms", "uses", "waiting",
    )  # fmt: skip

    def __init__(self, key: str, home: str, session: Session) -> None:
        self.key = key
        self.home = home
        self.session = session
        self.state = State.I
        self.record = ABSENT  # acknowledged by the home: safe to show
        self.number = 0  # of the grant (or of the fetch that left a shared copy)
        self.until_ms = 0.0  # the grant's own lease; the session may reach further
        self.stop_ms = NEVER  # the value's own deadline, early
        self.put_until_ms = 0.0
        self.uses = 0  # S3-FIFO's count
        self.changes: deque[Change] = deque()  # logged in this order, or not at all
        self.request: Request | None = None
        self.waiting: deque[Call] = deque()

    def alive(self, now_ms: float) -> bool:
        """May the copy be shown at `now_ms`? (The state must be a readable one.)"""
        return now_ms < self.stop_ms and (now_ms < self.until_ms or now_ms < self.session.until_ms)

    def lease_left_ms(self, now_ms: float) -> float:
        """How long the copy may be shown without a word from its home; 0: it may not."""
        until = min(self.stop_ms, max(self.until_ms, self.session.until_ms))
        return max(0.0, until - now_ms)
