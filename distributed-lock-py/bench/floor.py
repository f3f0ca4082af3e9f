"""What the machine itself allows: a synced append, a loopback round trip."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

from load import fast_loop

RECORD = b"x" * 300
REPEAT = 300


def sync_us(scratch: Path) -> float:
    """Median of writing 300 bytes into a file of full size and syncing them."""
    sync = getattr(os, "fdatasync", os.fsync)
    took: list[float] = []
    with (scratch / "floor.dat").open("w+b", buffering=0) as file:
        file.write(bytes(len(RECORD) * REPEAT))
        os.fsync(file.fileno())
        file.seek(0)
        for _ in range(REPEAT):
            began = time.perf_counter()
            file.write(RECORD)
            sync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)  # type: ignore[attr-defined]  # uvloop's has it


async def _round_trips() -> list[float]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    took: list[float] = []
    for _ in range(REPEAT * 3):
        began = time.perf_counter()
        writer.write(RECORD)
        await reader.readexactly(len(RECORD))
        took.append(time.perf_counter() - began)
    writer.close()
    server.close()
    return took


def loopback_us() -> float:
    """Median of 300 bytes there and back over TCP, both ends in this process."""
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        return statistics.median(runner.run(_round_trips())) * 1e6
