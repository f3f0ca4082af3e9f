"""What clients ask of a partition's owner, as data: the api makes them, any node forwards them.

An operation names one queue or messages of one partition. It travels to the owner as it is, and the
`Answer` comes back as it is: a status and the JSON that the client gets, so that a node in between
neither reads nor builds anything.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from message_queue.core.messages import Count, PartitionId

MAX_BATCH: Final = 1000
MAX_RUNS: Final = 64
MAX_ANSWER_BYTES: Final = 4 << 20
"""Of bodies, about: a consumer that asked for more gets fewer messages, but one at least."""
MAX_WAIT_MS: Final = 20_000
MAX_VISIBILITY_MS: Final = 12 * 3600 * 1000
MAX_DELAY_MS: Final = 90 * 24 * 3600 * 1000
MAX_LIFETIME_MS: Final = 10 * 365 * 24 * 3600 * 1000

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Dot = Annotated[int, Meta(ge=0)]
"""A message within its partition, packed by `ids.pack_dot`."""


class NewMessage(Struct, frozen=True, array_like=True):
    """A message to be stored. `body` and `headers` are JSON texts."""

    body: bytes
    headers: bytes | None = None
    delay_ms: Annotated[int, Meta(ge=0, le=MAX_DELAY_MS)] = 0
    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    ttl_ms: Annotated[int, Meta(ge=0, le=MAX_LIFETIME_MS)] = 0
    """0: no limit of its own."""
    dedupe_id: Name | None = None
    group_id: Name | None = None
    origin: bytes | None = None
    """A dead letter's (or a redriven one's) past, as JSON members."""
    moved: bool = False
    """The service itself moves it: `dedupe_id` is the service's, no client's."""


class Produce(Struct, frozen=True, array_like=True, tag=1):
    """Store messages, all or none."""

    queue: Name
    messages: Annotated[tuple[NewMessage, ...], Meta(min_length=1, max_length=MAX_BATCH)]
    batch: bool = False
    """Whether the client sent `messages` (and gets `ids`)."""


class Consume(Struct, frozen=True, array_like=True, tag=2):
    """Lease up to `most` messages, waiting `wait_ms` for the first."""

    queue: Name
    most: Annotated[int, Meta(ge=1, le=MAX_BATCH)] = 1
    batch: bool = False
    """Whether the client gave `max` (and gets `messages`)."""
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0
    visibility_ms: Annotated[int, Meta(ge=0, le=MAX_VISIBILITY_MS)] | None = None


class Settle(Struct, frozen=True, array_like=True, tag=3):
    """Acknowledge messages of one partition. The answer's body is a `Results`."""

    partition: PartitionId
    dots: Annotated[tuple[Dot, ...], Meta(min_length=1, max_length=MAX_BATCH)]
    receipts: tuple[str | None, ...]
    """One for each dot."""


class Nack(Struct, frozen=True, array_like=True, tag=4):
    """Give a message back."""

    partition: PartitionId
    dot: Dot
    receipt: str | None = None
    delay_ms: Annotated[int, Meta(ge=0, le=MAX_DELAY_MS)] = 0
    unseen: bool = False
    """Fetched ahead and never shown to anybody: it goes back as if it had not been delivered, and
    does not count as an attempt. Needs the receipt."""


class Extend(Struct, frozen=True, array_like=True, tag=5):
    """Lengthen (or, with 0, end) a lease."""

    partition: PartitionId
    dot: Dot
    receipt: str | None
    visibility_ms: Annotated[int, Meta(ge=0, le=MAX_VISIBILITY_MS)]


class Show(Struct, frozen=True, array_like=True, tag=6):
    """The figures of one queue."""

    queue: Name


class Peek(Struct, frozen=True, array_like=True, tag=7):
    """Browse ready messages without leasing them."""

    queue: Name
    most: Annotated[int, Meta(ge=1, le=MAX_BATCH)] = 1


class Configure(Struct, frozen=True, array_like=True, tag=8):
    """Change settings; `changes` is the client's JSON object, already checked."""

    queue: Name
    changes: bytes


class Purge(Struct, frozen=True, array_like=True, tag=9):
    """End every message of a queue; with `delete`, forget its settings too."""

    queue: Name
    delete: bool = False


class Redrive(Struct, frozen=True, array_like=True, tag=10):
    """Send the dead letters in `queue` back to where they came from; only those of `source`,
    when it is given."""

    queue: Name
    source: Name | None = None
    most: Annotated[int, Meta(ge=1)] | None = None
    """None: all that are there."""


class ListQueues(Struct, frozen=True, array_like=True, tag=11):
    """The queues of all partitions that this node owns."""


class ChangeRing(Struct, frozen=True, array_like=True, tag=12):
    """Let a node into the ring, or out of it. ``id``: of a joiner that asks for itself."""

    join: bool
    addr: Name
    id: Annotated[str, Meta(max_length=256)] = ""


class Run(Struct, frozen=True, array_like=True):
    """Messages of one partition that follow each other, delivered together under one receipt."""

    first: Annotated[int, Meta(ge=1)]
    """The first one's dot."""
    count: Annotated[int, Meta(ge=1, le=MAX_BATCH)]
    receipt: str


class SettleRuns(Struct, frozen=True, array_like=True, tag=13):
    """Acknowledge whole deliveries. The answer's body is a `SettledRuns`."""

    partition: PartitionId
    runs: Annotated[tuple[Run, ...], Meta(min_length=1, max_length=MAX_RUNS)]


Direct = Produce | Settle | SettleRuns | Nack | Extend
"""What is answered in its own time, without anybody standing in line for it."""

Operation = (
    Produce
    | Consume
    | Settle
    | SettleRuns
    | Nack
    | Extend
    | Show
    | Peek
    | Configure
    | Purge
    | Redrive
    | ListQueues
    | ChangeRing
)


class Answer(Struct, frozen=True, array_like=True):
    """What the client gets. `body` is JSON (of `Settle`: a `Results` in msgpack)."""

    status: int
    body: bytes = b""
    retry_after_s: int = 0
    messages: int = 0
    """How many were stored or leased with it, so that nobody on the way has to read the body."""
    receipt: str = ""
    """Of a delivery of several: they may be acked with it, all at once (see `SettleRuns`)."""


class Results(Struct, frozen=True, array_like=True):
    """One status per dot of a `Settle`: 200, 404 or 409."""

    statuses: tuple[int, ...]


class SettledRuns(Struct, frozen=True, array_like=True):
    """What became of a `SettleRuns`."""

    acknowledged: int
    overtaken: tuple[int, ...]
    """The dots of messages that somebody else was given meanwhile."""
    unknown: tuple[int, ...]
    """Never issued."""


results_decoder: Final = msgspec.msgpack.Decoder(Results)
settled_runs_decoder: Final = msgspec.msgpack.Decoder(SettledRuns)
_json = msgspec.json.Encoder()


def refusal(status: int, error: str, retry_after_s: int = 0, **details: object) -> Answer:
    """An error as clients see it."""
    return Answer(status, _json.encode({"error": error, **details}), retry_after_s)


# --- between nodes ---------------------------------------------------------------------------


IN_ORDER: Final = 1
"""Not before those of the asker for the same partition that were sent before it: if one of them was
refused, this one is refused as well."""
ANEW: Final = 2
"""The asker knows of the refusals, and has all that was refused: from here on in order again."""


class Forward(Struct, frozen=True, array_like=True, tag=101):
    """Do this for a client of mine. `number` is the asker's; the answer carries it back."""

    number: Count
    operation: Operation
    order: Annotated[int, Meta(ge=0, le=ANEW)] = 0


class Forwarded(Struct, frozen=True, array_like=True, tag=102):
    """The answer; None: not the owner (any more), nothing was done."""

    number: Count
    answer: Answer | None


class ForwardEnded(Struct, frozen=True, array_like=True, tag=103):
    """The client of that forward went away: what it waits for, or was leased, goes back."""

    number: Count


NodeMessage = Forward | Forwarded | ForwardEnded


def unknown_outcome(error: str) -> Answer:
    """A refusal after the operation may have begun: a retry can double its effect."""
    return refusal(503, error, retry_after_s=1, definite=False)


def certain_refusal(error: str) -> Answer:
    """A refusal of which nothing was done."""
    return refusal(503, error, retry_after_s=1, definite=True)
