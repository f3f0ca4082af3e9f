"""Breadth-first search over the pure core: every order in which messages can arrive.

A world is two or three machines, the messages on their way, what the clients have yet to ask, and a
budget of mishaps. From each world every possible move is made; worlds that differ only in what no
longer matters are the same. Self-addressed messages and store reads happen at once, as in node.py.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mesi_cache.core.invariants import check_cluster, check_machine
from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import Message
from mesi_cache.core.records import Operation, Record
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Changed, Found, Logged, Missing, Step, Unavailable

LEASE_MS = 1_000

Letter = tuple[str, str, int, Message]  # from, to, the sender's incarnation, what


@dataclass
class Budget:
    """How often each mishap may still happen."""

    drop: int = 0
    repeat: int = 0
    restart: int = 0
    time: int = 0
    evict: int = 0


@dataclass
class World:
    scripts: dict[str, list[tuple[str, Operation | None]]]
    budget: Budget
    capacity: int = 1
    now_ms: float = 1_000.0
    machines: dict[str, Machine] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)
    memory: dict[str, dict[str, Record]] = field(default_factory=dict)
    logs: dict[str, list[Logged]] = field(default_factory=dict)
    # (node, token) -> the version that was acknowledged when the call was made
    asked: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    mishaps: int = 0

    def begin(self) -> World:
        names = list(self.scripts)
        for name in names:
            self.memory[name], self.logs[name] = {}, []
            self.machines[name] = self._machine(name, 1)
        for machine in self.machines.values():
            machine.incarnations.update(dict.fromkeys(names, 1))
        return self

    def _machine(self, name: str, epoch: int) -> Machine:
        rows = [(x.source, x.floor, x.operation_id, x.outcome) for x in self.logs[name]]
        return Machine(
            Settings(name, self.capacity, LEASE_MS, resend_ms=700, call_ms=100_000),
            list(self.scripts),
            epoch,
            applied=rows,
            grants_from_ms=self.now_ms + LEASE_MS if epoch > 1 else 0.0,
        )

    # --- moves --------------------------------------------------------------------------------

    def moves(self) -> list[tuple[str, Any]]:
        moves: list[tuple[str, Any]] = [
            ("ask", name) for name, left in self.scripts.items() if left
        ]
        for at in range(len(self.letters)):
            moves.append(("deliver", at))
            if self.budget.drop:
                moves.append(("drop", at))
            if self.budget.repeat:
                moves.append(("repeat", at))
        moves += [("restart", name) for name in self.machines if self.budget.restart]
        if self.budget.evict:
            moves += [("evict", name) for name, m in self.machines.items() if m.cache.lines]
        if self.budget.time:
            moves.append(("time", None))
        return moves

    def make(self, move: tuple[str, Any]) -> None:
        kind, which = move
        match kind:
            case "ask":
                key, operation = self.scripts[which].pop(0)
                self._ask(which, key, operation)
            case "deliver":
                source, target, incarnation, message = self.letters.pop(which)
                step = self._step()
                self.machines[target].receive(step, source, incarnation, message)
                self._carry_out(target, step)
            case "drop":
                self.letters.pop(which)
                self.budget.drop -= 1
                self.mishaps += 1
            case "repeat":
                self.letters.append(self.letters[which])
                self.budget.repeat -= 1
            case "restart":
                self.budget.restart -= 1
                self.mishaps += 1
                self.machines[which] = self._machine(which, self.machines[which].epoch + 1)
                self.asked = {call: v for call, v in self.asked.items() if call[0] != which}
            case "evict":
                self.budget.evict -= 1
                step = self._step()
                self.machines[which].cache.surrender(step, 1)
                self._carry_out(which, step)
            case "time":
                # Long enough for whatever was sent again; the last of them ends every lease.
                self.budget.time -= 1
                self.now_ms += 800 if self.budget.time else LEASE_MS + 100
                for name, machine in self.machines.items():
                    step = self._step()
                    machine.tick(step)
                    self._carry_out(name, step)

    def _ask(self, name: str, key: str, operation: Operation | None) -> None:
        machine = self.machines[name]
        floor = self.acknowledged.get(key, 0)
        if operation is None:
            line = machine.cache.lookup(key, self.now_ms)
            if line is not None:
                assert line.record.version >= floor, f"a hit showed {line.record.version} < {floor}"
                return
        step = self._step()
        token = machine.cache.submit(step, key, operation)
        self.asked[name, token] = (key, floor)
        self._carry_out(name, step)

    def _step(self) -> Step:
        return Step(self.now_ms, 0.0)

    def _carry_out(self, name: str, step: Step) -> None:
        machine = self.machines[name]
        for logged in step.log:
            self.logs[name].append(logged)
            self.memory[name][logged.key] = logged.record
        for target, message in step.send:
            if target == name:
                after = self._step()
                machine.receive(after, name, machine.epoch, message)
                self._carry_out(name, after)
            else:
                self.letters.append((name, target, machine.epoch, message))
        for token, answer in step.answers:
            self._check_answer(name, token, answer)
        for key in step.load:
            after = self._step()
            machine.loaded(after, key, self.memory[name].get(key))
            self._carry_out(name, after)

    def _check_answer(self, name: str, token: int, answer: Any) -> None:
        """No read shows less than what was acknowledged when it was asked."""
        key, floor = self.asked.pop((name, token))
        match answer:
            case Found(version=version):
                assert version >= floor, f"{name} read version {version}, {floor} was acknowledged"
                seen = version
            case Changed(outcome):
                seen = outcome.version
            case Missing():
                records = [memory[key] for memory in self.memory.values() if key in memory]
                deleted = any(r.value is None and r.version > floor for r in records)
                assert deleted or not floor, f"{name} found nothing, {floor} was acknowledged"
                seen = 0
            case Unavailable():
                return
        self.acknowledged[key] = max(seen, self.acknowledged.get(key, 0))

    def check(self) -> None:
        for machine in self.machines.values():
            check_machine(machine)
            assert machine.counts.ignored == 0, "a message that no table foresees"
        check_cluster([(machine, self.now_ms) for machine in self.machines.values()])
        quiet = not self.letters and not any(self.scripts.values())
        if quiet and not self.mishaps:
            assert not self.asked, f"no deadlock: {list(self.asked)} still wait"

    # --- sameness -----------------------------------------------------------------------------

    def fingerprint(self) -> int:
        letters = sorted(map(repr, self.letters))
        parts = [
            *letters,
            repr(self.scripts),
            repr(self.budget),
            repr(self.now_ms),
            repr(self.asked),
            repr(self.acknowledged),
            *(repr(_freeze(machine.cache)) for machine in self.machines.values()),
            *(repr(_freeze(machine.directory)) for machine in self.machines.values()),
            *(repr(machine.incarnations) for machine in self.machines.values()),
        ]
        return hash("\n".join(parts))


_SKIPPED = {"_counts", "_settings", "_placement", "_names"}


def _freeze(value: Any) -> Any:
    """Anything of the core as nested tuples."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | Enum():
            return value
        case dict():
            return tuple((k, _freeze(v)) for k, v in value.items())
        case list() | tuple() | deque():
            return tuple(_freeze(item) for item in value)
    slots = getattr(type(value), "__slots__", None)
    if slots is not None and not hasattr(value, "__struct_fields__"):
        return tuple(_freeze(getattr(value, name)) for name in slots)
    if hasattr(value, "__dict__"):
        return tuple(_freeze(v) for name, v in vars(value).items() if name not in _SKIPPED)
    return repr(value)


@dataclass
class Explored:
    worlds: int = 0
    quiet: int = 0
    complete: bool = False


def explore(start: World, *, most_letters: int, most_worlds: int) -> Explored:
    """Make every move from every world; raises AssertionError with the moves that led there.

    Worlds with more than `most_letters` messages on their way are not followed.
    """
    seen = {start.fingerprint()}
    queue: deque[tuple[bytes, tuple[Any, ...] | None]] = deque([(pickle.dumps(start), None)])
    result = Explored()
    while queue:
        if result.worlds >= most_worlds:
            return result
        packed, path = queue.popleft()
        world: World = pickle.loads(packed)  # noqa: S301 - our own bytes
        result.worlds += 1
        moves = world.moves()
        result.quiet += not moves
        for number, move in enumerate(moves):
            if number:
                world = pickle.loads(packed)  # noqa: S301
            step = (_describe(world, move), path)
            try:
                world.make(move)
                world.check()
            except AssertionError as error:
                raise AssertionError(
                    f"{error}\n" + "\n".join(reversed(list(_unroll(step))))
                ) from error
            if len(world.letters) > most_letters:
                continue
            mark = world.fingerprint()
            if mark not in seen:
                seen.add(mark)
                queue.append((pickle.dumps(world), step))
    result.complete = True
    return result


def _describe(world: World, move: tuple[str, Any]) -> str:
    kind, which = move
    return f"{kind} {world.letters[which] if isinstance(which, int) else which}"


def _unroll(path: tuple[Any, ...] | None) -> Iterator[str]:
    while path is not None:
        line, path = path
        yield line
