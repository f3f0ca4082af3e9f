"""Whole nodes, `node.py` with everything above and below it but sockets, played on virtual time:
the real router with its detours, forwards and hosts, dead letters, two batches under way, runs and
parcels, on the real log. What the other simulations replace is here as it is.

Links are connections: in order, and what is on its way is lost when one breaks. A disk keeps what
was written when its process dies, and what was synced when the power fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import pytest

from message_queue import config as configuration
from message_queue import node as node_module
from message_queue import proposing, ring_keeper
from message_queue.admission import identity, place_at_start
from message_queue.api.events import EventHub
from message_queue.core.invariants import check_node, check_owners
from message_queue.metrics import Metrics
from message_queue.node import AnyMessage, Node
from message_queue.storage import files
from message_queue.storage import log as log_module
from message_queue.storage.data_dir import DataDir
from message_queue.transport.links import Hello
from testkit.sim.coverage import Coverage
from testkit.sim.virtual_loop import Process, VirtualLoop, current_process

WALL_MS: Final = 1_700_000_000_000
DIAL_S: Final = (0.01, 0.2)
CHECKED_EVERY: Final = 40
"""Turns of the loop between two looks at who serves what."""
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[AnyMessage]] = msgspec.msgpack.Decoder(list[AnyMessage])


class Links:
    """`transport.links.Links` of one life of a machine."""

    def __init__(self, cluster: WholeCluster, machine: Machine) -> None:
        self._cluster = cluster
        self._machine = machine
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
    """A computer: its disk outlives its processes."""

    def __init__(self, cluster: WholeCluster, position: int, directory: Path) -> None:
        self.cluster = cluster
        self.position = position
        self.directory = directory
        self.process: Process | None = None
        self.node: Node | None = None
        self.links: Links
        self._data_dir: DataDir | None = None

    @property
    def running(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        if self.process is not None:
            return
        rng = self.cluster.rng
        self.process = self.cluster.loop.process(
            f"n{self.position}", drift=rng.uniform(-0.002, 0.002), offset_ms=rng.randrange(1 << 40)
        )
        self.process.spawn(self._boot(self.process))

    async def _boot(self, process: Process) -> None:
        peers = ",".join(f"127.0.0.1:{1 + p}" for p in range(len(self.cluster.machines)))
        argv = [
            f"--id=n{self.position}", f"--addr=127.0.0.1:{1 + self.position}", f"--peers={peers}",
            f"--dataDir={self.directory}", "--segment_bytes=300000", "--memory_bytes=1000000",
        ]  # fmt: skip
        config = configuration.parse(argv, {})
        place = place_at_start(config)
        assert place is not None
        self._data_dir = DataDir.open(config.data_dir, identity(config, place))
        node = await Node.open(config, place, Metrics(), EventHub(), self._data_dir)
        self.links = Links(self.cluster, self)
        node.attach(self.links)  # type: ignore[arg-type]  # what a node asks of its links
        node.start()
        self.node = node
        node.halted.add_done_callback(
            lambda why: self.cluster.halted(process, why.result() if not why.cancelled() else "")
        )
        self.cluster.dial_all(self)

    def hello(self) -> Hello:
        assert self.node is not None
        return Hello(
            self.position, f"n{self.position}", f"127.0.0.1:{1 + self.position}", "sim",
            self.node.incarnation,
        )  # fmt: skip

    def kill(self, *, power: bool = False) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process = self.node = None
        if self._data_dir is not None:
            self._data_dir.close()
            self._data_dir = None
        self.cluster.hang_up(self.position)
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

    def __init__(self, loop: VirtualLoop, rng: Random, root: Path, size: int = 3) -> None:
        self.loop = loop
        self.rng = rng
        self.coverage = Coverage()
        self.disks = Disks()
        self.machines: list[Machine] = []
        self.machines += [Machine(self, n, root / f"data{n}") for n in range(size)]
        self._connections = 0
        self._arrived_s: dict[tuple[int, int], float] = {}
        self._cut: set[tuple[int, int]] = set()
        self._held: dict[tuple[int, int], list[tuple[int, int, bytes]]] = {}
        """Wires that swallow: what was sent meanwhile comes when they are whole again."""
        loop.each_turn = self.each_turn

    async def sleep(self, seconds: float) -> None:
        done = self.loop.create_future()
        self.loop.call_later(seconds, done.set_result, None)
        await done

    # -- wires -----------------------------------------------------------------------------------

    def dial_all(self, machine: Machine) -> None:
        """A machine has come up."""
        for other in self.machines:
            if other is not machine:
                self._dial_soon(machine.position, other.position)
                self._dial_soon(other.position, machine.position)

    def _dial_soon(self, a: int, b: int) -> None:
        self.loop.call_later(self.rng.uniform(*DIAL_S), self._dial, a, b)

    def _dial(self, a: int, b: int) -> None:
        dialler, answerer = self.machines[a], self.machines[b]
        if dialler.node is None or b in dialler.links.up or answerer.node is None:
            return
        assert answerer.process is not None
        if (a, b) in self._cut or (a, b) in self._held or answerer.process.paused:
            self._dial_soon(a, b)
            return
        self._connections += 1
        dialler.links.up[b] = self._connections
        dialler.run(dialler.node.on_up, answerer.hello())

    def _break(self, a: int, b: int) -> None:
        """The connection of a to b, if there is one: what is on its way is lost."""
        dialler = self.machines[a]
        if dialler.node is not None and dialler.links.up.pop(b, None) is not None:
            self._held.get((a, b), []).clear()
            dialler.run(dialler.node.on_down, b)
            self._dial_soon(a, b)

    def hang_up(self, position: int) -> None:
        """A machine is gone."""
        for other in range(len(self.machines)):
            if other != position:
                self.loop.call_later(self.rng.uniform(0.0001, 0.002), self._break, other, position)

    def post(self, source: Machine, target: int, frame: list[AnyMessage]) -> None:
        key = source.position, target
        data = _encoder.encode(frame)
        assert source.node is not None
        life, connection = source.node.incarnation, source.links.up[target]
        if key in self._held:
            self._held[key].append((connection, life, data))
            return
        slow = self.rng.random() < 0.02
        after_s = self.rng.uniform(0.0001, 0.05 if slow else 0.002)
        # Timers of one moment run in any order, frames of one connection do not.
        at_s = max(self.loop.time() + after_s, self._arrived_s.get(key, 0.0) + 1e-6)
        self._arrived_s[key] = at_s
        self.loop.call_at(at_s, self._arrive, key, connection, life, data)

    def _arrive(self, key: tuple[int, int], connection: int, life: int, data: bytes) -> None:
        source, target = (self.machines[n] for n in key)
        if key in self._held:
            self._held[key].append((connection, life, data))
            return
        # What a killed process had sent still comes, unless its peer has noticed.
        if source.node is not None and source.links.up.get(key[1]) != connection:
            self.coverage.hit("frames_lost")
            return
        if target.node is not None:
            target.run(target.node.on_batch, key[0], life, _decoder.decode(data))

    # -- faults ----------------------------------------------------------------------------------

    def reset(self, a: int, b: int) -> None:
        """A connection breaks."""
        self._break(a, b)

    def cut(self, a: int, b: int) -> None:
        """Refused from now on."""
        self._cut.add((a, b))
        self._break(a, b)

    def swallow(self, a: int, b: int) -> None:
        """Nothing passes, and nobody is told."""
        self._held.setdefault((a, b), [])

    def heal(self) -> None:
        """Every wire is whole."""
        self._cut.clear()
        held, self._held = self._held, {}
        for (a, b), frames in held.items():
            for connection, life, data in frames:
                self._arrive((a, b), connection, life, data)

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
