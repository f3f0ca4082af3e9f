"""Nodes inside the test's own process, linked to each other over loopback."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from mesi_cache import CacheNode


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@asynccontextmanager
async def nodes(count: int, root: Path, **flags: object) -> AsyncIterator[list[CacheNode]]:
    """`count` nodes that reach each other."""
    addrs = [f"127.0.0.1:{port}" for port in free_ports(count)]
    peers = [f"http://{addr}" for addr in addrs]
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(
                CacheNode(addr=addr, peers=peers, data_dir=root / str(number), **flags)
            )
            for number, addr in enumerate(addrs)
        ]
        await until(lambda: all(_linked(node, count - 1) for node in started), "all are linked")
        yield started


def _linked(node: CacheNode, others: int) -> bool:
    connected = node.status()["peers_connected"]
    return isinstance(connected, list) and len(connected) == others


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


async def until_it(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """`until` for what has to be asked for."""
    deadline = time.monotonic() + 20
    while True:
        if await condition():
            return
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        await asyncio.sleep(0.01)


def key_at(nodes: list[CacheNode], home: int, prefix: str = "k") -> str:
    """A key whose home is node `home`."""
    node = nodes[0]._node
    assert node is not None
    placement = node.machine.placement
    names = (f"{prefix}{number}" for number in range(10_000))
    return next(name for name in names if placement.home(name) == nodes[home].url)
