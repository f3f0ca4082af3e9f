"""The races by hand, one message at a time: each test is named by what must come out of it."""

from __future__ import annotations

import sys
from pathlib import Path

from mesi_cache.core.messages import (
    Backup,
    BackupAck,
    BackupRefused,
    Fetch,
    FetchAck,
    GetM,
    GetS,
    Grant,
    Inv,
    InvAck,
    Put,
    PutAck,
    Renew,
    RenewAck,
)
from mesi_cache.core.records import Cas, Delete, Incr, Outcome, Write
from mesi_cache.core.step import Changed, Found, Missing, Unavailable

sys.path.insert(0, str(Path(__file__).parent))

from little_net import LEASE_MS, LittleNet


def _shared(net: LittleNet, key: str, *names: str) -> None:
    """`key` holds b"1" in S at `names` (at least two)."""
    net.ask(names[0], key, Write(b"1"))
    net.flow()
    for name in names[1:]:
        net.ask(name, key)
        net.flow()
    assert {net.state(name, key) for name in names} == {"S"}


def test_the_first_reader_gets_E_and_its_first_write_needs_no_permission() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1"))
    net.flow()
    net.ask("a", key)  # the owner b is asked to share
    net.flow()
    assert (net.state("a", key), net.state("b", key)) == ("S", "S")
    for name in ("a", "b"):
        step = net.step()
        net.machines[name].cache.surrender(step, 9)
        net.carry_out(name, step)
        net.flow()
    net.ask("b", key)
    net.flow()
    assert net.state("b", key) == "E"
    net.ask("b", key, Write(b"2"))
    assert [type(m) for m in net.wires["b", "a"]] == [Backup]
    net.flow()
    assert net.state("b", key) == "M"


def test_a_write_is_neither_answered_nor_readable_before_its_home_has_logged_it() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1"))
    net.flow()
    second = net.ask("b", key, Write(b"2"))
    reader = net.ask("b", key)
    assert second not in net.answers
    assert net.answers[reader] == Found(b"1", 1, "M", True)
    net.deliver("b", "a", Backup)
    assert net.log["a"][-1].record.value == b"2"
    assert second not in net.answers
    net.deliver("a", "b", BackupAck)
    assert net.answers[second] == Changed(Outcome("done", 2))
    after = net.ask("b", key)
    assert net.answers[after] == Found(b"2", 2, "M", True)


def test_data_that_an_invalidation_overtook_is_used_once_and_never_kept() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "a", "c")
    reader = net.ask("b", key)
    net.deliver("b", "a", GetS)
    writer = net.ask("c", key, Write(b"2"))
    net.deliver("c", "a", GetM)
    net.deliver("a", "b", Inv)  # before the grant
    assert net.state("b", key) == "IS_D_I"
    late = net.ask("b", key)  # joins after the data is known to be dead
    net.deliver("b", "a", InvAck)
    net.deliver("a", "b", Grant)
    assert net.answers[reader] == Found(b"1", 1, "I", False)
    assert late not in net.answers
    net.flow()
    assert net.answers[writer] == Changed(Outcome("done", 2))
    assert net.answers[late] == Found(b"2", 2, "S", False)


def test_an_upgrade_that_loses_does_not_write_on_its_old_copy() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Incr(1))
    net.flow()
    net.ask("c", key)
    net.flow()
    first, second = net.ask("b", key, Incr(10)), net.ask("c", key, Incr(100))
    assert (net.state("b", key), net.state("c", key)) == ("SM_D", "SM_D")
    net.flow()
    values = [answer.outcome.value for answer in (net.answers[first], net.answers[second])]  # type: ignore[union-attr]
    assert sorted(values) in ([b"11", b"111"], [b"101", b"111"])
    assert net.memory["a"][key].value == b"111"


def test_a_put_that_crosses_a_fetch_answers_it() -> None:
    net = LittleNet("a", "b", "c", capacity=1)
    key, other = net.key_of("a"), net.key_of("a", 1)
    net.ask("b", key, Write(b"1"))
    net.flow()
    net.ask("b", other)  # absent: takes no slot, evicts nothing
    net.flow()
    assert net.state("b", key) == "M"
    net.ask("b", other, Write(b"2"))
    net.deliver("b", "a", GetM)
    reader = net.ask("c", key)
    net.deliver("c", "a", GetS)  # a fetch leaves for b …
    net.deliver("a", "b", Grant)  # … which gives the line up for the other key meanwhile
    assert net.state("b", key) == "MI_A"
    net.deliver("b", "a", Put)
    net.flow()
    assert net.answers[reader] == Found(b"1", 1, "E", False)
    assert net.state("b", key) == "I"


def test_a_late_or_repeated_invalidation_leaves_a_newer_copy_alone() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    net.ask("b", key, Write(b"2"))
    net.deliver("b", "a", GetM)
    inv = net.wires["a", "c"][0]
    assert isinstance(inv, Inv)
    net.flow()
    net.ask("c", key)
    net.flow()
    assert net.state("c", key) == "S"
    net.receive("a", "c", inv)
    assert net.state("c", key) == "S"
    assert isinstance(net.deliver("c", "a"), InvAck)
    assert net.entry_state("a", key) == "S"


def test_a_put_older_than_the_current_grant_is_ignored() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1"))
    net.flow()
    step = net.step()
    net.machines["b"].cache.surrender(step, 1)
    net.carry_out("b", step)
    put = net.wires["b", "a"][0]
    net.flow()
    net.ask("b", key)
    net.flow()
    assert net.state("b", key) == "E"
    net.receive("b", "a", put)
    assert net.entry_state("a", key) == "EM"
    assert isinstance(net.deliver("a", "b"), PutAck)
    assert net.state("b", key) == "E"


def test_a_change_whose_grant_has_ended_is_refused_and_then_happens_once() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Incr(1))
    net.flow()
    change = net.ask("b", key, Incr(10))  # its backup leaves
    backup = net.wires["b", "a"].pop()
    other = net.ask("c", key, Incr(100))
    net.deliver("c", "a", GetM)
    net.deliver("a", "b", Fetch)
    net.deliver("b", "a", FetchAck)
    net.receive("b", "a", backup)  # after the grant has ended
    assert any(isinstance(m, BackupRefused) for m in net.wires["a", "b"])
    net.flow()
    assert net.answers[other] == Changed(Outcome("done", 2, b"101"))
    assert net.answers[change] == Changed(Outcome("done", 3, b"111"))


def test_a_backup_that_was_logged_although_its_owner_lost_the_line_is_not_done_again() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Incr(1))
    net.flow()
    change = net.ask("b", key, Incr(10))
    net.ask("c", key, Incr(100))
    net.deliver("c", "a", GetM)
    net.deliver("a", "b", Fetch)  # b gives up the line and asks for its change anew …
    net.deliver("b", "a", Backup)  # … which the home logs all the same, its grant being current
    net.flow()
    assert net.answers[change] == Changed(Outcome("done", 2, b"11"))
    assert net.memory["a"][key].value == b"111"


def test_a_request_without_effect_that_comes_twice_does_nothing_the_second_time() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    gone = net.ask("b", key, Delete())
    again = net.wires["b", "a"][0]
    net.flow()
    assert net.answers[gone] == Changed(Outcome("absent", 0))
    net.ask("c", key, Write(b"1"))
    net.flow()
    net.receive("b", "a", again)
    net.flow()
    assert net.memory["a"][key].value == b"1"


def test_concurrent_misses_go_out_once_and_joiners_of_an_absent_key_ask_again() -> None:
    net = LittleNet("a", "b")
    key = net.key_of("a")
    net.ask("a", key, Write(b"1"))
    net.flow()
    readers = [net.ask("b", key) for _ in range(5)]
    assert len(net.wires["b", "a"]) == 1
    net.flow()
    assert {net.answers[reader] for reader in readers} == {Found(b"1", 1, "S", False)}
    absent = net.key_of("a", 1)
    first, joined = net.ask("b", absent), net.ask("b", absent)
    net.deliver("b", "a", GetS)
    net.deliver("a", "b", Grant)
    assert net.answers[first] == Missing()
    assert joined not in net.answers  # for it, the answer may have been given too early
    net.flow()
    assert net.answers[joined] == Missing()


def test_a_copy_whose_lease_is_over_is_renewed_and_keeps_its_place() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    net.pass_time(LEASE_MS)
    net.lose_all()
    assert net.machines["b"].cache.lookup(key, net.now_ms) is None
    reader = net.ask("b", key)
    assert reader not in net.answers
    net.pass_time(150)
    net.flow()
    assert net.answers[reader] == Found(b"1", 1, "S", True)
    assert net.machines["b"].cache.lookup(key, net.now_ms) is not None


def test_a_renewal_prolongs_nothing_before_what_was_lost_is_applied() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    writer = net.ask("c", key, Write(b"2"))
    net.deliver("c", "a", GetM)
    net.wires["a", "b"].clear()  # the way a -> b is cut
    net.pass_time(3 * LEASE_MS)
    net.wires["a", "b"].clear()
    net.wires["b", "a"].clear()
    net.flow()
    assert net.answers[writer] == Changed(Outcome("done", 2))  # after waiting out b's lease
    reader = net.ask("b", key)
    net.pass_time(150)
    net.deliver("b", "a", Renew)
    ack = net.deliver("a", "b", RenewAck)
    assert isinstance(ack, RenewAck)
    assert [type(m) for m in ack.pending] == [Inv]
    assert net.state("b", key) != "S"
    net.flow()
    assert net.answers[reader] == Found(b"2", 2, "E", False)


def test_a_renewal_does_not_prolong_the_copy_that_a_fetch_in_it_would_have_left() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1"))
    net.flow()
    net.pass_time(650)
    net.lose_all()
    reader = net.ask("c", key)
    net.deliver("c", "a", GetS)
    net.wires["a", "b"].clear()  # the fetch is lost
    while not net.wires.get(("b", "a")):
        net.pass_time(50)
    net.wires["a", "b"].clear()
    net.deliver("b", "a", Renew)  # its answer names the fetch, and takes its time
    (late,) = (m for m in net.wires["a", "b"] if isinstance(m, RenewAck))
    net.pass_time(350)
    net.deliver("a", "c", Grant)
    assert net.answers[reader] == Found(b"1", 1, "E", False)  # b's lease was waited out
    net.receive("a", "b", late)
    assert net.state("b", key) == "I"


def test_a_node_that_cannot_renew_answers_503_and_never_an_old_value() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    net.pass_time(LEASE_MS)
    net.lose_all()
    reader = net.ask("b", key)
    for _ in range(100):
        net.pass_time(50)
        net.lose_all()
    answer = net.answers[reader]
    assert isinstance(answer, Unavailable)
    assert answer.definite


def test_a_restarted_home_grants_nothing_before_the_last_lease_is_over() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    net.start("a", 2)
    writer = net.ask("c", key, Write(b"2"))
    net.flow()
    net.pass_time(LEASE_MS - 100)
    net.flow()
    assert writer not in net.answers
    net.pass_time(300)
    net.flow()
    assert net.answers[writer] == Changed(Outcome("done", 2))
    assert net.state("b", key) == "I"


def test_a_restarted_home_knows_what_it_has_done_and_a_restarted_cache_holds_nothing() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    change = net.ask("b", key, Incr(5))
    net.deliver("b", "a", GetM)
    net.lose_all()  # done, but the answer is lost
    net.start("a", 2)
    net.pass_time(LEASE_MS + 200)
    net.flow()
    net.pass_time(200)
    net.flow()
    assert net.answers[change] == Changed(Outcome("done", 1, b"5"))
    net.ask("c", key)
    net.flow()
    net.start("c", 2)
    net.receive("c", "a", Renew(1))  # a hears of c's new life
    writer = net.ask("b", key, Incr(1))
    net.deliver("b", "a", GetM)
    assert not any(isinstance(m, Inv | Fetch) for m in net.wires["a", "c"])
    net.flow()
    assert net.answers[writer] == Changed(Outcome("done", 2, b"6"))


def test_a_deleted_key_holds_no_line_and_its_versions_do_not_come_again() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    for deleter in ("b", "c"):
        net.ask(deleter, key, Delete())
        net.flow()
        assert {net.state(name, key) for name in ("a", "b", "c")} == {"I"}
        reader = net.ask("a", key)
        net.flow()
        assert net.answers[reader] == Missing()
    again = net.ask("b", key, Write(b"9"))
    net.flow()
    assert net.answers[again] == Changed(Outcome("done", 3))


def test_a_compare_and_set_that_fails_changes_nothing_and_takes_nothing_away() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    _shared(net, key, "b", "c")
    failed = net.ask("b", key, Cas(7, b"x"))
    net.flow()
    assert net.answers[failed] == Changed(Outcome("mismatch", 1))
    assert (net.state("b", key), net.state("c", key)) == ("S", "S")


def test_a_value_whose_time_is_up_is_deleted_by_its_home_before_anyone_misses_it() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1", ttl_ms=500))
    net.flow()
    net.ask("c", key)
    net.flow()
    net.pass_time(480)
    net.flow()
    assert net.machines["b"].cache.lookup(key, net.now_ms) is None  # copies stop early
    net.pass_time(100)
    net.flow()
    reader = net.ask("c", key)
    net.flow()
    assert net.answers[reader] == Missing()
    assert net.log["a"][-1].record.value is None


def test_a_value_may_run_out_while_a_writer_waits_for_a_sharer() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("b", key, Write(b"1", ttl_ms=500))
    net.flow()
    net.ask("c", key)
    net.flow()
    writer = net.ask("b", key, Write(b"2"))
    net.deliver("b", "a", GetM)
    net.pass_time(600)  # c's acknowledgement comes after the deadline
    net.flow()
    assert net.answers[writer] == Changed(Outcome("done", 3))
    assert [logged.record.value for logged in net.log["a"]] == [b"1", None, b"2"]


def test_the_least_recently_used_line_goes_and_only_clients_touch_the_order() -> None:
    net = LittleNet("a", "b", capacity=2)
    x, y, z = (net.key_of("a", number) for number in range(3))
    for key in (x, y):
        net.ask("b", key, Write(b"1"))
        net.flow()
    assert net.machines["b"].cache.lookup(x, net.now_ms) is not None
    net.ask("a", y)  # the home's fetch is no use of y by b's clients
    net.flow()
    net.ask("b", z, Write(b"1"))
    net.flow()
    assert list(net.machines["b"].cache.lines) == [x, z]
