"""The whole cluster in one process: `SimNode` drives the machine exactly as node.py does.

Replay a seed: `make sim SERVICE=cache SEED=123`.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import msgspec

from mesi_cache.core.cache import requester
from mesi_cache.core.cache.slots import Policy
from mesi_cache.core.cache.table import TABLE as LINE_TABLE
from mesi_cache.core.directory import controller as directory_controller
from mesi_cache.core.directory.table import TABLE as ENTRY_TABLE
from mesi_cache.core.invariants import Ledger, check_cluster, check_machine
from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import Hello, Message
from mesi_cache.core.records import Cas, Delete, Incr, Once, Operation, Outcome, Record, Write
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Changed, Found, Missing, Step, Unavailable
from testkit.checkers import linearizable
from testkit.sim import (
    PERFECT,
    ROUGH,
    TIMED_OUT,
    Damaged,
    Disk,
    Faults,
    Harness,
    Host,
    LinkSettings,
    Scenario,
    World,
)

NODES = ("a", "b", "c")
KEYS = ("k3", "w", "k2")  # one key of each home
LEASE_MS = 400
LAST_CALL_MS = 3_000  # then what is under way must come to its end
_codec = msgspec.msgpack.Decoder(tuple[int, Message])


class RecordingTable(dict):  # type: ignore[type-arg]
    """A transition table that counts which of its rows were taken."""

    def __init__(self, prefix: str, rows: dict[Any, Any]) -> None:
        super().__init__(rows)
        self._prefix = prefix
        self.taken: Counter[str] = Counter()

    def get(self, pair: Any, default: Any = None) -> Any:
        row = super().get(pair, default)
        self.taken[f"{self._prefix} {pair[0]} {pair[1]}{'' if row else ' IGNORED'}"] += 1
        return row


class SimNode:
    """Persist, then send, then answer: the contract of `Step`, on a simulated disk."""

    def __init__(self, host: Host, harness: CacheHarness) -> None:
        self.host = host
        self.harness = harness
        self.machine: Machine | None = None
        self._memory: dict[str, Record] = {}
        self._answers: dict[int, Any] = {}
        self._unsynced: deque[tuple[int, Step]] = deque()
        self._writes = 0

    @property
    def now_ms(self) -> float:
        return self.host.now_us() / 1000

    def start(self, disk: Disk) -> None:
        epoch = disk.get("epoch", 0) + 1
        disk.put("epoch", epoch)
        applied, retries = [], []
        for logged in disk.log():
            if isinstance(logged, Damaged):
                break
            if logged.record is not None:
                self._memory[logged.key] = logged.record
            if logged.source:
                row = (logged.source, logged.floor, logged.operation_id, logged.outcome)
                applied.append(row)
            if logged.once is not None and logged.outcome is not None:
                once = logged.once
                retries.append((once.name, once.print, logged.once_until_ms, logged.outcome))
        disk.truncate(sum(1 for line in disk.log() if not isinstance(line, Damaged)))
        self.harness.recovered(self.host.name, self._memory)
        wait_ms = LEASE_MS if epoch > 1 else 0
        self.machine = Machine(
            Settings(
                self.host.name,
                self.harness.capacity,
                LEASE_MS,
                resend_ms=40,
                call_ms=2_000,
                policy=self.harness.policy,
            ),
            list(NODES),
            epoch,
            applied=applied,
            retries=retries,
            grants_from_ms=self.now_ms + wait_ms if wait_ms else 0.0,
        )
        if self.harness.always:
            self._writes += 1
            disk.sync(self._writes)
        else:
            disk.flush()
            self._booted()

    def _booted(self) -> None:
        for peer in self.host.peers:
            self._send(peer, Hello())
        self._arm()

    # --- inputs -------------------------------------------------------------------------------

    def on_message(self, source: str, message: tuple[int, Message]) -> None:
        step = self._step()
        assert self.machine is not None
        self.machine.receive(step, source, *message)
        self._carry_out(step)

    def on_timer(self, name: str) -> None:
        assert self.machine is not None
        step = self._step()
        if name.startswith("load "):
            key = name.removeprefix("load ")
            self.machine.loaded(step, key, self._memory.get(key))
        else:
            self.machine.tick(step)
        self._carry_out(step)

    def on_sync_done(self, token: int) -> None:
        if token == 1 and not self._unsynced:
            self._booted()
        while self._unsynced and self._unsynced[0][0] <= token:
            self._release(self._unsynced.popleft()[1])

    def ask(
        self, key: str, operation: Operation | None, reply: Any, once: Once | None = None
    ) -> None:
        """A client's call, as the HTTP handlers make it."""
        assert self.machine is not None
        now_ms = self.now_ms
        line = self.machine.cache.lookup(key, now_ms) if operation is None else None
        if line is not None:
            value = line.record.value
            assert value is not None
            reply.resolve(Found(value, line.record.version, "", True))
            self.host.cover("hits")
            return
        step = self._step()
        self._answers[self.machine.cache.submit(step, key, operation, once)] = reply
        self._carry_out(step)

    # --- effects ------------------------------------------------------------------------------

    def _step(self) -> Step:
        return Step(self.now_ms, self.host.wall_ms())

    def _carry_out(self, step: Step) -> None:
        for logged in step.log:
            self.host.disk.append(logged)
            if logged.record is not None:
                self._memory[logged.key] = logged.record
                self.harness.ledger.logged(logged.key, logged.record)
        if not self.harness.always:
            if step.log:
                self.host.disk.flush()
            self._release(step)
            return
        if step.log:
            self._writes += 1
            self.host.disk.sync(self._writes)
        if step.log or self._unsynced:
            self._unsynced.append((self._writes, step))
        else:
            self._release(step)

    def _release(self, step: Step) -> None:
        for target, message in step.send:
            self._send(target, message)
        for token, answer in step.answers:
            reply = self._answers.pop(token, None)
            if reply is not None:
                reply.resolve(answer)
        for key in step.load:
            self.host.set_timer("load " + key, self.host.rng.uniform(0.05, 1.0))
        self._arm()

    def _send(self, target: str, message: Message) -> None:
        assert self.machine is not None
        if target != self.host.name:
            self.host.send(target, (self.machine.epoch, message))
            return
        step = self._step()
        self.machine.receive(step, target, self.machine.epoch, message)
        self._carry_out(step)

    def _arm(self) -> None:
        assert self.machine is not None
        at_ms = self.machine.next_tick_ms()
        if at_ms < float("inf"):
            self.host.set_timer("tick", max(0.1, at_ms - self.now_ms))


class CacheHarness(Harness[SimNode]):
    """Clients at random nodes, few keys, one or two slots a node: races are the normal case."""

    always = False  # fsync before anything leaves; else a plain write that survives kill -9
    ttl = False

    def __init__(self, world: World[SimNode]) -> None:
        super().__init__(world)
        self.capacity = 1 + world.seed % 2
        self.policy: Policy = "s3fifo" if world.seed % 5 == 0 else "lru"
        self.ledger = Ledger()
        self.lines = RecordingTable("line", LINE_TABLE)
        self.entries = RecordingTable("entry", ENTRY_TABLE)
        requester.TABLE = self.lines
        directory_controller.TABLE = self.entries
        self._value = 0

    def build(self, host: Host) -> SimNode:
        return SimNode(host, self)

    def recovered(self, name: str, memory: dict[str, Record]) -> None:
        self.ledger.recovered(memory.items())

    def begin(self) -> None:
        for number in range(4):
            self.world.spawn(self.client(f"c{number}"))
        if not self.always:
            self.world.spawn(self.killer())

    async def killer(self) -> None:
        """kill -9, of one node or of all; what was written to the log stays."""
        world = self.world
        for _ in range(world.rng.randint(0, 3)):
            await world.sleep_ms(world.rng.uniform(50, 900))
            victims = NODES if world.rng.random() < 0.2 else (world.rng.choice(NODES),)
            for name in victims:
                world.crash(name)
            world.coverage.hit("kills", len(victims))
            await world.sleep_ms(world.rng.uniform(1, 600))
            for name in victims:
                world.start(name)

    async def client(self, me: str) -> None:
        world, rng = self.world, self.world.rng
        versions: dict[str, int] = {}
        named: list[tuple[str, Operation, Once, Outcome]] = []
        for _ in range(60):
            if self._late():
                return
            up = [name for name in NODES if world.is_up(name)]
            key, target = rng.choice(KEYS), rng.choice(up or NODES)
            operation, call = self._draw(me, key, versions)
            once = None
            if isinstance(operation, Incr | Cas | Delete) and rng.random() < 0.5:
                once = Once.of(f"{me} {self._value}", key, operation)
            answer = await self._ask(target, key, operation, once)
            for _ in range(2):
                if once is None or isinstance(answer, Changed) or self._late():
                    break
                # Whatever became of it: the same name again, of any node, counts once.
                world.coverage.hit("asked_again")
                answer = await self._ask(rng.choice(NODES), key, operation, once)
            self._note(key, operation, call, answer, versions)
            if once is not None and operation is not None and isinstance(answer, Changed):
                named.append((key, operation, once, answer.outcome))
            if named and rng.random() < 0.15:
                await self._same_answer(*rng.choice(named))
            await world.sleep_ms(rng.choice((0.0, rng.uniform(0, 3), rng.uniform(0, 60))))

    async def _same_answer(self, key: str, change: Operation, once: Once, first: Outcome) -> None:
        """A name has one answer, whatever was changed and whoever has died since."""
        again = await self._ask(self.world.rng.choice(NODES), key, change, once)
        if isinstance(again, Changed):
            assert again.outcome == first, f"{once.name}: {first}, and then {again.outcome}"
            self.world.coverage.hit(f"same_answer_{first.status}")

    def _late(self) -> bool:
        return self.world.clock.now_ms > LAST_CALL_MS

    async def _ask(
        self, target: str, key: str, operation: Operation | None, once: Once | None
    ) -> Any:
        reply = self.world.promise(timeout_ms=2_300)
        self.world.tell(target, lambda node: node.ask(key, operation, reply, once))
        return await reply

    def _draw(self, me: str, key: str, versions: dict[str, int]) -> tuple[Operation | None, Any]:
        rng, history = self.world.rng, self.world.history
        self._value += 1
        value = b"%d" % self._value
        match rng.choices(("read", "write", "cas", "delete", "incr"), (50, 25, 8, 5, 8))[0]:
            case "read":
                return None, history.invoke(me, "read", key)
            case "write":
                ttl_ms = rng.randint(1, 600) if self.ttl else 0
                return Write(value, ttl_ms), history.invoke(me, "write", key, self._value)
            case "cas":
                expected = versions.get(key, 0)
                argument = {"expected_version": expected, "value": self._value}
                return Cas(expected, value), history.invoke(me, "cas", key, argument)
            case "delete":
                return Delete(), history.invoke(me, "delete", key)
            case _:
                return Incr(1000), history.invoke(me, "incr", key, 1000)

    def _note(
        self,
        key: str,
        operation: Operation | None,
        call: Any,
        answer: Any,
        versions: dict[str, int],
    ) -> None:
        history = self.world.history
        match answer:
            case Found(value, version):
                versions[key] = version
                self.ledger.acknowledged(key, version)
                history.ok(call, {"value": int(value), "version": version})
            case Missing():
                versions[key] = 0
                history.ok(call, None)
            case Changed(outcome):
                versions[key] = outcome.version
                if outcome.version:
                    self.ledger.acknowledged(key, outcome.version)
                match operation:
                    case Write():
                        history.ok(call, outcome.version)
                    case Cas():
                        history.ok(call, outcome.version if outcome.status == "done" else False)
                    case Incr():
                        assert outcome.value is not None
                        result = {"value": int(outcome.value), "version": outcome.version}
                        history.ok(call, result)
                    case _:
                        history.ok(call)
            case Unavailable(definite):
                self.world.coverage.hit("unavailable")
                (history.fail if definite else history.unknown)(call)
            case _ if answer is TIMED_OUT:
                self.world.coverage.hit("timed_out")
                (history.fail if operation is None else history.unknown)(call)

    def check(self, name: str) -> None:
        node = self.world.nodes.get(name)
        if node is not None and node.machine is not None:
            check_machine(node.machine)
        check_cluster([(n.machine, n.now_ms) for n in self.world.nodes.values() if n.machine])

    def finish(self) -> None:
        for table in (self.lines, self.entries):
            self.world.coverage.update(table.taken)
        for node in self.world.nodes.values():
            assert node.machine is not None
            for name in node.machine.counts.__slots__:
                self.world.coverage.hit("count " + name, getattr(node.machine.counts, name))
            # Between correct nodes no message may meet a state that the tables do not foresee.
            assert node.machine.counts.ignored == 0, f"{node.host.name} ignored a message"
            busy = [entry for entry in node.machine.directory.entries.values() if entry.current]
            assert not busy, f"still busy after the quiet time: {busy[0].key} {busy[0].state}"
            stuck = [line.key for line in node.machine.cache.table.values() if line.waiting]
            assert not stuck, f"{node.host.name} still has clients waiting for {stuck}"
        if self.ttl:
            return  # a register knows no deadlines: here the invariants judge
        linearizable.check(self.world.history, linearizable.VersionedRegister()).require()


class DeadlineHarness(CacheHarness):
    """Values that run out, on wall clocks that jump."""

    ttl = True


class DurableHarness(CacheHarness):
    """--fsync=always: a power cut may come at any time."""

    always = True


def _wire(message: tuple[int, Message]) -> tuple[int, Message]:
    return _codec.decode(msgspec.msgpack.encode(message))


_SLOW = LinkSettings(delay_ms=(0.1, 30.0), slow=0.1, slow_ms=300.0)
_LINKS = (PERFECT, LinkSettings(), ROUGH, _SLOW)

_ROUGH_TIMES = Faults(
    pause=3, partition=2, isolate=2, one_way=3, drift_ppm=4_000, max_down=1,
    every_ms=(50, 900), pause_ms=(20, 1_500), cut_ms=(20, 1_500),
)  # fmt: skip
_POWER_CUTS = Faults(
    crash=4, power_cut=1, stop=1, pause=1, one_way=1, drift_ppm=4_000, max_down=2,
    every_ms=(50, 900),
)  # fmt: skip

_WRONG_CLOCKS = Faults(wall_jump=4, pause=1, one_way=1, isolate=1, drift_ppm=4_000, max_down=1)

DEADLINES = Scenario(
    "deadlines", NODES, DeadlineHarness, 2_500, 3_500, faults=_WRONG_CLOCKS, links=_LINKS,
    wire=_wire,
)  # fmt: skip
RACES = Scenario(
    "races", NODES, CacheHarness, 2_500, 3_500, faults=_ROUGH_TIMES, links=_LINKS, wire=_wire
)
POWER = Scenario(
    "power", NODES, DurableHarness, 2_500, 3_500, faults=_POWER_CUTS, links=_LINKS, wire=_wire
)
