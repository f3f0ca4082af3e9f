"""How often the node asks its core for the time: seldom while nothing happens, and soon when
something does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from message_queue import node as node_module
from message_queue.clocks import monotonic_ms
from message_queue.core.replication.effects import Effects, Lost
from message_queue.node import Node
from message_queue.routing import Router

sys.path.insert(0, str(Path(__file__).parent))
from lone_node import lone_node


class Core:
    """Counts ticks."""

    def __init__(self) -> None:
        self.ticked = asyncio.Event()
        self.ticks = 0

    def tick(self, _: int) -> Effects:
        self.ticks += 1
        self.ticked.set()
        return Effects()

    def peer_disconnected(self, _peer: int, _now_ms: int) -> Effects:
        return Effects()

    def owner(self, _: int) -> int:
        return 1

    def cluster_ms(self, now_ms: int) -> int:
        return now_ms


class Waiting:
    """Something in it is due in a minute."""

    ended = False

    def tick(self, _loop_s: float, _now_ms: int) -> float:
        return 60.0


@pytest_asyncio.fixture
async def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Node, Core]]:
    """A node that has looked at the time, and would not again for an hour."""
    monkeypatch.setattr(node_module, "IDLE_TICK_MS", 3_600_000)
    monkeypatch.setattr(node_module, "RESTLESS_MS", 3_600_000)
    monkeypatch.setattr(Router, "every_partition_is_served", True)
    async with lone_node(tmp_path) as node:
        node.replicator = core = Core()  # type: ignore[assignment]  # all that is asked of it here
        ticker = asyncio.create_task(node._tick_loop())
        await again(core)
        yield node, core
        ticker.cancel()
        with suppress(asyncio.CancelledError):
            await ticker


async def again(core: Core) -> None:
    core.ticked.clear()
    async with asyncio.timeout(20):
        await core.ticked.wait()


async def test_a_link_that_breaks_brings_the_next_tick(idle: tuple[Node, Core]) -> None:
    node, core = idle
    node.on_down(1)
    await again(core)
    await again(core)  # an election takes more than one


async def test_an_owner_that_goes_brings_the_next_tick(idle: tuple[Node, Core]) -> None:
    node, core = idle
    node.apply(Effects(lost=[Lost(3, 1025, clean=True)]))
    await again(core)


async def test_leases_that_run_are_told_more_often(idle: tuple[Node, Core]) -> None:
    node, core = idle
    node.time_matters(Waiting())  # type: ignore[arg-type]  # all that the tick asks of a host
    await again(core)
    await again(core)


async def test_a_node_with_nothing_to_do_is_left_alone(
    idle: tuple[Node, Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, core = idle
    monkeypatch.setattr(node_module, "RESTLESS_MS", 150)
    node.on_down(1)
    while node._core_due_ms < monotonic_ms() + 60_000:
        await again(core)  # until it has calmed down
    ticks = core.ticks
    await asyncio.sleep(0.3)
    assert core.ticks == ticks
