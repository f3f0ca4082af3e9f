"""Machines on a table: the test decides which message arrives when."""

from __future__ import annotations

from mesi_cache.core.cache.slots import Policy
from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import Message
from mesi_cache.core.records import Once, Operation, Record
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Answer, Logged, Step

LEASE_MS = 1_000


class LittleNet:
    """`wires[a, b]` holds what a has sent to b and what has not arrived yet, oldest first."""

    def __init__(self, *names: str, capacity: int = 4, policy: Policy = "lru") -> None:
        self.now_ms = 1_000.0
        self.wall_ms = 5_000_000.0
        self.capacity = capacity
        self.policy: Policy = policy
        self.names = list(names)
        self.machines: dict[str, Machine] = {}
        self.memory: dict[str, dict[str, Record]] = {name: {} for name in names}
        self.log: dict[str, list[Logged]] = {name: [] for name in names}
        self.wires: dict[tuple[str, str], list[Message]] = {}
        self.answers: dict[tuple[str, int], Answer] = {}
        for name in names:
            self.start(name, 1)
        self.introduce()

    def start(self, name: str, epoch: int) -> Machine:
        """A new life of `name`, with what its log remembers."""
        rows = [(x.source, x.floor, x.operation_id, x.outcome) for x in self.log[name] if x.source]
        retries = [
            (x.once.name, x.once.print, x.once_until_ms, x.outcome)
            for x in self.log[name]
            if x.once is not None and x.outcome is not None
        ]
        machine = Machine(
            Settings(
                name, self.capacity, LEASE_MS, resend_ms=100, call_ms=4_000, policy=self.policy
            ),
            self.names,
            epoch,
            applied=rows,
            retries=retries,
            grants_from_ms=self.now_ms + LEASE_MS if epoch > 1 else 0.0,
        )
        self.machines[name] = machine
        self.answers = {call: a for call, a in self.answers.items() if call[0] != name}
        return machine

    def introduce(self) -> None:
        """Everybody knows which life everybody is in."""
        for machine in self.machines.values():
            for name, other in self.machines.items():
                machine.incarnations[name] = other.epoch

    def key_of(self, home: str, number: int = 0) -> str:
        """The `number`th key whose home is `home`."""
        placement = self.machines[self.names[0]].placement
        keys = (f"k{i}" for i in range(10_000))
        return [key for key in (next(keys) for _ in range(200)) if placement.home(key) == home][
            number
        ]

    def step(self) -> Step:
        return Step(self.now_ms, self.wall_ms)

    def ask(
        self, name: str, key: str, operation: Operation | None = None, once: str = ""
    ) -> tuple[str, int]:
        """A client's call; its answer appears in `answers` under what this returns."""
        step = self.step()
        named = Once.of(once, key, operation) if once and operation else None
        token = self.machines[name].cache.submit(step, key, operation, named)
        self.carry_out(name, step)
        return name, token

    def carry_out(self, name: str, step: Step) -> None:
        for logged in step.log:
            self.log[name].append(logged)
            if logged.record is not None:
                self.memory[name][logged.key] = logged.record
        for target, message in step.send:
            if target == name:
                after = self.step()
                self.machines[name].receive(after, name, self.machines[name].epoch, message)
                self.carry_out(name, after)
            else:
                self.wires.setdefault((name, target), []).append(message)
        for token, answer in step.answers:
            assert (name, token) not in self.answers, "answered twice"
            self.answers[name, token] = answer
        for key in step.load:
            after = self.step()
            self.machines[name].loaded(after, key, self.memory[name].get(key))
            self.carry_out(name, after)

    def deliver(self, source: str, target: str, kind: type | None = None) -> Message:
        """The oldest message (of `kind`) on its way arrives."""
        wire = self.wires[source, target]
        at = next(i for i, m in enumerate(wire) if kind is None or isinstance(m, kind))
        message = wire.pop(at)
        self.receive(source, target, message)
        return message

    def receive(self, source: str, target: str, message: Message) -> None:
        step = self.step()
        self.machines[target].receive(step, source, self.machines[source].epoch, message)
        self.carry_out(target, step)

    def flow(self) -> None:
        """Everything on its way arrives, until nothing is."""
        while any(self.wires.values()):
            for (source, target), wire in list(self.wires.items()):
                if wire:
                    self.deliver(source, target)

    def lose_all(self) -> None:
        self.wires.clear()

    def pass_time(self, ms: float) -> None:
        """Time goes on; everybody does what is due, and nothing arrives."""
        end_ms = self.now_ms + ms
        while self.now_ms < end_ms:
            self.now_ms = min(end_ms, self.now_ms + 50)
            self.wall_ms += 50
            for name, machine in self.machines.items():
                step = self.step()
                machine.tick(step)
                self.carry_out(name, step)

    def state(self, name: str, key: str) -> str:
        line = self.machines[name].cache.table.get(key)
        return str(line.state) if line else "I"

    def entry_state(self, name: str, key: str) -> str:
        entry = self.machines[name].directory.entries.get(key)
        return str(entry.state) if entry else "N"
