"""Starts a program whose outgoing connections take detours: `python rerouted.py ROUTES main.py …`,
ROUTES as `host:port=host:port,…` (dialled=through).

So every link of a node can pass a proxy, also those to addresses that it learns while it runs (a
joiner's, from the ring), and the program knows nothing of it. Only connections made through
asyncio (aiohttp's, and `loop.create_connection`) are rerouted. This file stands alone.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import aiohappyeyeballs


def routes(text: str) -> dict[tuple[str, int], tuple[str, int]]:
    """What ROUTES says."""
    found = {}
    for each in text.split(","):
        dialled, _, through = each.partition("=")
        found[_address(dialled)] = _address(through)
    return found


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def reroute(table: dict[tuple[str, int], tuple[str, int]]) -> None:
    """From now on."""
    start = aiohappyeyeballs.start_connection

    async def start_connection(addr_infos: Any, **options: Any) -> Any:
        moved = [
            (*info[:4], (*table.get(info[4][:2], info[4][:2]), *info[4][2:])) for info in addr_infos
        ]
        return await start(moved, **options)

    aiohappyeyeballs.start_connection = start_connection
    loops: list[Any] = [asyncio.BaseEventLoop]
    try:
        import uvloop
    except ImportError:
        pass  # Windows
    else:
        loops.append(uvloop.Loop)
    for loop in loops:
        loop.create_connection = _connecting(loop.create_connection, table)


def _connecting(
    create: Callable[..., Any], table: dict[tuple[str, int], tuple[str, int]]
) -> Callable[..., Any]:
    async def create_connection(
        loop: Any, factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        host, port = table.get((host, port), (host, port))
        return await create(loop, factory, host, port, **options)

    return create_connection


if __name__ == "__main__":
    reroute(routes(sys.argv[1]))
    program = sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    runpy.run_path(program, run_name="__main__")
