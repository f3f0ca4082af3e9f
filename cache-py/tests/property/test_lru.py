"""Exact LRU against a naive model: a list that is searched."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mesi_cache.core.invariants import check_machine
from mesi_cache.core.records import Delete, Incr, Operation, Write

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from little_net import LittleNet

KEYS = st.integers(0, 5)
CALLS = st.lists(st.tuples(st.sampled_from(["read", "write", "incr", "delete"]), KEYS), max_size=40)


@given(capacity=st.integers(1, 4), calls=CALLS)
@settings(max_examples=60, deadline=None)
def test_the_cache_holds_exactly_the_lines_that_a_naive_lru_holds(
    capacity: int, calls: list[tuple[str, int]]
) -> None:
    net = LittleNet("a", "b", capacity=capacity)
    cache = net.machines["b"].cache
    naive: list[int] = []  # least recently used first
    values: dict[int, bytes] = {}
    for number, (kind, key) in enumerate(calls):
        name = f"k{key}"
        operation: Operation | None = None
        match kind:
            case "write":
                operation = Write(b"%d" % number)
                values[key] = b"%d" % number
            case "incr":
                operation = Incr(1)
                values[key] = b"%d" % (int(values.get(key, b"0")) + 1)
            case "delete":
                operation = Delete()
                values.pop(key, None)
        if operation is not None or cache.lookup(name, net.now_ms) is None:
            net.ask("b", name, operation)
            net.flow()
        if key in naive:
            naive.remove(key)
        if key in values:
            naive.append(key)
            del naive[: max(0, len(naive) - capacity)]
        assert list(cache.lines) == [f"k{each}" for each in naive]
        for each in naive:
            assert cache.lines[f"k{each}"].record.value == values[each]
        check_machine(net.machines["b"])
