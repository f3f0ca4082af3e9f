"""How long a copy may be shown: always less than its home waits for it."""

from __future__ import annotations

import sys
from pathlib import Path

from mesi_cache.core.messages import Grant, Inv, Renew, RenewAck
from mesi_cache.core.records import Write
from mesi_cache.core.step import Changed

sys.path.insert(0, str(Path(__file__).parent))

from little_net import LEASE_MS, LittleNet


def _written_elsewhere(net: LittleNet, key: str) -> None:
    """c changes the key, and nothing reaches b any more."""
    writer = net.ask("c", key, Write(b"2"))
    while writer not in net.answers:
        net.wires.get(("a", "b"), []).clear()
        for source, target in (("c", "a"), ("a", "c")):
            while net.wires.get((source, target)):
                net.deliver(source, target)
        net.pass_time(50)
    assert isinstance(net.answers[writer], Changed)


def test_a_copy_whose_grant_was_slow_ends_before_the_home_stops_waiting_for_it() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("c", key, Write(b"1"))
    net.flow()
    reader = net.ask("b", key)
    net.deliver("b", "a")
    net.deliver("a", "c")
    net.deliver("c", "a")
    (grant,) = net.wires["a", "b"]
    assert isinstance(grant, Grant)
    net.wires["a", "b"].clear()
    net.pass_time(LEASE_MS * 0.8)
    net.wires["b", "a"].clear()  # what b asked again meanwhile
    net.receive("a", "b", grant)
    assert reader in net.answers
    _written_elsewhere(net, key)
    assert net.machines["b"].cache.lookup(key, net.now_ms) is None


def test_a_renewal_whose_answer_was_slow_prolongs_no_longer_than_the_home_waits() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("c", key, Write(b"1"))
    net.flow()
    net.ask("b", key)
    net.flow()
    while not any(isinstance(m, Renew) for m in net.wires.get(("b", "a"), [])):
        net.pass_time(50)
    net.deliver("b", "a", Renew)
    late = next(m for m in net.wires["a", "b"] if isinstance(m, RenewAck))
    net.lose_all()
    net.pass_time(LEASE_MS * 0.8)
    net.lose_all()
    net.receive("a", "b", late)
    _written_elsewhere(net, key)
    assert net.machines["b"].cache.lookup(key, net.now_ms) is None


def test_what_is_not_acknowledged_comes_with_the_next_renewal_and_ends_the_copy() -> None:
    net = LittleNet("a", "b", "c")
    key = net.key_of("a")
    net.ask("c", key, Write(b"1"))
    net.flow()
    net.ask("b", key)
    net.flow()
    net.ask("c", key, Write(b"2"))
    net.deliver("c", "a")
    (lost,) = net.wires["a", "b"]
    assert isinstance(lost, Inv)
    net.wires["a", "b"].clear()
    net.receive("b", "a", Renew(1 << 60))
    (answer,) = (m for m in net.wires["a", "b"] if isinstance(m, RenewAck))
    assert answer.pending == (lost,)
    assert answer.complete
