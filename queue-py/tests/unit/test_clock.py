"""Cluster time: as fast as the clocks that make it, and jumps that are told."""

from __future__ import annotations

from message_queue.core.messages import Heartbeat
from message_queue.core.replication.clock import GAP_MS, JUMP_MS, ClusterClock
from message_queue.core.replication.contract import ReplicationConfig
from message_queue.core.replication.replicator import Replicator

BORN_MS = 1_000_000


def replicator() -> Replicator:
    config = ReplicationConfig(
        node=0, nodes=2, incarnation=1, preference=((0, 1),), fresh=False, seed=1, wall_ms=BORN_MS
    )
    return Replicator(config, {}, BORN_MS, 0)


def beat(number: int, cluster_ms: int) -> tuple[Heartbeat, ...]:
    return (Heartbeat(number, 1, cluster_ms, (), (), 1, ()),)


def test_peers_with_the_same_time_do_not_push_each_other_on() -> None:
    sut = replicator()
    for round_ms in range(200, 10_001, 200):
        # Between two ticks: the last reading of the own clock is old by then.
        sut.tick(round_ms - 80)
        effects = sut.receive_all(1, 1, beat(round_ms, BORN_MS + round_ms), round_ms)
        assert effects.jumped_ms == 0
        assert sut.cluster_ms(round_ms) == BORN_MS + round_ms


def test_clocks_that_tick_at_different_moments_of_a_millisecond_do_not_push_each_other_on() -> None:
    clocks = [ClusterClock(BORN_MS, 0) for _ in range(3)]
    phases_us = (0, 300, 600)
    for now_us in range(0, 1_000_000, 100):
        for clock, phase_us in zip(clocks, phases_us, strict=True):
            clock.advance((now_us + phase_us) // 1_000)
        # Whoever's clock has just ticked tells the others, which is heard at once.
        for clock in clocks:
            for other in clocks:
                clock.hear(other.ms)
    assert all(clock.ms - BORN_MS <= 1_000 for clock in clocks)


def test_a_jump_is_told_once_and_small_ones_when_they_add_up() -> None:
    sut = replicator()
    assert sut.receive_all(1, 1, beat(1, BORN_MS + 5_001), 0).jumped_ms == 5_000
    assert sut.tick(10).jumped_ms == 0
    told = [
        sut.receive_all(1, 1, beat(2 + n, BORN_MS + 5_011 + n), 10).jumped_ms
        for n in range(1, JUMP_MS + 1)
    ]
    assert told == [0] * (JUMP_MS - 1) + [JUMP_MS]


def test_what_a_paused_node_missed_comes_from_its_peers_and_a_first_time_is_no_jump() -> None:
    clock = ClusterClock(0, 0)
    clock.hear(BORN_MS + 1)
    assert clock.take_jump() == 0
    clock.advance(10_000)
    assert clock.ms == BORN_MS + GAP_MS
    clock.hear(BORN_MS + 10_001)
    assert clock.take_jump() == 10_000 - GAP_MS
    clock.hear(BORN_MS)
    assert clock.ms == BORN_MS + 10_000
