"""Whose answer to a heartbeat lengthens a lease: only that of nodes whose word counts."""

from __future__ import annotations

from message_queue.core.messages import (
    MAX_NODES,
    AppendRecord,
    DismissRecord,
    Heartbeat,
    HeartbeatAnswer,
    LogRecord,
    PromiseRecord,
    SealRecord,
    Settled,
    View,
)
from message_queue.core.replication.config import ReplicationConfig
from message_queue.core.replication.replicator import Replicator
from message_queue.core.replication.state import PartitionState

P = 0
ME = 0
OLD, NEW = 5 * MAX_NODES + 1, 7 * MAX_NODES + 2
"""Epochs of the node that owned the partition when this one was a replica, and of the next one."""


def answer(*records: LogRecord) -> HeartbeatAnswer:
    """What node 0, of which the ring wants nothing any more, says to the owner of `OLD`."""
    state = PartitionState(P)
    for record in records:
        state.apply(record)
    config = ReplicationConfig(node=ME, nodes=4, incarnation=10, preference=((1, 2, 3),), seed=1)
    core = Replicator(config, {P: state}, 0, 1_000)
    core.tick(5_000)  # whatever was granted before is over
    beat = Heartbeat(1, 10, 1, ((P, OLD),), (), 1, ())
    (said,) = [
        message
        for to, message in core.receive_all(1, 5, (beat,), 5_001).send
        if to == 1 and isinstance(message, HeartbeatAnswer)
    ]
    return said


def seal(epoch: int, replicas: tuple[int, ...], before: tuple[int, ...] = ()) -> SealRecord:
    return SealRecord(P, epoch, 1, View(epoch, 77, (), (), (), replicas, before))


def test_a_replica_that_was_replaced_does_not_renew_the_owner_that_it_had() -> None:
    """It took part in the election of the next one and has settled: the old owner, which was cut
    off meanwhile, may count neither on its promise nor on its silence."""
    handed_over = seal(NEW, (1, 2, 3), (0, 1, 2))
    settled = AppendRecord(P, NEW, (Settled(1),))
    assert answer(PromiseRecord(P, NEW, 1), handed_over, settled).refused == ((P, OLD, NEW),)


def test_nor_one_that_was_dismissed_or_has_lost_its_disk() -> None:
    assert answer(DismissRecord(P, NEW, 1, (1, 2, 3))).refused == ((P, OLD, NEW),)
    assert answer().refused == ((P, OLD, 0),)


def test_a_replica_renews_what_it_has_sealed() -> None:
    assert answer(PromiseRecord(P, OLD, 1), seal(OLD, (0, 1, 2))).refused == ()
