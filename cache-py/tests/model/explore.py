"""Breadth-first search over the pure core: every order in which messages can arrive.

A world is two or three machines, the messages on their way, what the clients have yet to ask, and a
budget of mishaps. From each world every possible move is made; worlds that are the same (see
canonical.py) are looked at once. Self-addressed messages and store reads happen at once, as in
node.py. Where no move is left, time goes on by itself, nothing is lost any more, and everybody who
still waits must be answered: nothing is stuck, whatever went wrong before.
"""

from __future__ import annotations

import copyreg
import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

from canonical import Flat, Picture, ranked

from mesi_cache.core.invariants import check_cluster, check_machine
from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import Message, Renew, RenewAck
from mesi_cache.core.placement import Placement
from mesi_cache.core.records import Once, Operation, Outcome, Record
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Changed, Found, Logged, Missing, Step, Unavailable

LEASE_MS = 1_000
RESEND_MS = 700
LONG_ENOUGH = 40  # jumps of time after which everybody must have his answer

Letter = tuple[str, str, int, Message]  # from, to, the sender's life, what
Move = tuple[str, Any]


@dataclass(frozen=True)
class Named:
    """An operation with an Idempotency-Key: who asks for it again must hear the same."""

    name: str
    operation: Operation


Ask = Operation | Named | None  # None: a read
Script = Sequence[tuple[str, Ask]]


@dataclass(frozen=True)
class Budget:
    """How often each mishap may still happen. `time` lists jumps, in the order in which they come:
    720 is past every resend, 975 past the cache's part of a lease, 1100 past all of it."""

    drop: int = 0
    repeat: int = 0
    crash: int = 0
    evict: int = 0
    sleep: int = 0  # a node does not notice a jump of time
    time: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """What is explored: who asks for what, what may go wrong, how much may be on its way."""

    scripts: Mapping[str, Script]
    budget: Budget = Budget()
    most_letters: int = 4
    capacity: int = 1
    alike: tuple[str, ...] = ()  # nodes that play the same part

    def placement(self) -> Placement:
        return _placement(tuple(self.scripts))

    def renamings(self) -> list[dict[str, str]]:
        """Every way in which nodes that are alike may change places."""
        return [
            {name: name for name in self.scripts} | dict(zip(self.alike, order, strict=True))
            for order in permutations(self.alike)
        ]


@dataclass
class World:
    case: Case
    budget: Budget
    now_ms: float = 1_000.0
    asked_of: dict[str, int] = field(default_factory=dict)  # how much of each script is begun
    packed: dict[str, bytes] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)
    memory: dict[str, dict[str, Record]] = field(default_factory=dict)
    logs: dict[str, list[Logged]] = field(default_factory=dict)
    # (node, token) -> the key, the version that was acknowledged when the call was made, its name
    waiting: dict[tuple[str, int], tuple[str, int, str]] = field(default_factory=dict)
    told: dict[str, Outcome] = field(default_factory=dict)  # name -> what its first asker heard
    acknowledged: dict[str, int] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict, repr=False)

    @classmethod
    def begin(cls, case: Case) -> World:
        world = cls(case, case.budget)
        for name in case.scripts:
            world.memory[name], world.logs[name], world.asked_of[name] = {}, [], 0
            world.machines[name] = world._machine(name, 1)
        for machine in world.machines.values():
            machine.incarnations.update(dict.fromkeys(case.scripts, 1))
        return world

    def pack(self) -> World:
        """As it lies in the queue."""
        for name, machine in self.machines.items():
            self.packed.setdefault(name, pickle.dumps(machine, pickle.HIGHEST_PROTOCOL))
        self.machines = {}
        return self

    def unpacked(self) -> dict[str, Machine]:
        return {name: pickle.loads(packed) for name, packed in self.packed.items()}  # noqa: S301 - our own bytes

    def fork(self, machines: dict[str, Machine]) -> World:
        """The same world for one move. Machines that the move does not touch are shared."""
        return replace(
            self,
            asked_of=dict(self.asked_of), packed=dict(self.packed), letters=list(self.letters),
            memory={home: dict(rows) for home, rows in self.memory.items()},
            logs={home: list(rows) for home, rows in self.logs.items()},
            waiting=dict(self.waiting), acknowledged=dict(self.acknowledged),
            told=dict(self.told),
            machines=dict(machines),
        )  # fmt: skip

    def _machine(self, name: str, epoch: int) -> Machine:
        log = self.logs[name]
        rows = [(x.source, x.floor, x.operation_id, x.outcome) for x in log if x.source]
        retries = [
            (x.once.name, x.once.print, x.once_until_ms, x.outcome)
            for x in log
            if x.once is not None and x.outcome is not None
        ]
        return Machine(
            _settings(name, self.case.capacity),
            self.case.placement(),
            epoch,
            applied=rows,
            retries=retries,
            grants_from_ms=self.now_ms + LEASE_MS if epoch > 1 else 0.0,
        )

    def _own(self, name: str) -> Machine:
        """`name`'s machine, to be changed by this move."""
        packed = self.packed.pop(name, None)
        if packed is not None:
            self.machines[name] = pickle.loads(packed)  # noqa: S301 - our own bytes
        return self.machines[name]

    # --- moves --------------------------------------------------------------------------------

    def moves(self) -> list[Move]:
        budget = self.budget
        moves: list[Move] = [
            ("ask", name)
            for name, script in self.case.scripts.items()
            if self.asked_of[name] < len(script)
        ]
        seen: set[str] = set()
        for at, letter in enumerate(self.letters):
            text = repr(letter)
            if text in seen:
                continue  # a second copy of the same letter
            seen.add(text)
            moves.append(("deliver", at))
            if budget.drop:
                moves.append(("drop", at))
            if budget.repeat:
                moves.append(("repeat", at))
        if budget.crash:
            moves += [("crash", name) for name in self.case.scripts]
        if budget.evict:
            moves += [("evict", name) for name, m in self.machines.items() if m.cache.lines]
        if budget.time:
            moves.append(("time", ""))
            if budget.sleep:
                moves += [("time", name) for name in self.case.scripts]
        return moves

    def make(self, move: Move) -> None:
        kind, which = move
        budget = self.budget
        match kind:
            case "ask":
                key, operation = self.case.scripts[which][self.asked_of[which]]
                self.asked_of[which] += 1
                self._ask(which, key, operation)
            case "deliver":
                self._deliver(which)
            case "drop":
                self.letters.pop(which)
                self.budget = replace(budget, drop=budget.drop - 1)
            case "repeat":
                self.letters.append(self.letters[which])
                self.budget = replace(budget, repeat=budget.repeat - 1)
            case "crash":
                self.budget = replace(budget, crash=budget.crash - 1)
                epoch = self._own(which).epoch
                self.machines[which] = self._machine(which, epoch + 1)
                self.waiting = {c: asked for c, asked in self.waiting.items() if c[0] != which}
            case "evict":
                self.budget = replace(budget, evict=budget.evict - 1)
                step = self._step()
                self._own(which).cache.surrender(step, 1)
                self._carry_out(which, step)
            case "time":
                self.budget = replace(
                    budget, time=budget.time[1:], sleep=budget.sleep - bool(which)
                )
                self._pass(budget.time[0], which)

    def _deliver(self, at: int) -> None:
        source, target, life, message = self.letters.pop(at)
        step = self._step()
        self._own(target).receive(step, source, life, message)
        self._carry_out(target, step)

    def _pass(self, ms: float, asleep: str = "") -> None:
        self.now_ms += ms
        for name in self.case.scripts:
            if name != asleep:
                step = self._step()
                self._own(name).tick(step)
                self._carry_out(name, step)

    def _ask(self, name: str, key: str, ask: Ask) -> None:
        machine = self._own(name)
        once, operation = None, ask
        if isinstance(ask, Named):
            once, operation = Once.of(ask.name, key, ask.operation), ask.operation
        floor = self.acknowledged.get(key, 0)
        if operation is None:
            line = machine.cache.lookup(key, self.now_ms)
            if line is not None:
                assert line.record.version >= floor, f"a hit showed {line.record.version} < {floor}"
                return
        step = self._step()
        token = machine.cache.submit(step, key, operation, once)
        self.waiting[name, token] = (key, floor, once.name if once else "")
        self._carry_out(name, step)

    def _step(self) -> Step:
        return Step(self.now_ms, 0.0)

    def _carry_out(self, name: str, step: Step) -> None:
        machine = self.machines[name]
        for logged in step.log:
            if logged.record is not None and logged.once is not None:
                done = [x.once.name for x in self.logs[name] if x.record and x.once]
                assert logged.once.name not in done, f"{logged.once.name} is done twice"
            self.logs[name].append(logged)
            if logged.record is not None:
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

    # --- what must be true --------------------------------------------------------------------

    def _check_answer(self, name: str, token: int, answer: Any) -> None:
        """No read shows less than what was acknowledged when it was asked."""
        key, floor, named = self.waiting.pop((name, token))
        match answer:
            case Found(version=version):
                assert version >= floor, f"{name} read version {version}, {floor} was acknowledged"
                seen = version
            case Changed(outcome):
                seen = outcome.version
                first = self.told.setdefault(named, outcome) if named else outcome
                assert outcome == first, f"{named}: {first}, and then {outcome}"
            case Missing():
                records = [memory[key] for memory in self.memory.values() if key in memory]
                deleted = any(r.value is None and r.version > floor for r in records)
                assert deleted or not floor, f"{name} found nothing, {floor} was acknowledged"
                seen = 0
            case Unavailable():
                return
        # What somebody was told is in its home's log, whatever dies now.
        home = self.case.placement().home(key)
        logged = self.memory[home].get(key)
        assert seen <= (logged.version if logged else 0), f"{name} was told {seen}: not logged"
        self.acknowledged[key] = max(seen, self.acknowledged.get(key, 0))

    def check(self) -> None:
        for name, machine in self.machines.items():
            if name not in self.packed:
                check_machine(machine)
                assert machine.counts.ignored == 0, "a message that no table foresees"
        check_cluster([(machine, self.now_ms) for machine in self.machines.values()])

    def settle(self) -> None:
        """From here on nothing goes wrong: everybody who waits is answered."""
        for _ in range(LONG_ENOUGH):
            while self.letters:
                self._deliver(0)
                self.check()
            if not self.waiting:
                return
            self._pass(RESEND_MS + 20)
        raise AssertionError(f"deadlock: {list(self.waiting)} wait for ever")

    # --- sameness -----------------------------------------------------------------------------

    def mark(self) -> int:
        """The smallest of its pictures under all renamings of nodes that are alike."""
        return min(self._mark(renamed) for renamed in self.case.renamings())

    def _mark(self, renamed: dict[str, str]) -> int:
        names = sorted(self.case.scripts)
        placement = self.case.placement()

        def picture() -> Picture:
            return Picture(names, renamed, self.now_ms)

        in_order = sorted(names, key=renamed.__getitem__)
        machines = [picture().machine(self.machines[name]) for name in in_order]
        letters = []
        for source, target, life, message in self.letters:
            home = source if isinstance(message, RenewAck) else target
            if not isinstance(message, Renew | RenewAck):
                home = placement.home(getattr(message, "key", ""))
            letters.append(picture().letter(home, source, target, life, message))
        return ranked(machines, letters, self._rest(renamed, in_order))

    def _rest(self, renamed: dict[str, str], in_order: list[str]) -> Flat:
        more: Flat = [self.budget, *sorted(self.acknowledged.items())]
        more += sorted((name, repr(outcome)) for name, outcome in self.told.items())
        for name in in_order:
            more += [self.asked_of[name], *sorted(self.memory[name].items())]
            more += sorted(
                asked for (node, _), asked in self.waiting.items() if node == name
            )  # fmt: skip
        return [x if isinstance(x, int) else repr(x) for x in more]


def _settings_of(me: str, capacity: int) -> Settings:
    return Settings(me, capacity, LEASE_MS, resend_ms=RESEND_MS, call_ms=1_000_000)


_SETTINGS: dict[tuple[str, int], Settings] = {}
_PLACEMENTS: dict[tuple[str, ...], Placement] = {}


def _settings(me: str, capacity: int) -> Settings:
    return _SETTINGS.setdefault((me, capacity), _settings_of(me, capacity))


def _placement(members: tuple[str, ...]) -> Placement:
    members = tuple(sorted(members))
    return _PLACEMENTS.setdefault(members, Placement(list(members)))


# What never changes need not be packed with every machine.
copyreg.pickle(Placement, lambda p: (_placement, (tuple(p.members),)))
copyreg.pickle(Settings, lambda s: (_settings, (s.me, s.capacity)))


@dataclass
class Explored:
    worlds: int = 0
    moves: int = 0
    quiet: int = 0
    crowded: int = 0  # not followed: more letters than the bound
    deepest: int = 0
    complete: bool = False

    def __str__(self) -> str:
        whole = "all" if self.complete else "the first"
        return (
            f"{whole} {self.worlds} worlds, {self.moves} moves, depth {self.deepest}, "
            f"{self.quiet} ends, {self.crowded} beyond the bound"
        )


Path = tuple[Any, ...] | None


def explore(case: Case, *, most_worlds: int) -> Explored:
    """Make every move from every world; raises AssertionError with the moves that led there.

    Worlds with more than `case.most_letters` messages on their way are checked, not followed.
    """
    start = World.begin(case)
    seen = {start.mark()}
    queue: deque[tuple[World, Path, int]] = deque([(start.pack(), None, 0)])
    result = Explored()
    while queue:
        if result.worlds >= most_worlds:
            return result
        world, path, depth = queue.popleft()
        result.worlds += 1
        result.deepest = max(result.deepest, depth)
        machines = world.unpacked()
        world.machines = machines
        moves = world.moves()
        if not moves:
            result.quiet += 1
            _settle(world.fork(machines), path)
        for move in moves:
            result.moves += 1
            after = world.fork(machines)
            step = (_describe(after, move), path)
            try:
                after.make(move)
                after.check()
            except AssertionError as error:
                raise _found(error, step) from error
            if len(after.letters) > case.most_letters:
                result.crowded += 1
                continue
            mark = after.mark()
            if mark not in seen:
                seen.add(mark)
                queue.append((after.pack(), step, depth + 1))
    result.complete = True
    return result


def _settle(world: World, path: Path) -> None:
    try:
        world.settle()
    except AssertionError as error:
        raise _found(error, path) from error


def _found(error: AssertionError, path: Path) -> AssertionError:
    return AssertionError(f"{error}\n" + "\n".join(reversed(list(_unroll(path)))))


def _describe(world: World, move: Move) -> str:
    kind, which = move
    return f"{kind} {world.letters[which] if isinstance(which, int) else which}"


def _unroll(path: Path) -> Iterator[str]:
    while path is not None:
        line, path = path
        yield line
