"""The ring: the same everywhere, even, and moved little by a join."""

from __future__ import annotations

from statistics import pstdev

import pytest

from message_queue.core.placement.ring import PARTITIONS, Ring, partition_of, stable_hash


def test_hashes_never_change() -> None:
    """Fixed for ever: a node of another version must find the same queue in the same place."""
    assert stable_hash("queue/jobs") == 18081859006871735185
    assert partition_of("jobs") == stable_hash("queue/jobs") % PARTITIONS
    assert Ring((0, 1, 2), 128, 3).preference[:4] == (
        (0, 2, 1),
        (1, 0, 2),
        (0, 2, 1),
        (1, 2, 0),
    )


def test_every_partition_has_distinct_replicas() -> None:
    for nodes, copies in ((1, 3), (2, 3), (3, 3), (5, 3), (64, 5)):
        ring = Ring(range(nodes), 128, copies)
        assert len(ring.preference) == PARTITIONS
        for replicas in ring.preference:
            assert len(set(replicas)) == len(replicas) == min(nodes, copies)


def test_load_is_even_enough() -> None:
    """sigma of the share of the hash space is about 1/sqrt(virtual nodes)."""
    ring = Ring((0, 1, 2), 128, 1)
    shares = [0] * 3
    for i in range(20_000):
        shares[ring._walk(stable_hash(f"sample/{i}"), 1)[0]] += 1
    assert pstdev(s * 3 / 20_000 for s in shares) < 0.12


def test_a_join_moves_about_one_nth() -> None:
    before, after = Ring(range(4), 128, 1), Ring(range(5), 128, 1)
    moved = [p for p in range(PARTITIONS) if before.preference[p] != after.preference[p]]
    assert all(after.preference[p] == (4,) for p in moved), "only to the new node"
    assert 1 <= len(moved) <= 2 * PARTITIONS // 5


@pytest.mark.parametrize(
    ("members", "points", "copies"), [((), 1, 1), ((0, 0), 1, 1), ((0,), 0, 1), ((0,), 1, 0)]
)
def test_nonsense_is_refused(members: tuple[int, ...], points: int, copies: int) -> None:
    with pytest.raises(ValueError, match=r"a ring needs|counted from"):
        Ring(members, points, copies)
