"""S3-FIFO against a naive model of lists that are searched, and against LRU on a Zipf trace."""

from __future__ import annotations

import random
import sys
from itertools import accumulate
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mesi_cache.core.cache.line import Line, Session
from mesi_cache.core.cache.slots import Policy, S3Fifo, slots
from mesi_cache.core.invariants import check_machine
from mesi_cache.core.records import Delete, Write

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from little_net import LittleNet


class Naive:
    """The paper's algorithm 1 as one would write it on a board."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.share = max(1, capacity // 10)
        self.small: list[str] = []
        self.main: list[str] = []
        self.ghost: list[str] = []
        self.uses: dict[str, int] = {}

    def held(self) -> list[str]:
        return self.small + self.main

    def use(self, key: str) -> None:
        if key in self.uses:
            self.uses[key] = min(3, self.uses[key] + 1)
            return
        while len(self.held()) >= self.capacity:
            self._evict_one()
        self.uses[key] = 0
        (self.main if key in self.ghost else self.small).append(key)
        self.ghost = [each for each in self.ghost if each != key]

    def lose(self, key: str) -> None:
        """Somebody else's write takes it away."""
        if key in self.main:
            self.main.remove(key)
            self._remember(key)
        elif key in self.small:
            self.small.remove(key)
        self.uses.pop(key, None)

    def _evict_one(self) -> None:
        while True:
            if len(self.small) >= self.share or not self.main:
                key = self.small.pop(0)
                if self.uses[key] <= 1:
                    del self.uses[key]
                    self._remember(key)
                    return
                self.uses[key] = 0
                self.main.append(key)
            else:
                key = self.main.pop(0)
                if self.uses[key] == 0:
                    del self.uses[key]
                    return
                self.uses[key] -= 1
                self.main.append(key)

    def _remember(self, key: str) -> None:
        self.ghost.append(key)
        self.ghost = self.ghost[-max(1, self.capacity - self.share) :]


@given(
    capacity=st.sampled_from([1, 2, 3, 4, 5, 21]),
    seed=st.integers(0, 1 << 32),
    keys=st.integers(2, 30),
)
@settings(max_examples=150, deadline=None)
def test_s3fifo_holds_exactly_the_lines_that_the_naive_model_holds(
    capacity: int, seed: int, keys: int
) -> None:
    rng = random.Random(seed)
    kinds = rng.choices(("use", "lose"), (9, 1), k=150)
    calls = [(kind, rng.randrange(keys)) for kind in kinds]
    held, naive, session = S3Fifo(capacity), Naive(capacity), Session(1)
    for kind, number in calls:
        key = f"k{number}"
        if kind == "lose":
            naive.lose(key)
            if key in held:
                held.remove(held[key])
        else:
            naive.use(key)
            if key in held:
                held.touch(key)
            else:
                while len(held) >= capacity:
                    held.remove(held.victim())
                held.add(Line(key, "home", session))
        assert [line.key for line in held.in_order()] == naive.held()
        assert list(held.ghost) == naive.ghost
        assert len(held) <= capacity
        assert len(held) == len(held.small) + len(held.main)
        assert not held.ghost.keys() & held.keys()


@given(capacity=st.integers(1, 12), keys=st.lists(st.integers(0, 15), max_size=60))
@settings(max_examples=25, deadline=None)
def test_a_cache_under_s3fifo_keeps_its_capacity_and_its_values(
    capacity: int, keys: list[int]
) -> None:
    net = LittleNet("a", "b", capacity=capacity, policy="s3fifo")
    cache, naive = net.machines["b"].cache, Naive(capacity)
    for number, each in enumerate(keys):
        key = f"k{each}"
        if number % 7 == 6:
            net.ask("a", key, Delete() if number % 2 else Write(b"0"))  # another node's change
            net.flow()
            naive.lose(key)
        if cache.lookup(key, net.now_ms) is None:
            net.ask("b", key, Write(b"%d" % number))
            net.flow()
        naive.use(key)
        assert [line.key for line in cache.lines.in_order()] == naive.held()
        check_machine(net.machines["b"])


def test_who_comes_back_from_the_ghost_queue_goes_to_the_main_one() -> None:
    held, session = S3Fifo(4), Session(1)
    for key in "abcdea":
        while len(held) >= 4:
            held.remove(held.victim())
        held.add(Line(key, "home", session))
    assert list(held.main) == ["a"]
    assert "a" not in held.ghost


def hit_ratio(policy: Policy, capacity: int, trace: list[int]) -> float:
    held, session, hits = slots(policy, capacity), Session(1), 0
    for number in trace:
        key = f"k{number}"
        if key in held:
            held.touch(key)
            hits += 1
            continue
        while len(held) >= capacity:
            held.remove(held.victim())
        held.add(Line(key, "home", session))
    return hits / len(trace)


def test_on_a_zipf_trace_s3fifo_hits_more_often_than_lru() -> None:
    keys, capacity = 5_000, 500
    weights = list(accumulate(1 / rank for rank in range(1, keys + 1)))
    trace = random.Random(7).choices(range(keys), cum_weights=weights, k=40_000)
    lru, s3fifo = (hit_ratio(policy, capacity, trace) for policy in ("lru", "s3fifo"))
    assert s3fifo > lru + 0.03, (s3fifo, lru)


def test_a_scan_does_not_empty_the_main_queue() -> None:
    held, session = S3Fifo(100), Session(1)
    for key in [f"hot{n}" for n in range(50)] * 3 + [f"scan{n}" for n in range(10_000)]:
        if key in held:
            held.touch(key)
            continue
        while len(held) >= 100:
            held.remove(held.victim())
        held.add(Line(key, "home", session))
    assert sum(f"hot{n}" in held for n in range(50)) == 50
