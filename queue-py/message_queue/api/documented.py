"""What successful answers look like, for /openapi.json. Nothing is built from these: bodies are
rendered where they are known (`rendering.py`, the owner); `tests/test_openapi.py` holds the answers
of a running cluster to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from message_queue.api.schemas import Headers

Instant = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
Size = Annotated[int, Meta(ge=0)]


class Created(Struct, forbid_unknown_fields=True):
    """A message is stored; `duplicate`: the id is that of the one that it repeats."""

    id: str
    queue: str
    status: Literal["created"]
    duplicate: Literal[True] = True


class CreatedBatch(Struct, forbid_unknown_fields=True):
    """All messages of a batch are stored. `duplicates`: the places of those that repeat others;
    `duplicate`: all do."""

    ids: list[str]
    queue: str
    status: Literal["created"]
    duplicates: list[Size] = []
    duplicate: bool = False


class Seen(Struct, forbid_unknown_fields=True, kw_only=True):
    """A message that is not leased. A dead letter bears its past as well."""

    id: str
    queue: str
    body: Any
    headers: Headers
    attempt: Size
    enqueued_at: Instant
    source_id: str = ""
    source: str = ""
    reason: str = ""
    deliveries: Size = 0
    priority: Size = 0
    group_id: str = ""


class Delivery(Seen, forbid_unknown_fields=True, kw_only=True):
    """A message that is leased."""

    attempt: Annotated[int, Meta(ge=1)]
    receipt: str


class Deliveries(Struct, forbid_unknown_fields=True):
    """Several of them (`max` was given)."""

    messages: list[Delivery]


class Browsed(Struct, forbid_unknown_fields=True):
    """Ready messages in the order of delivery."""

    messages: list[Seen]


class Acknowledged(Struct, forbid_unknown_fields=True):
    """Gone for ever."""

    status: Literal["acknowledged"]


class Settled(Struct, forbid_unknown_fields=True):
    """What became of one id of a batch."""

    message_id: str
    status: Literal["acknowledged", "not found", "overtaken"]


class SettledBatch(Struct, forbid_unknown_fields=True):
    """In the order of `message_ids`."""

    results: list[Settled]


class Returned(Struct, forbid_unknown_fields=True):
    """Given back."""

    status: Literal["returned"]


class Extended(Struct, forbid_unknown_fields=True):
    """Leased for longer."""

    status: Literal["extended"]


class InForce(Struct, forbid_unknown_fields=True):
    """The settings of a queue; null: no limit, or no dead letter queue."""

    visibility_ms: Size
    max_deliveries: Size | None
    dead_letter: str | None
    retention_ms: Size | None
    max_length: Size | None


class Configured(Struct, forbid_unknown_fields=True):
    """As they are from now on."""

    queue: str
    settings: InForce


class QueueFigures(Struct, forbid_unknown_fields=True):
    """`dead`: messages in its dead letter queue. `oldest_age_ms`: null of an empty queue."""

    queue: str
    ready: Size
    in_flight: Size
    delayed: Size
    dead: Size
    oldest_age_ms: Size | None
    bytes: Size
    waiting_consumers: Size
    partition: Size
    settings: InForce
    owner: str | None
    replicas: list[str]
    epoch: Size


class QueueList(Struct, forbid_unknown_fields=True):
    """`complete`: false while an owner cannot be asked."""

    queues: list[QueueFigures]
    complete: bool


class Purged(Struct, forbid_unknown_fields=True):
    """`messages`: how many ended."""

    status: Literal["purged", "deleted"]
    queue: str
    messages: Size


class Redriven(Struct, forbid_unknown_fields=True):
    """`queue`: where the letters lay; `status` `redriving`: it goes on after the answer."""

    status: Literal["redriven", "redriving"]
    queue: str
    messages: Size
    remaining: Size


class RingChange(Struct, forbid_unknown_fields=True):
    """A change under way; `moved` of `partitions` are in place."""

    kind: Literal["join", "leave"]
    position: Size
    addr: str
    moved: Size
    partitions: Size


class RingNode(Struct, forbid_unknown_fields=True):
    """`owned`: partitions."""

    position: Size
    id: str | None
    addr: str
    state: Literal["member", "joining", "leaving"]
    owned: Size


class Placement(Struct, forbid_unknown_fields=True):
    """`owner` null: nobody, for the moment."""

    partition: Size
    owner: str | None
    replicas: list[str]
    epoch: Size


class Ring(Struct, forbid_unknown_fields=True):
    """`partitions`: all 64, or the one of `queue`."""

    version: Size
    virtual_nodes: Size
    replication_factor: Size
    change: RingChange | None
    nodes: list[RingNode]
    partitions: list[Placement]
    queue: str = ""


class RingAnswer(Struct, forbid_unknown_fields=True):
    """`version`: of the ring that the change has made; it is done when that is passed."""

    status: Literal["joining", "leaving", "member", "left"]
    addr: str
    position: Size | None
    version: Size


class Alive(Struct, forbid_unknown_fields=True):
    """The process answers."""

    status: Literal["alive"]


class Ready(Struct, forbid_unknown_fields=True):
    """Every partition has an owner, as far as this node knows."""

    status: Literal["ready"]


class Error(Struct):
    """Of every status from 400 on; details beside it. `definite` false: it may have been done.
    With `Accept: application/problem+json`, RFC 9457."""

    error: str
    definite: bool = True
