"""What the home remembers of one key while any cache holds it or asks for it."""

from mesi_cache.core.directory.table import State
from mesi_cache.core.messages import GetM, GetS
from mesi_cache.core.records import ABSENT, Outcome, Record


class Copy:
    """A copy granted to one member. Invariant: the member holds no copy under a higher number."""

    __slots__ = ("incarnation", "number", "request", "state", "until_ms")

    def __init__(
        self, number: int, until_ms: float, incarnation: int, request: int, state: str
    ) -> None:
        self.number = number
        self.until_ms = until_ms  # of the grant alone; a renewal may reach further
        self.incarnation = incarnation  # of the member; a restart leaves it without copies
        self.request = request  # that it answered
        self.state = state  # as granted: S, E or M


class Asked:
    """A request in the queue or under way."""

    __slots__ = ("incarnation", "message", "result", "source")

    def __init__(self, source: str, incarnation: int, message: GetS | GetM) -> None:
        self.source = source
        self.incarnation = incarnation
        self.message = message
        self.result: tuple[Outcome, Record | None] | None = None  # of a GetM, once worked out


class Entry:
    """Invariants: EM has exactly one copy, S at least one, U none; a BUSY entry has a current
    request; `waits` names only members with copies; `queue` holds at most one request a member."""

    __slots__ = ("copies", "current", "key", "number", "queue", "record", "state", "waits")

    def __init__(self, key: str) -> None:
        self.key = key
        self.state = State.N
        self.record: Record = ABSENT  # what the log says; meaningless in N and BUSY_LOAD
        self.copies: dict[str, Copy] = {}
        self.current: Asked | None = None
        self.queue: dict[str, Asked] = {}  # in order of arrival
        self.number = 0  # of the invalidations or the fetch under way
        self.waits: dict[str, float] = {}  # member -> when its lease is over
