"""Changes with a name of the client's own (Idempotency-Key): once, whoever is asked again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mesi_cache.core.directory.retries import REMEMBERED_MS, Retries
from mesi_cache.core.messages import GetM, Grant
from mesi_cache.core.records import Cas, Claim, Delete, Incr, Once, Operation, Outcome, Write
from mesi_cache.core.step import Changed

sys.path.insert(0, str(Path(__file__).parent))

from little_net import LEASE_MS, LittleNet


def outcome(net: LittleNet, call: tuple[str, int]) -> Outcome:
    answer = net.answers[call]
    assert isinstance(answer, Changed), answer
    return answer.outcome


@pytest.mark.parametrize("owner", [None, "a", "b", "c"])
def test_a_named_change_happens_once_wherever_it_is_asked_for_again(owner: str | None) -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    if owner is not None:  # it has the line in M
        net.ask(owner, key, Incr(100))
        net.flow()
    calls = []
    for name in ("b", "c", "b", "a"):
        calls.append(net.ask(name, key, Incr(1), once="mine"))
        net.flow()
    assert len({outcome(net, call) for call in calls}) == 1
    assert outcome(net, calls[0]).value == (b"101" if owner else b"1")


def test_changes_of_an_owner_under_way_end_before_its_named_one() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    net.ask("b", key, Incr(1))
    net.flow()
    first = net.ask("b", key, Incr(10))  # a backup is on its way
    second = net.ask("b", key, Incr(100), once="mine")
    again = net.ask("b", key, Incr(100), once="mine")
    net.flow()
    assert outcome(net, first).value == b"11"
    assert outcome(net, second) == outcome(net, again) == Outcome("done", 3, b"111")


def test_it_is_remembered_over_the_homes_restart() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Incr(1), once="mine")
    net.deliver("b", "a", GetM)
    net.lose_all()  # the answer never comes
    net.start("a", 2)
    net.pass_time(LEASE_MS + 100)
    net.flow()
    net.pass_time(100)
    again = net.ask("c", key, Incr(1), once="mine")
    net.flow()
    net.pass_time(300)
    net.flow()
    assert outcome(net, again) == Outcome("done", 1, b"1")


def test_the_same_name_for_another_change_does_nothing() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Incr(1), once="mine")
    net.flow()
    others: list[Operation] = [Incr(2), Write(b"1"), Cas(1, b"7")]
    for operation in others:
        other = net.ask("c", key, operation, once="mine")
        net.flow()
        assert outcome(net, other).status == "reused"
    assert net.memory["a"][key].value == b"1"


def test_an_answer_without_effect_is_given_again_as_well() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    first = net.ask("b", key, Cas(5, b"x"), once="mine")
    net.flow()
    again = net.ask("a", key, Cas(5, b"x"), once="mine")
    net.flow()
    assert outcome(net, first) == outcome(net, again) == Outcome("mismatch", 0)


NO_EFFECT: list[tuple[Operation, Outcome]] = [
    (Cas(5, b"x"), Outcome("mismatch", 1)),
    (Delete(), Outcome("absent", 0)),
    (Incr(1), Outcome("not_integer", 1)),
]


@pytest.mark.parametrize(("operation", "first"), NO_EFFECT, ids=lambda x: type(x).__name__)
def test_an_answer_without_effect_is_the_same_after_the_death_of_all_nodes(
    operation: Operation, first: Outcome
) -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    if first.version:
        net.ask("b", key, Write(b'"text"'))
        net.flow()
    asked = net.ask("b", key, operation, once="mine")
    net.flow()
    assert outcome(net, asked) == first
    for number in range(5):  # by now it would have an effect
        net.ask("c", key, Write(b"%d" % number))
        net.flow()
    for name in net.names:
        net.start(name, 2)
    net.introduce()
    net.pass_time(LEASE_MS + 100)
    before = net.memory["a"][key]
    again = net.ask("c", key, operation, once="mine")
    net.flow()
    assert outcome(net, again) == first
    assert net.memory["a"][key] == before


def test_a_name_is_remembered_for_the_stated_time_and_no_longer() -> None:
    retries, wall_ms = Retries(), 1e12
    once = Once.of("mine", "k", Incr(1))
    retries.add(once, wall_ms, Outcome("done", 1, b"1"))
    assert retries.outcome(once, wall_ms + REMEMBERED_MS - 1) == Outcome("done", 1, b"1")
    assert retries.outcome(once, wall_ms + REMEMBERED_MS) is None
    assert len(retries) == 0


def test_when_too_many_are_remembered_new_ones_are_refused_and_none_is_forgotten() -> None:
    retries = Retries(most=3)
    names = [Once.of(f"n{number}", "k", Incr(1)) for number in range(4)]
    for once in names[:3]:
        assert retries.outcome(once, 0) is None
        retries.add(once, 0, Outcome("done", 1))
    refused = retries.outcome(names[3], 0)
    assert refused is not None
    assert refused.status == "full"
    assert retries.outcome(names[0], 0) == Outcome("done", 1)


def test_a_claim_is_the_first_ones_and_leaves_no_copy() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    first = net.ask("b", key, Claim(b"B", 60_000))
    net.flow()
    second = net.ask("c", key, Claim(b"C", 60_000))
    net.flow()
    assert outcome(net, first) == Outcome("done", 1, b"B")
    assert outcome(net, second) == Outcome("taken", 1, b"B")
    assert [net.state(name, key) for name in net.names] == ["I", "I", "I"]
    assert net.entry_state("a", key) == "N"


def test_a_grant_of_a_named_change_is_an_ordinary_one() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1"), once="mine")
    net.deliver("b", "a", GetM)
    grant = net.deliver("a", "b", Grant)
    assert isinstance(grant, Grant)
    assert grant.state == "M"
    assert net.state("b", key) == "M"
