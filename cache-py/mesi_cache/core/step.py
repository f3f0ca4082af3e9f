"""One turn of the machine: when it happens, and everything that must happen because of it."""

import msgspec

from mesi_cache.core.messages import Message
from mesi_cache.core.records import Once, Outcome, Record


class Logged(msgspec.Struct, frozen=True, array_like=True):
    """One line of the home's write log: a change, and the operation that caused it.

    `record` is None where nothing changed and yet the outcome has to survive a restart, because a
    client has given the operation a name by which it may be asked for again.
    """

    key: str
    record: Record | None
    source: str = ""  # whose operation; "": the home's own decision (a deadline ran out)
    operation_id: int = 0
    floor: int = 0
    outcome: Outcome | None = None
    once: Once | None = None  # the client's own name for it
    once_until_ms: int = 0  # wall clock: how long that name is remembered


class Found(msgspec.Struct, frozen=True):
    """A read's answer. `hit`: no message was needed."""

    value: bytes
    version: int
    state: str
    hit: bool
    expires_ms: int = 0  # of the record: 0 never


class Missing(msgspec.Struct, frozen=True):
    """A read's answer: the key holds no value."""


class Changed(msgspec.Struct, frozen=True):
    """The answer to an operation, whether or not it changed anything: see its outcome."""

    outcome: Outcome


class Unavailable(msgspec.Struct, frozen=True):
    """No answer in time. `definite`: nothing happened and nothing will."""

    definite: bool
    reason: str


Answer = Found | Missing | Changed | Unavailable


class Transition(msgspec.Struct, frozen=True):
    """A line's state changed, for the log. `origin`: the name of who caused it; "": this node."""

    key: str
    before: str
    after: str
    event: str
    origin: str


class Step:
    """The effects of one or several inputs, in the order in which they must be carried out.

    1. `log`: append to the home's log. Until the log holds it as durably as the flags say, nothing
       below may leave this node: a sent grant or an answer proves that the change exists.
    2. `send`: to members; a message to this member itself comes back in as an input, after 1.
    3. `answers`: to waiting clients.
    4. `load`: keys to read from main memory; the record comes back in through `loaded`.
    5. `notes`: for people.
    """

    __slots__ = ("answers", "load", "log", "notes", "now_ms", "send", "wall_ms")

    def __init__(self, now_ms: float, wall_ms: float) -> None:
        self.now_ms = now_ms  # monotonic, counts suspended time
        self.wall_ms = wall_ms  # only for deadlines that clients set
        self.log: list[Logged] = []
        self.send: list[tuple[str, Message]] = []
        self.answers: list[tuple[int, Answer]] = []
        self.load: list[str] = []
        self.notes: list[Transition] = []
