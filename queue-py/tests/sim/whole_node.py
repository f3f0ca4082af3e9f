"""Whole nodes, `node.py` with everything above and below it but sockets, played on virtual time:
the real router with its detours, forwards and hosts, dead letters, two batches under way, runs and
parcels, on the real log. What the other simulations replace is here as it is.

Links are connections: in order, and what is on its way is lost when one breaks. A disk keeps what
was written when its process dies, and what was synced when the power fails.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import pytest

from message_queue import config as configuration
from message_queue import node as node_module
from message_queue import proposing, ring_keeper
from message_queue.admission import Place, identity, keep_ring, place_at_start
from message_queue.api.events import EventHub
from message_queue.core.delivery.invariants import check as check_delivery
from message_queue.core.invariants import check_node, check_owners
from message_queue.metrics import Metrics
from message_queue.node import AnyMessage, Node
from message_queue.storage import files
from message_queue.storage import log as log_module
from message_queue.storage.data_dir import DataDir
from message_queue.transport.links import Hello
from testkit.sim.coverage import Coverage
from testkit.sim.virtual_loop import Process, VirtualLoop, current_process

FOUNDERS: Final = 3
WALL_MS: Final = 1_700_000_000_000
DIAL_S: Final = (0.01, 0.2)
CHECKED_EVERY: Final = 40
"""Turns of the loop between two looks at who serves what."""
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[AnyMessage]] = msgspec.msgpack.Decoder(list[AnyMessage])


class Links:
    """`transport.links.Links` of one life of a machine."""

    def __init__(self, cluster: WholeCluster, machine: Machine, peers: Iterable[int]) -> None:
        self._cluster = cluster
        self._machine = machine
        self.peers = set(peers)
        """Positions that are dialled, and let in."""
        self.up: dict[int, int] = {}
        """Position -> which connection this is."""
        self._gathered: list[tuple[int, AnyMessage]] | None = None

    @property
    def connected(self) -> frozenset[int]:
        return frozenset(self.up)

    def send(self, position: int, message: AnyMessage) -> bool:
        if position not in self.up:
            return False
        self._cluster.post(self._machine, position, [message])
        return True

    def add(self, position: int, _: str) -> None:
        if position not in self.peers and position != self._machine.position:
            self.peers.add(position)
            self._cluster.dial_soon(self._machine, position)

    def remove(self, position: int) -> None:
        if position in self.peers:
            self.peers.discard(position)
            self._cluster.part(self._machine, position)

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._gathered is not None:
            yield
            return
        self._gathered = []
        yield
        gathered, self._gathered = self._gathered, None
        self.send_all(gathered)

    def send_all(self, messages: Sequence[tuple[int, AnyMessage]]) -> None:
        if self._gathered is not None:
            self._gathered += messages
            return
        frames: dict[int, list[AnyMessage]] = {}
        for position, message in messages:
            if position in self.up:
                frames.setdefault(position, []).append(message)
        for position, frame in frames.items():
            self._cluster.post(self._machine, position, frame)


class Machine:
    """A computer: its disk outlives its processes. The first three found the cluster."""

    def __init__(self, cluster: WholeCluster, index: int, directory: Path, *, joins: bool) -> None:
        self.cluster = cluster
        self.index = index
        self.addr = f"127.0.0.1:{1 + index}"
        self.directory = directory
        self.joins = joins
        self.process: Process | None = None
        self.node: Node | None = None
        self.position = -1
        self.links: Links
        self._data_dir: DataDir | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        rng = self.cluster.rng
        self.process = self.cluster.loop.process(
            f"n{self.index}", drift=rng.uniform(-0.002, 0.002), offset_ms=rng.randrange(1 << 40)
        )
        self.process.spawn(self._boot(self.process))

    async def _boot(self, process: Process) -> None:
        """As `server.py` does."""
        founders = ",".join(f"127.0.0.1:{1 + n}" for n in range(FOUNDERS))
        argv = [
            f"--id=n{self.index}", f"--addr={self.addr}",
            f"--join={founders}" if self.joins else f"--peers={founders}",
            f"--dataDir={self.directory}", "--segment_bytes=300000", "--memory_bytes=1000000",
        ]  # fmt: skip
        config = configuration.parse(argv, {})
        place = place_at_start(config)
        while place is None:
            await asyncio.sleep(0.05)
            place = await self.cluster.admission(self)
        config = replace(config, position=place.position)
        self._data_dir = DataDir.open(config.data_dir, identity(config, place))
        keep_ring(config.data_dir, place.ring)
        node = await Node.open(config, place, Metrics(), EventHub(), self._data_dir)
        self.position = place.position
        self.links = Links(self.cluster, self, node.keeper.urls())
        node.attach(self.links)  # type: ignore[arg-type]  # what a node asks of its links
        node.start()
        self.node = node
        node.halted.add_done_callback(
            lambda why: self.cluster.halted(process, why.result() if not why.cancelled() else "")
        )
        self.cluster.dial_all(self)

    def hello(self) -> Hello:
        assert self.node is not None
        return Hello(self.position, f"n{self.index}", self.addr, "sim", self.node.incarnation)

    def erase(self) -> None:
        """Its disk is lost."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self, *, power: bool = False) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process = self.node = None
        if self._data_dir is not None:
            self._data_dir.close()
            self._data_dir = None
        self.cluster.hang_up(self)
        if power:
            self.cluster.disks.power_failed(self.directory, self.cluster.rng)

    async def stop(self) -> None:
        """SIGTERM."""
        process, node = self.process, self.node
        if process is None or node is None:
            return
        task = process.spawn(node.stop())
        while self.process is process and not task.done():
            await self.cluster.sleep(0.02)
        if self.process is process:
            assert task.exception() is None
            self.cluster.coverage.hit("stopped")
            self.kill()

    def run(self, function: Callable[..., object], *arguments: Any) -> None:
        """In its process."""
        if self.process is not None:
            self.process.call(function, *arguments)


class Disks:
    """What of each file is on the medium."""

    def __init__(self) -> None:
        self._synced: dict[int, int] = {}

    def sync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._synced[found.st_ino] = found.st_size

    def power_failed(self, directory: Path, rng: Random) -> None:
        for path in sorted((directory / "log").glob("segment-*.log")):
            found = path.stat()
            safe = min(self._synced.get(found.st_ino, 0), found.st_size)
            if safe < found.st_size:
                os.truncate(path, rng.randint(safe, found.st_size))


class WholeCluster:
    """Machines, the wires between them, and what goes wrong with both."""

    def __init__(self, loop: VirtualLoop, rng: Random, root: Path, spare: int = 0) -> None:
        self.loop = loop
        self.rng = rng
        self.coverage = Coverage()
        self.disks = Disks()
        self.machines = [
            Machine(self, n, root / f"data{n}", joins=n >= FOUNDERS)
            for n in range(FOUNDERS + spare)
        ]
        self._connections = 0
        self._arrived_s: dict[tuple[int, int], float] = {}
        self._cut: set[tuple[int, int]] = set()
        self._held: dict[tuple[int, int], list[tuple[int, int, int, bytes]]] = {}
        """Wires (by machine) that swallow: what was sent meanwhile comes when they are whole."""
        loop.each_turn = self.each_turn

    async def sleep(self, seconds: float) -> None:
        done = self.loop.create_future()
        self.loop.call_later(seconds, done.set_result, None)
        await done

    def at(self, position: int) -> Machine | None:
        """Who runs there."""
        for machine in self.machines:
            if machine.node is not None and machine.position == position:
                return machine
        return None

    async def admission(self, joiner: Machine) -> Place | None:
        """`POST /peer/join`, of whomever it reaches."""
        member = self.rng.choice(self.machines)
        process = member.process
        if member.node is None or process is None or (joiner.index, member.index) in self._cut:
            return None
        answered: asyncio.Future[Place | None] = self.loop.create_future()
        keeper = member.node.keeper

        async def ask() -> None:
            found = await keeper.admit(joiner.addr, f"n{joiner.index}")
            if not answered.done():
                answered.set_result(found if isinstance(found, Place) else None)

        process.spawn(ask())
        timer = self.loop.call_later(3, lambda: answered.done() or answered.set_result(None))
        place = await answered
        timer.cancel()
        return place

    # -- wires -----------------------------------------------------------------------------------

    def dial_all(self, machine: Machine) -> None:
        """A machine has come up."""
        for position in machine.links.peers:
            self.dial_soon(machine, position)
        for other in self.machines:
            if other is not machine and other.node is not None:
                self.dial_soon(other, machine.position)

    def dial_soon(self, dialler: Machine, position: int) -> None:
        self.loop.call_later(
            self.rng.uniform(*DIAL_S), self._dial, dialler, dialler.process, position
        )

    def _dial(self, dialler: Machine, process: Process | None, position: int) -> None:
        if dialler.node is None or dialler.process is not process:
            return
        answerer = self.at(position)
        if position not in dialler.links.peers or position in dialler.links.up or answerer is None:
            return
        assert answerer.node is not None
        assert answerer.process is not None
        key = dialler.index, answerer.index
        keeper = answerer.node.keeper
        known = dialler.position in answerer.links.peers or keeper.may_be_new(dialler.position)
        if keeper.has_left(dialler.position):
            dialler.run(dialler.node.keeper.dismissed, position)
        if key in self._cut or key in self._held or answerer.process.paused or not known:
            self.dial_soon(dialler, position)
            return
        self._connections += 1
        dialler.links.up[position] = self._connections
        dialler.run(dialler.node.on_up, answerer.hello())

    def _break(self, dialler: Machine, position: int) -> None:
        """Its connection, if there is one: what is on its way is lost."""
        if dialler.node is not None and dialler.links.up.pop(position, None) is not None:
            dialler.run(dialler.node.on_down, position)
            self.dial_soon(dialler, position)

    def part(self, machine: Machine, position: int) -> None:
        """It neither calls that position any more nor listens to it."""
        self._break(machine, position)
        other = self.at(position)
        if other is not None:
            self.loop.call_later(0.001, self._break, other, machine.position)

    def hang_up(self, gone: Machine) -> None:
        """A machine is gone."""
        for other in self.machines:
            if other is not gone:
                self.loop.call_later(
                    self.rng.uniform(0.0001, 0.002), self._break, other, gone.position
                )

    def post(self, source: Machine, position: int, frame: list[AnyMessage]) -> None:
        target = self.at(position)
        if target is None:
            return
        key = source.index, target.index
        assert source.node is not None
        sent = source.links.up[position], position, source.node.incarnation, _encoder.encode(frame)
        if key in self._held:
            self._held[key].append(sent)
            return
        slow = self.rng.random() < 0.02
        after_s = self.rng.uniform(0.0001, 0.05 if slow else 0.002)
        # Timers of one moment run in any order, frames of one connection do not.
        at_s = max(self.loop.time() + after_s, self._arrived_s.get(key, 0.0) + 1e-6)
        self._arrived_s[key] = at_s
        self.loop.call_at(at_s, self._arrive, key, source.position, sent)

    def _arrive(self, key: tuple[int, int], sender: int, sent: tuple[int, int, int, bytes]) -> None:
        source, target = (self.machines[n] for n in key)
        connection, position, life, data = sent
        if key in self._held:
            self._held[key].append(sent)
            return
        # What a killed process had sent still comes, unless its peer has noticed.
        if source.node is not None and source.links.up.get(position) != connection:
            self.coverage.hit("frames_lost")
            return
        if target.node is not None and target.position == position:
            target.run(target.node.on_batch, sender, life, _decoder.decode(data))

    # -- faults ----------------------------------------------------------------------------------

    def reset(self, a: Machine, b: Machine) -> None:
        """A connection breaks."""
        self._break(a, b.position)

    def cut(self, a: Machine, b: Machine) -> None:
        """Refused from now on."""
        self._cut.add((a.index, b.index))
        self._break(a, b.position)

    def swallow(self, a: Machine, b: Machine) -> None:
        """Nothing passes, and nobody is told."""
        self._held.setdefault((a.index, b.index), [])

    def heal(self) -> None:
        """Every wire is whole."""
        self._cut.clear()
        held, self._held = self._held, {}
        for key, frames in held.items():
            sender = self.machines[key[0]].position
            for sent in frames:
                self._arrive(key, sender, sent)

    def power_cut(self) -> None:
        """All at once."""
        for machine in self.machines:
            machine.kill(power=True)

    def halted(self, process: Process, why: str) -> None:
        if process.alive:
            raise AssertionError(f"{process.name} halted: {why}")

    # -- what must hold ---------------------------------------------------------------------------

    def each_turn(self) -> None:
        if self.loop.turns % CHECKED_EVERY:
            return
        up = [(m.node, m.process) for m in self.machines if m.node is not None and m.process]
        if self.loop.turns % (5 * CHECKED_EVERY) == 0:
            check_owners((node.replicator, process.now_ms()) for node, process in up)
            for node, _ in up:
                check_node(node.replicator)
                for host in node.hosts.values():
                    check_delivery(host.owner.delivery)
        self._one_host_each(up)
        for node, _ in up:
            if node.router._detours.open:
                self.coverage.hit("detours_open")
            for host in node.hosts.values():
                if len(host.batches) > 1:
                    self.coverage.hit("two_batches_under_way")
                if host.owner.delivery.parcels.bytes:
                    self.coverage.hit("parcels")

    def _one_host_each(self, up: list[tuple[Node, Process]]) -> None:
        """Nobody delivers what somebody else delivers."""
        serving: set[int] = set()
        for node, process in up:
            for partition, host in node.hosts.items():
                if host.owner.delivery.held and node.replicator.may_serve(
                    partition, process.now_ms()
                ):
                    assert partition not in serving, f"partition {partition} has two owners"
                    assert host.owner.epoch == node.replicator.epoch(partition)
                    serving.add(partition)


class _Thread(Executor):
    """The log's thread: what it does is done at once, and known a moment later."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        process = current_process()
        assert process is not None
        done: Future[Any] = Future()
        result = function(*args, **kwargs)
        process.later(_hesitation_s(), done.set_result, result)
        return done


_chance = Random(0)


def _hesitation_s() -> float:
    return _chance.uniform(0.0002, 0.01)


@contextmanager
def played(loop: VirtualLoop, disks: Disks, rng: Random) -> Iterator[None]:
    """The clocks and the disk that nodes use are the simulation's."""

    def clock_ms() -> int:
        process = current_process()
        return process.now_ms() if process is not None else int(loop.time() * 1000)

    def wall_ms() -> int:
        return WALL_MS + int(loop.time() * 1000)

    def stopwatch_s() -> float:
        # Sometimes the disk seems slow to the log, and its thread has to write.
        nonlocal elapsed_s
        elapsed_s += rng.choice((0.0001, 0.0001, 0.003))
        return elapsed_s

    elapsed_s = 0.0
    _chance.seed(rng.random())
    with pytest.MonkeyPatch.context() as patch:
        for module in (node_module, proposing, ring_keeper):
            patch.setattr(module, "monotonic_ms", clock_ms)
        patch.setattr(node_module, "wall_ms", wall_ms)
        patch.setattr(files, "sync_data", disks.sync)
        patch.setattr(log_module, "ThreadPoolExecutor", _Thread)
        patch.setattr(log_module, "perf_counter", stopwatch_s)
        yield
