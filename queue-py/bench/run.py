"""Messages a second, latencies and recovery beside other queues, in one run: `run.py --help`.

Every system that is installed (apt: rabbitmq-server nats-server redis-server beanstalkd) runs at
the same time in a scratch directory, idle but for the one whose turn it is. Each measurement goes
round all of them, `--rounds` times; the medians are printed, and what ours is of theirs. Ours are
three nodes with durable defaults, clients on `/stream` at the queue's owner (`ours, HTTP`: one
request at a time and connection). All load comes from this one process, through lean clients of
each protocol.

    python bench/run.py                           # produce, consume, end to end, floor
    python bench/run.py --parts depth,recovery --quick
    python bench/run.py --parts growth            # ours only: nodes 1, 3, 5; queues 1, 16, 256
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from growth import growth
from peers import PEERS
from systems import Ours, Session, System, cpu_s, installed

BATCH = 100
FILL_S = 20.0
"""Who takes no more than this many seconds' worth is left out of depth and recovery."""
MORE_THAN_ENOUGH = 8
"""Nobody consumes in a second what he stores in so many."""
PREFETCH = 4
"""Deliveries that a consumer of single messages may hold."""


@dataclass
class Table:
    """Medians, by row and system."""

    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, system: str, value: float) -> None:
        """One round's figure."""
        self.rows.setdefault(row, {}).setdefault(system, []).append(value)

    def print(self) -> None:
        """With `ours ÷ theirs` in brackets."""
        systems = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        print(f"{'':<38}" + "".join(f"{name:>22}" for name in systems))
        for row, cells in self.rows.items():
            medians = {name: statistics.median(values) for name, values in cells.items()}
            line = f"{row:<38}"
            for name in systems:
                if name not in medians:
                    line += f"{'–':>22}"
                    continue
                value = medians[name]
                shown = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
                if name != "ours" and "ours" in medians and value:
                    shown += f" ({medians['ours'] / value:.2f})"
                line += f"{shown:>22}"
            print(line)


async def closed_loop(
    work: Callable[[Session], Awaitable[int]], sessions: list[Session], seconds: float
) -> tuple[float, list[float]]:
    """Each session does one thing after the other; messages a second, and milliseconds each."""
    latencies: list[float] = []
    done = 0
    began = last = time.perf_counter()

    async def caller(session: Session) -> None:
        nonlocal done, last
        while (at := time.perf_counter()) - began < seconds:
            count = await work(session)
            if count:
                last = time.perf_counter()
                done += count
                latencies.append((last - at) * 1000)

    await asyncio.gather(*(caller(session) for session in sessions))
    return done / max(last - began, 1e-9), latencies


def median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


class Bench:
    """The parts. Each measurement begins with an empty queue."""

    def __init__(self, systems: list[System], args: argparse.Namespace, table: Table) -> None:
        self.systems = systems
        self.args = args
        self.table = table

    async def sessions(self, system: System, count: int) -> list[Session]:
        return [await system.connect() for _ in range(count)]

    async def each(self, measure: Callable[[System], Awaitable[None]]) -> None:
        """All systems in turn, `--rounds` times."""
        for _ in range(self.args.rounds):
            for system in self.systems:
                await system.fresh()
                await measure(system)

    async def produce(self) -> None:
        for size in (256, 4096):
            for clients, batch in ((1, 1), (32, 1), (8, BATCH)):
                if size == 4096 and clients == 1:
                    continue
                await self.each(lambda s, n=clients, b=batch, z=size: self._produce(s, n, b, z))  # type: ignore[misc]

    async def _produce(self, system: System, clients: int, batch: int, size: int) -> None:
        body = b"x" * size
        bodies = [body] * batch

        async def work(session: Session) -> int:
            if batch == 1:
                await session.produce(body)
            else:
                await session.produce_many(bodies)
            return batch

        sessions = await self.sessions(system, clients)
        before = cpu_s(system.pids())
        rate, latencies = await closed_loop(work, sessions, self.args.seconds)
        used = (cpu_s(system.pids()) - before) / max(1, len(latencies) * batch) * 1e6
        of = f"{size} B, {clients} clients" + (f", batches of {batch}" if batch > 1 else "")
        if clients == 1:
            self.table.add(f"produce p50 ms, {size} B, 1 client", system.name, median(latencies))
        else:
            self.table.add(f"produce/s, {of}", system.name, rate)
            self.table.add(f"  CPU us a message, {of}", system.name, used)
        for session in sessions:
            session.close()

    async def consume(self) -> None:
        await self.each(lambda system: self._consume(system, 32, 1, 8_000))
        await self.each(lambda system: self._consume(system, 4, BATCH, 200_000))

    async def _consume(self, system: System, clients: int, batch: int, depth: int) -> None:
        await fill(system, depth, MORE_THAN_ENOUGH * self.args.seconds)
        sessions = await self.sessions(system, clients)
        for session in sessions:
            await session.subscribe(PREFETCH if batch == 1 else 3 * BATCH, batch)

        async def work(session: Session) -> int:
            return len(await session.take(batch, 0.3))

        before = cpu_s(system.pids())
        rate, latencies = await closed_loop(work, sessions, self.args.seconds)
        used = (cpu_s(system.pids()) - before) / max(1, len(latencies) * batch) * 1e6
        of = f"{clients} clients" + (f", batches of {batch}" if batch > 1 else "")
        self.table.add(f"consume+ack/s, {of}", system.name, rate)
        self.table.add(f"  CPU us a message, consume, {of}", system.name, used)
        for session in sessions:
            session.close()

    async def end_to_end(self) -> None:
        await self.each(self._end_to_end)

    async def _end_to_end(self, system: System) -> None:
        producer, consumer = await self.sessions(system, 2)
        await consumer.subscribe(8)
        body = b"x" * 256
        latencies = []
        stop = time.perf_counter() + self.args.seconds
        while time.perf_counter() < stop:
            taking = asyncio.ensure_future(received(consumer))
            await asyncio.sleep(0)
            began = time.perf_counter()
            stored = asyncio.ensure_future(producer.produce(body))
            await taking
            latencies.append((consumer.arrived_s - began) * 1000)
            await stored
        self.table.add("end to end p50 ms, 1 in flight", system.name, median(latencies))
        producer.close()
        consumer.close()

    async def depth(self) -> None:
        depths = [100_000] + ([1_000_000] if self.args.deep else [])
        for depth in depths:
            for system in self.systems:
                if depth > 100_000 and not isinstance(system, Ours):
                    continue
                await system.fresh()
                if await fill(system, depth, FILL_S * max(1, depth // 250_000)) < depth:
                    continue
                sessions = await self.sessions(system, 1)
                await sessions[0].subscribe(3 * BATCH, BATCH)

                async def work(session: Session) -> int:
                    return len(await session.take(BATCH, 1.0))

                rate, _ = await closed_loop(work, sessions, min(10.0, 4 * self.args.seconds))
                row = f"consume+ack/s at depth {depth:,}, batches"
                self.table.add(row, system.name, rate)
                sessions[0].close()

    async def recovery(self) -> None:
        for system in self.systems:
            await system.fresh()
            count = 100_000 if not self.args.quick else 10_000
            if await fill(system, count) < count:
                continue
            system.kill()
            began = time.perf_counter()
            await system.restart()
            while True:
                try:
                    session = await system.connect()
                    await asyncio.wait_for(session.subscribe(8), 1)
                    if await asyncio.wait_for(session.take(1, 0.5), 1):
                        break
                except (TimeoutError, OSError, AssertionError):
                    if isinstance(system, Ours):
                        await system.find_owner(settled=False)
                await asyncio.sleep(0.005)
            row = f"kill -9 of all to a message, {count:,}, s"
            self.table.add(row, system.name, time.perf_counter() - began)


async def received(consumer: Session) -> None:
    """Until the next message is here, and acked."""
    while not await consumer.take(1, 1.0):
        pass


async def fill(system: System, count: int, within_s: float = FILL_S) -> int:
    """Store that many messages of 256 B, in batches; how many it took in that time at most."""
    give_up = time.perf_counter() + within_s
    sessions = [await system.connect() for _ in range(4)]
    left = count // BATCH

    async def work(session: Session) -> None:
        nonlocal left
        while left > 0 and time.perf_counter() < give_up:
            left -= 1
            await session.produce_many([b"x" * 256] * BATCH)

    await asyncio.gather(*(work(session) for session in sessions))
    for session in sessions:
        session.close()
    return count - left * BATCH


_ECHO = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := peer.recv(4096):
        peer.sendall(data)
"""


def round_trip_us() -> float:
    """p50 of 300 bytes to another process and back, both waiting in plain system calls."""
    echo = subprocess.Popen([sys.executable, "-c", _ECHO], stdout=subprocess.PIPE)
    assert echo.stdout is not None
    took = []
    with socket.create_connection(("127.0.0.1", int(echo.stdout.readline()))) as there:
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(300):
            began = time.perf_counter()
            there.sendall(b"x" * 300)
            there.recv(4096)
            took.append((time.perf_counter() - began) * 1e6)
    echo.wait(5)
    return statistics.median(took)


def floor(root: Path) -> None:
    """What this disk takes for one synced append, and this machine for a round trip, alone. A
    message that is stored on a majority costs two round trips and a sync at least."""
    took = []
    with (root / "floor").open("wb", buffering=0) as file:
        for _ in range(200):
            began = time.perf_counter()
            file.write(b"x" * 300)
            (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(file.fileno())
            took.append((time.perf_counter() - began) * 1e6)
    took.sort()
    trip_us = round_trip_us()
    print(f"floor: an append and fdatasync p50 {took[100]:.0f} us, p90 {took[180]:.0f} us; a round "
          f"trip {trip_us:.0f} us; two and a sync {2 * trip_us + took[100]:.0f} us; load average "
          f"{os.getloadavg()[0]:.1f}")  # fmt: skip


async def run(args: argparse.Namespace, root: Path) -> None:
    """Start what is there, measure, stop."""
    parts = args.parts.split(",")
    floor(root)
    if "growth" in parts:
        await growth(root, args.seconds)
        parts.remove("growth")
        if not parts:
            return
    systems: list[System] = [Ours(_made(root / "ours"))]
    if args.http:
        systems.append(Ours(_made(root / "http"), http=True, port=18440))
    wanted = args.peers.split(",") if args.peers is not None else None
    for peer in PEERS:
        if wanted is not None and peer.name.split()[0].lower() not in wanted:
            continue
        if installed(*peer.needs):
            systems.append(peer(_made(root / peer.__name__)))
        else:
            print(f"{peer.name} is not installed")
    table = Table()
    try:
        await asyncio.gather(*(system.start() for system in systems))
        bench = Bench(systems, args, table)
        for part in parts:
            await {"produce": bench.produce, "consume": bench.consume, "depth": bench.depth,
                   "end_to_end": bench.end_to_end, "recovery": bench.recovery}[part]()  # fmt: skip
    finally:
        table.print()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left behind
        for system in systems:
            system.stop()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def main() -> None:
    """Parse, run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="produce,consume,end_to_end",
                        help="of produce,consume,end_to_end,depth,recovery,growth")  # fmt: skip
    parser.add_argument("--peers", help="of rabbitmq,nats,redis,beanstalkd; '' for none")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where the data lies (default: the temporary directory)")
    parser.add_argument("--quick", action="store_true", help="one round of half a second")
    parser.add_argument("--deep", action="store_true", help="depth: 10^6 too (ours)")
    parser.add_argument("--http", action="store_true", help="ours over HTTP/1.1 too")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.rounds = 0.5, 1
    # Ended by a time limit, too, it stops what it started and prints what it has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    factory = import_module("uvloop").new_event_loop if sys.platform != "win32" else None
    root = Path(tempfile.mkdtemp(prefix="queue-bench-", dir=args.dir))
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(run(args, root))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
