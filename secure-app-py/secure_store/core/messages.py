"""What the two nodes say to each other. One ordered stream per link; a link is never reused.

| who      | message        | means                                                                |
| -------- | -------------- | -------------------------------------------------------------------- |
| primary  | Hello          | who I am, which cluster and epoch, where my log ends                 |
| replica  | Welcome        | where my (durable) log ends; or Refuse with the reason               |
| primary  | Records        | the next part of the log; `durable_seq` is how far my own disk is    |
| primary  | Durable        | my own disk has reached `seq`                                        |
| replica  | Ack            | my disk has reached `durable_seq`; `shown_seq` is on both disks      |
| primary  | InStep         | from now on I acknowledge nothing that you do not hold               |
| primary  | TailRequest    | I restarted and you may hold more than I: send what follows `after`  |
| replica  | Tail           | that                                                                 |
| primary  | SnapshotBegin… | forget what you have, here is the whole state at a position          |
| replica  | SealRequest    | I want to be promoted: stop, and tell me your last position          |
| primary  | Sealed         | I stopped (`leaving`: I am shutting down); SealRefused: not now      |
| replica  | SealNoted      | the seal of a leaving primary is on my disk                          |
| replica  | Promoted       | I am the primary of a higher epoch: follow me                        |
| both     | Ping           | nothing to say, still here                                           |
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from secure_store.core.records import Position, Record

Seq = Annotated[int, Meta(ge=0, le=1 << 62)]
Name = Annotated[str, Meta(max_length=256)]


class Role(Enum):
    """What a node is. Durable: it beats every flag."""

    UNJOINED = "unjoined"
    PRIMARY = "primary"
    REPLICA = "replica"


class Mode(Enum):
    """What the pair does while its replica is away."""

    AVAILABLE = "available"
    STRICT = "strict"


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    node_id: Name
    cluster_id: Name
    epoch: Seq
    last: Position
    mode: Mode
    in_step: bool  # the primary's durable mark
    url: Annotated[str, Meta(max_length=512)]  # where the primary itself is reached


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    node_id: Name
    cluster_id: Name  # "" before it ever joined one
    epoch: Seq
    last: Position
    url: Annotated[str, Meta(max_length=512)]


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    reason: Annotated[str, Meta(max_length=512)]
    epoch: Seq  # the refuser's; higher than the primary's: the primary has been replaced


class Records(msgspec.Struct, frozen=True, tag="records"):
    epoch: Seq
    records: tuple[Record, ...]
    durable_seq: Seq


class Durable(msgspec.Struct, frozen=True, tag="durable"):
    seq: Seq


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    durable_seq: Seq
    shown_seq: Seq


class InStep(msgspec.Struct, frozen=True, tag="in_step"):
    pass


class TailRequest(msgspec.Struct, frozen=True, tag="tail_request"):
    after: Position


class Tail(msgspec.Struct, frozen=True, tag="tail"):
    records: tuple[Record, ...]


class SnapshotBegin(msgspec.Struct, frozen=True, tag="snapshot_begin"):
    position: Position
    set_aside: bool  # what the receiver holds may be another history's: keep a copy of it


class SnapshotRows(msgspec.Struct, frozen=True, tag="snapshot_rows"):
    rows: tuple[bytes, ...]


class SnapshotEnd(msgspec.Struct, frozen=True, tag="snapshot_end"):
    row_count: Seq


class SealRequest(msgspec.Struct, frozen=True, tag="seal_request"):
    pass


class Sealed(msgspec.Struct, frozen=True, tag="sealed"):
    last: Position
    leaving: bool


class SealRefused(msgspec.Struct, frozen=True, tag="seal_refused"):
    reason: Annotated[str, Meta(max_length=512)]


class SealNoted(msgspec.Struct, frozen=True, tag="seal_noted"):
    pass


class Promoted(msgspec.Struct, frozen=True, tag="promoted"):
    epoch: Seq


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


Message = (
    Hello
    | Welcome
    | Refuse
    | Records
    | Durable
    | Ack
    | InStep
    | TailRequest
    | Tail
    | SnapshotBegin
    | SnapshotRows
    | SnapshotEnd
    | SealRequest
    | Sealed
    | SealRefused
    | SealNoted
    | Promoted
    | Ping
)
