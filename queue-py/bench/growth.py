"""How ours grows with nodes and with queues (all on the same two cores: it shows the cost, not the
gain, of more nodes)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from lean_stream import LeanStream
from systems import Ours

CLIENTS = 32


async def growth(root: Path, seconds: float) -> None:
    """Produce 256 B at 32 clients: one queue on 1, 3, 5 nodes; 1, 16, 256 queues on 3."""
    for nodes, queues in ((1, 1), (3, 1), (5, 1), (3, 16), (3, 256)):
        path = root / f"growth{nodes}-{queues}"
        path.mkdir()
        ours = Ours(path, nodes=nodes, port=18460)
        try:
            await ours.start()
            rate = await _produce(ours, queues, seconds)
        finally:
            ours.stop()
        print(f"growth: {nodes} nodes, {queues} queues, {CLIENTS} clients: {rate:,.0f} produces/s")


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
