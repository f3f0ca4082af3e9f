"""A litmus table: a few machines, a few clients, a network that shuffles. Lean, because a verdict
needs tens of thousands of runs: no disks, no faults but those of the network.

`WatchedTable` plays the same runs and says what they met: a verdict counts only if the seeds really
lead to other orders, evictions, lost messages and leases that run out.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from functools import lru_cache
from random import Random
from typing import Any

from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import Message
from mesi_cache.core.placement import Placement
from mesi_cache.core.records import Record, Write
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Found, Step, Unavailable

Test = dict[str, Any]
GIVE_UP_MS = 60_000.0
# How the seed may set the table: (slots, lease, how long a slow message takes, chances).
_MOODS = (
    (8, 2_000, 3.0, 0.1, 0.0),  # quiet
    (8, 2_000, 20.0, 0.3, 0.0),  # much reordering
    (1, 2_000, 3.0, 0.1, 0.0),  # every second access evicts
    (2, 2_000, 20.0, 0.2, 0.01),  # losses and repetitions
    (8, 50, 50.0, 0.2, 0.0),  # leases run out under way
    (8, 50, 3.0, 0.1, 0.0),  # one direction of one link is cut for longer than a lease
)
_CUT_MS = 80.0
_CROWD = " crowd"  # a key that only takes up room
_MOST_NODES = 8
_SUFFIXES = 97  # prime to the number of moods, so that each meets all


@lru_cache
def _placement(nodes: int) -> Placement:
    return Placement([f"n{number}" for number in range(nodes)])


class Inconclusive(Exception):
    """A client was told 503: this run proves nothing."""


class Table:
    """One run of one test: the same events in the same order for the same seed."""

    def __init__(self, test: Test, seed: int) -> None:
        self.rng = Random(seed)
        slots, lease_ms, self._slow_ms, self._slow, self._lose = _MOODS[seed % len(_MOODS)]
        self._threads: list[list[list[Any]]] = test["threads"]
        self._forbidden: dict[str, int] = test["forbidden"]
        # Three nodes, on which more threads go round, or a node for each of them.
        crowded = len(self._threads) > 3 and self.rng.random() < 0.3
        placement = _placement(3 if crowded else min(_MOST_NODES, max(3, len(self._threads))))
        names = placement.members
        # A suffix drawn by the seed spreads the keys over other homes.
        self._suffix = f".{seed % _SUFFIXES}"
        self.keys = {op[1] for thread in self._threads for op in thread}
        self.now_ms = 1_000.0
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._number = 0
        self.machines: dict[str, Machine] = {}
        for name in names:
            settings = Settings(name, slots, lease_ms, resend_ms=150, call_ms=50_000)
            self.machines[name] = Machine(settings, placement, 1)
        for machine in self.machines.values():
            machine.incarnations.update(dict.fromkeys(names, 1))
        self._crowded = slots < 8
        self._memory = {key + self._suffix: Record(b"0", 1) for key in (*self.keys, _CROWD)}
        # Looking at the clock now and then is what a timer comes to, and costs less.
        self._tick_ms = lease_ms / 2.5 if lease_ms < 1_000 else 40.0
        for name in names:
            self._at(self.rng.random() * self._tick_ms, self._tick, name)
        self._waiting: dict[tuple[str, int], Any] = {}
        self._left = 0
        self._began_ms = self._healed_ms = self.now_ms
        self._cut: tuple[str, ...] = ("", "")
        if seed % len(_MOODS) == len(_MOODS) - 1:
            self._cut = tuple(self.rng.sample(names, 2))
        self.registers: dict[str, int] = {}

    def play(self) -> dict[str, int]:
        """Registers, and the final values of the keys that `forbidden` names."""
        rng, names = self.rng, list(self.machines)
        # Somebody may hold a copy from before: old copies are what goes wrong.
        for key in sorted(self.keys):
            for name in names:
                if rng.random() < 0.3:
                    self._ask(name, key, None, None)
        if rng.random() < 0.7:
            self._run(lambda: not self._waiting)
        self._began_ms, self._healed_ms = self.now_ms, self.now_ms + _CUT_MS
        # Behind a cut a write takes a lease; the others must still be there by then.
        spread_ms = _CUT_MS if self._cut[0] else 3.0
        first = rng.randrange(len(names))
        for number, thread in enumerate(self._threads):
            self._left += 1
            name = names[(first + number) % len(names)]
            self._at(rng.random() * spread_ms, self._next, name, iter(thread))
        if self._crowded:
            for name in names:
                self._at(rng.random() * 6.0, self._ask, name, _CROWD, None, None)
        self._run(lambda: not self._left)
        final: dict[str, int] = {}
        asked = [key for key in self._forbidden if key in self.keys]
        for key in asked:
            self._ask(rng.choice(names), key, final, key)
        self._run(lambda: len(final) == len(asked))
        return {**self.registers, **final}

    # --- clients ------------------------------------------------------------------------------

    def _next(self, name: str, thread: Any) -> None:
        """The thread's next operation; it waits for the answer."""
        operation = next(thread, None)
        if operation is None:
            self._left -= 1
            return
        kind, key, third = operation
        then = (self._next, name, thread)
        if kind == "w":
            self._change(name, key, third, then)
        else:
            self._ask(name, key, self.registers, third, then)

    def _ask(self, name: str, key: str, into: Any, register: Any, then: Any = None) -> None:
        machine = self.machines[name]
        line = machine.cache.lookup(key + self._suffix, self.now_ms)
        if line is not None:
            if into is not None:
                into[register] = int(line.record.value or b"0")
            if then is not None:
                self._at(self.rng.random(), *then)
            return
        step = Step(self.now_ms, 0.0)
        token = machine.cache.submit(step, key + self._suffix, None)
        self._waiting[name, token] = (into, register, then)
        self._carry_out(name, step)

    def _change(self, name: str, key: str, value: int, then: Any) -> None:
        step = Step(self.now_ms, 0.0)
        write = Write(b"%d" % value)
        token = self.machines[name].cache.submit(step, key + self._suffix, write)
        self._waiting[name, token] = (None, None, then)
        self._carry_out(name, step)

    # --- the world ----------------------------------------------------------------------------

    def _at(self, delay_ms: float, action: Any, *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.now_ms + delay_ms, self._number, action, arguments))

    def _run(self, done: Any) -> None:
        events, pop = self._events, heapq.heappop
        while not done():
            self.now_ms, _, action, arguments = pop(events)
            action(*arguments)
            if self.now_ms > GIVE_UP_MS:
                raise AssertionError("nobody makes progress")

    def _arrive(self, name: str, source: str, message: Message) -> None:
        step = Step(self.now_ms, 0.0)
        self.machines[name].receive(step, source, 1, message)
        self._carry_out(name, step)

    def _tick(self, name: str) -> None:
        step = Step(self.now_ms, 0.0)
        self.machines[name].tick(step)
        if step.send or step.answers:
            self._carry_out(name, step)
        self._at(self._tick_ms, self._tick, name)

    def _carry_out(self, name: str, step: Step) -> None:
        rng = self.rng
        machine = self.machines[name]
        for logged in step.log:
            if logged.record is not None:
                self._memory[logged.key] = logged.record
        for target, message in step.send:
            if target == name:
                after = Step(self.now_ms, 0.0)
                machine.receive(after, name, 1, message)
                self._carry_out(name, after)
                continue
            chance = rng.random()
            if chance < self._lose or (
                (name, target) == self._cut and self._began_ms <= self.now_ms < self._healed_ms
            ):
                continue
            slow = chance > 1 - self._slow
            self._at(
                rng.random() * (self._slow_ms if slow else 1.0),
                self._arrive,
                target,
                name,
                message,
            )
            if self._lose and chance > 1 - self._lose:
                self._at(rng.random() * 50.0, self._arrive, target, name, message)
        for token, answer in step.answers:
            into, register, then = self._waiting.pop((name, token))
            if isinstance(answer, Unavailable):
                raise Inconclusive(answer.reason)
            if into is not None and isinstance(answer, Found):
                into[register] = int(answer.value)
            if then is not None:
                self._at(rng.random(), *then)
        for key in step.load:
            after = Step(self.now_ms, 0.0)
            machine.loaded(after, key, self._memory.get(key))
            self._carry_out(name, after)


class WatchedTable(Table):
    """Counts what happens, and sums up the order of events in `order` (a checksum)."""

    def __init__(self, test: Test, seed: int) -> None:
        self.order = 0
        self.met: Counter[str] = Counter()
        self._last_sent: dict[tuple[Any, ...], float] = {}
        super().__init__(test, seed)

    def play(self) -> dict[str, int]:
        outcome = super().play()
        for machine in self.machines.values():
            for name in machine.counts.__slots__:
                self.met[name] += getattr(machine.counts, name)
        return outcome

    def _at(self, delay_ms: float, action: Any, *arguments: Any) -> None:
        super()._at(delay_ms, action, *arguments)
        if action == self._arrive:
            way, at_ms = arguments[:2], self.now_ms + delay_ms
            self.met["messages"] += 1
            self.met["reordered"] += at_ms < self._last_sent.get(way, 0.0)
            self._last_sent[way] = max(at_ms, self._last_sent.get(way, 0.0))

    def _next(self, name: str, thread: Any) -> None:
        self._sum("next", name)
        super()._next(name, thread)

    def _arrive(self, name: str, source: str, message: Message) -> None:
        self._sum(source, name, type(message).__name__)
        super()._arrive(name, source, message)

    def _sum(self, *what: str) -> None:
        self.order = zlib.crc32(" ".join(what).encode(), self.order)
