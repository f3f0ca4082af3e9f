"""How the cost of ours grows with nodes, queues and messages stored (all on the same two cores: it
shows the cost, not the gain, of more nodes). `bench/run.py --parts growth --dir /dev/shm`: the CPU
of a message is what grows or does not; the rate also depends on the disk."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from lean_stream import LeanStream
from systems import Ours, cpu_s

CLIENTS = 32
BATCH = 100
FILLED = (0, 10_000, 100_000, 1_000_000)


async def growth(root: Path, seconds: float) -> None:
    """Produce 256 B at 32 clients: one queue on 1, 3, 5 nodes; 1, 16, 256 queues on 3; then 1 queue
    on 3 nodes behind so many messages."""
    heading = f"growth: produce, 256 B, {CLIENTS} clients"
    print(f"{heading:<46}{'a second':>10}{'CPU us, all nodes':>20}{'a node':>10}")
    for nodes, queues in ((1, 1), (3, 1), (5, 1), (3, 16), (3, 256)):
        path = root / f"growth{nodes}-{queues}"
        path.mkdir()
        ours = Ours(path, nodes=nodes, port=18460)
        try:
            await ours.start()
            await _row(ours, f"{nodes} nodes, {queues} queues", queues, seconds)
            if (nodes, queues) == (3, 1):
                stored = 0
                for depth in FILLED[1:]:
                    await _fill(ours, depth - stored)
                    stored = depth
                    await _row(ours, f"{nodes} nodes, 1 queue, {depth:,} stored", queues, seconds)
        finally:
            ours.stop()


async def _row(ours: Ours, what: str, queues: int, seconds: float) -> None:
    await _produce(ours, queues, 0.5)
    before = cpu_s(ours.pids())
    rate = await _produce(ours, queues, seconds)
    used = (cpu_s(ours.pids()) - before) / (rate * seconds) * 1e6
    print(
        f"  {what:<44}{rate:>10,.0f}{used:>20,.0f}{used / len(ours.addresses):>10,.0f}", flush=True
    )


async def _produce(ours: Ours, queues: int, seconds: float) -> float:
    # Each client at some node, as users are: two of three forward.
    addresses = ours.addresses
    streams = [await LeanStream.connect(addresses[n % len(addresses)]) for n in range(CLIENTS)]
    done = 0
    stop = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        nonlocal done
        turn = number
        while time.perf_counter() < stop:
            turn += CLIENTS
            item = b'{"op":"produce","queue":"q%d","body":"%b"' % (turn % queues, b"x" * 256)
            status = await streams[number].ask(item)
            assert status == 201, status
            done += 1

    await asyncio.gather(*(caller(n) for n in range(CLIENTS)))
    for stream in streams:
        stream.close()
    return done / seconds


async def _fill(ours: Ours, count: int) -> None:
    streams = [await LeanStream.connect(address) for address in ours.addresses]
    batch = b",".join([b'{"body":"%b"}' % (b"x" * 256)] * BATCH)
    left = count // BATCH

    async def caller(stream: LeanStream) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            status = await stream.ask(b'{"op":"produce","queue":"q0","messages":[%b]' % batch)
            assert status == 201, status

    await asyncio.gather(*map(caller, streams))
    for stream in streams:
        stream.close()
