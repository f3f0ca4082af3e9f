"""The ring as a configuration, and whose word decides about a partition."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from message_queue.core.messages import MAX_NODES, RING_PARTITION, Member, Membership
from message_queue.core.placement.membership import (
    Declined,
    admit,
    before,
    changing,
    departed,
    dismiss,
    finish,
    founding,
    named,
    nodes,
    placement,
)
from message_queue.core.placement.ring import PARTITIONS
from message_queue.core.replication.quorum import Quorum
from message_queue.core.replication.validation import plausible_ring

THREE = founding(("a:1", "b:1", "c:1"), 128, 3)


def accepted(ring: Membership | Declined) -> Membership:
    assert isinstance(ring, Membership), ring
    assert plausible_ring(ring)
    return ring


def test_a_joiner_gets_a_new_position_and_nobody_elses_is_given_twice() -> None:
    joining = accepted(admit(THREE, "d:1", "D"))
    assert dict(joining.members)[3] == Member("d:1", "D")
    four = accepted(finish(joining))
    gone = accepted(finish(accepted(dismiss(four, "d:1"))))
    assert departed(gone, 3)
    assert not departed(gone, 2)
    assert not departed(gone, -1)  # a joiner that waits for its position
    again = accepted(admit(gone, "d:1", "D"))
    assert again.joining == 4


def test_one_change_at_a_time_and_a_retry_is_no_other_change() -> None:
    joining = accepted(admit(THREE, "d:1"))
    assert admit(joining, "d:1") is joining
    assert admit(joining, "e:1") == Declined(409, "Another ring change is in progress")
    assert dismiss(joining, "a:1") == Declined(409, "Another ring change is in progress")
    leaving = accepted(dismiss(finish(joining), "a:1"))
    assert dismiss(leaving, "a:1") is leaving
    assert admit(leaving, "e:1") == Declined(409, "Another ring change is in progress")


def test_a_change_may_be_turned_round_midway() -> None:
    joining = accepted(admit(THREE, "d:1"))
    back = accepted(dismiss(joining, "d:1"))
    assert [p for p, _ in back.members] == [0, 1, 2]
    assert back.leaving == (3, Member("d:1"))
    forth = accepted(admit(back, "d:1"))
    assert forth.joining == 3, "its data is still there: the same position"
    leaving = accepted(dismiss(finish(forth), "b:1"))
    assert accepted(admit(leaving, "b:1")).joining == 1


def test_the_last_majority_may_not_leave() -> None:
    two = finish(accepted(dismiss(THREE, "a:1")))
    assert dismiss(two, "b:1") == Declined(409, "Too few nodes would be left")
    assert dismiss(two, "x:1") == Declined(404, "No such node")
    alone = founding(("a:1",), 128, 1)
    assert isinstance(dismiss(alone, "a:1"), Declined)


def test_an_address_is_bound_to_the_id_that_it_was_admitted_with() -> None:
    joining = accepted(admit(THREE, "d:1", "D"))
    assert admit(joining, "d:1", "X") == Declined(409, "Address belongs to another node")
    four = finish(joining)
    assert admit(four, "e:1", "D") == Declined(409, "Id belongs to another node")


def test_positions_end_and_members_are_bounded() -> None:
    spent = THREE.__class__(THREE.version, 3, 128, 3, THREE.members, next_position=MAX_NODES)
    assert admit(spent, "d:1") == Declined(409, "The ring has no position left")


def test_what_nodes_say_of_themselves_is_taken_over() -> None:
    assert named(THREE, {}) is THREE
    assert dict(named(THREE, {1: Member("b:2", "B")}).members)[1] == Member("b:2", "B")


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=30))
def test_any_sequence_of_requests_gives_rings_that_peers_believe(
    asked: list[tuple[bool, int]],
) -> None:
    ring = THREE
    given_out: dict[int, str] = {p: m.addr for p, m in ring.members}
    for join, which in asked:
        addr = ("a:1", "b:1", "c:1", "d:1", "e:1", "f:1")[which] if which < 6 else ""
        after = finish(ring) if not addr else (admit if join else dismiss)(ring, addr)
        if isinstance(after, Declined) or (not addr and not changing(ring)):
            continue
        accepted(after)
        assert after is ring or after.version == ring.version + 1
        for position, member in nodes(after).items():
            assert given_out.setdefault(position, member.addr) == member.addr
        assert nodes(before(after)).keys() <= nodes(after).keys()
        ring = after


def test_a_join_moves_about_its_share_and_the_ring_itself_is_everywhere() -> None:
    four = accepted(admit(THREE, "d:1"))
    old, new = placement(THREE), placement(four)
    assert new[RING_PARTITION] == (0, 1, 2, 3)
    owners = [p for p in range(PARTITIONS) if old[p][0] != new[p][0]]
    assert all(new[p][0] == 3 for p in owners)
    assert 8 <= len(owners) <= 26, "about a quarter of 64"
    for p in range(PARTITIONS):
        assert len(set(new[p]) - set(old[p])) <= 1


# --- quorums --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [((0,), (0, 1)), ((0, 1), (0, 1, 2)), ((0, 1, 2), (1, 2, 3)), ((0, 1, 2), (3, 4, 5))],
)
def test_whoever_hands_over_needs_both_and_neither_set_can_act_alone(
    old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    joint = Quorum(new, old)
    for size in range(len(joint.nodes) + 1):
        for agreed in combinations(joint.nodes, size):
            enough = joint.enough(agreed)
            assert enough == (Quorum(old).enough(agreed) and Quorum(new).enough(agreed))
            rest = [n for n in joint.nodes if n not in agreed]
            assert not (enough and (Quorum(old).enough(rest) or Quorum(new).enough(rest)))
            assert joint.hopeless(rest) != enough


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 3), st.integers(-1, 5), min_size=4, max_size=4))
def test_what_both_majorities_have_reached_is_the_lower_of_the_two(marks: dict[int, int]) -> None:
    old, new = (0, 1, 2), (1, 2, 3)
    reached = Quorum(new, old).reached(marks)
    assert reached == min(Quorum(old).reached(marks), Quorum(new).reached(marks))
    assert Quorum(new, old).enough([n for n, mark in marks.items() if mark >= reached])
