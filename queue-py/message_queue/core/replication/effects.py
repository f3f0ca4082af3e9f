"""What the replication core asks of the node after each step. The order of the fields is the
contract.

    1. ``persist`` is handed to the log, in order. The log is one sequence: what was handed over
       earlier is durable earlier. When everything up to a ``batch`` is durable,
       ``Replicator.durable(batch)`` is called; one call may cover many batches (group commit).
    2. ``send`` may leave at once, in parallel with 1: no message in it speaks of anything that this
       step persists. Answers that do (a promise, "stored") are kept by the core and come out of
       ``durable``.
    3. ``reads``: bodies to fetch from storage; they come back by ``Replicator.bodies_read``.
    4. ``committed`` before ``lost`` before ``gained``: first answer, then stop, then start.
    5. ``pausing``: these partitions are about to be handed over, and nothing is delivered any more:
       tell the leases as they stand (``Replicator.soft``), however many they are.
    6. ``ring``: another ring is in force; keep it, and dial whom it names.
    7. ``forget``: these dots are dead. The log may drop them from its index at once; they are safe
       to reclaim from disk only after a checkpoint is durable (see ``PartitionState.checkpoint``).

A failed write or fsync ends the node: the core is never told that something was not durable.
"""

from __future__ import annotations

from msgspec import Struct, field

from message_queue.core.messages import LogRecord, Membership, PeerMessage, Spans


class Read(Struct, frozen=True):
    """Fetch these puts for a peer that copies a partition; answer with what is readable."""

    to: int
    partition: int
    for_epoch: int
    wanted: Spans
    max_bytes: int


class Committed(Struct, frozen=True):
    """Records 1..upto of this epoch are durable on a majority: answer their clients, deliver their
    puts.
    """

    partition: int
    epoch: int
    upto: int


class Gained(Struct, frozen=True):
    """This node owns the partition from now on. Everything held by it is durable on a majority.

    Rebuild the delivery machine from ``held`` and ``settings`` (``PartitionState``); ``soft`` is
    the last ``Soft`` of the previous owner that got here, or empty.
    """

    partition: int
    epoch: int
    soft: bytes


class Lost(Struct, frozen=True):
    """This node no longer owns the epoch. Proposals not yet committed are of unknown outcome
    (``"definite": false``), except with ``clean``: then none was in flight."""

    partition: int
    epoch: int
    clean: bool


class Note(Struct, frozen=True):
    """Something an operator may want to read: a line in the log, an event on /events, a counter."""

    name: str  # e.g. "takeover_started", "owner_elected", "owner_lost", "sealed_drop", "caught_up"
    partition: int
    epoch: int
    detail: str


class Effects(Struct):
    """One step's consequences. See the module's docstring for what must precede what."""

    jumped_ms: int = 0  # cluster time jumped ahead: leases granted here go on for as long as ever
    batch: int = 0  # > 0 when ``persist`` is not empty: the number to report to ``durable``
    persist: list[LogRecord] = field(default_factory=list)
    send: list[tuple[int, PeerMessage]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    committed: list[Committed] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    gained: list[Gained] = field(default_factory=list)
    pausing: list[int] = field(default_factory=list)
    ring: Membership | None = None
    forget: list[tuple[int, Spans]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
