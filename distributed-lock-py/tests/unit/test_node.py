"""The loop that joins the rooms, alone in a cluster of one: a real store, links to nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lock_manager.api.errors import ApiError, NotLeader
from lock_manager.api.events import EventHub
from lock_manager.config import parse
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Batch,
    LeaderStarted,
    Release,
    decode_batch,
)
from lock_manager.core.locks.replies import Acquired, Released, TimedOut
from lock_manager.core.raft import Entry, EntryKind, Role
from lock_manager.metrics import Metrics
from lock_manager.node import Node
from lock_manager.storage import Owner, Store, StoreFailed


class NoLinks:
    connected: frozenset[int] = frozenset()

    def send(self, messages: Any) -> None:
        assert not list(messages)

    def connect(self, addresses: Any) -> None:
        assert not addresses


class Alone:
    def __init__(self, path: Path) -> None:
        flags = {
            "id": "node1",
            "raft_addr": "127.0.0.1:7000",
            "http_addr": "127.0.0.1:8000",
            "peers": "127.0.0.1:7000",
            "peer_http_addrs": "127.0.0.1:8000",
            "data_dir": str(path),
        }
        config = parse([f"--{name}={value}" for name, value in flags.items()], {})
        self.store = Store.open(path, Owner("node1", 1, flags["raft_addr"], flags["http_addr"]))
        self.node = Node(config, self.store, Metrics(), EventHub())
        self.batches: list[Batch] = []
        apply = self.node._apply

        def watched(entry: Entry) -> None:
            if entry.kind is EntryKind.COMMAND:
                self.batches.append(decode_batch(entry.payload))
            apply(entry)

        self.node._apply = watched  # type: ignore[method-assign]

    def start(self) -> None:
        self.node.start(NoLinks())  # type: ignore[arg-type]

    async def leads(self) -> None:
        await until(lambda: self.node.not_ready_because() is None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Alone]:
    alone = Alone(tmp_path / "data")
    yield alone
    await alone.node.stop()
    await alone.store.close()


def acquire(client: str, wait_ms: int = 10_000) -> Acquire:
    return Acquire(client, (Ask("a"),), wait_ms)


async def test_a_term_begins_with_its_leader_even_before_requests_of_the_same_turn(
    alone: Alone,
) -> None:
    node = alone.node
    early: list[asyncio.Future[Any]] = []
    persisted = node._on_persisted

    def won_and_asked_at_once(seq: int) -> None:
        persisted(seq)
        if node._core.role is Role.LEADER and not early:
            early.append(asyncio.get_running_loop().create_future())
            node.begin(acquire("ann"), early[0])

    node._on_persisted = won_and_asked_at_once  # type: ignore[method-assign]
    alone.start()
    await alone.leads()
    assert isinstance(await early[0], Acquired)
    assert isinstance(alone.batches[0].commands[0], LeaderStarted)


async def test_what_gathers_while_batches_are_on_their_way_shares_the_next(alone: Alone) -> None:
    alone.start()
    await alone.leads()
    before = len(alone.batches)
    asked = [asyncio.create_task(alone.node.execute(acquire("ann"))) for _ in range(200)]
    assert all(isinstance(reply, Acquired) for reply in await asyncio.gather(*asked))
    assert len(alone.batches) - before < 10


async def test_an_idle_leader_lets_waits_end_by_themselves(alone: Alone) -> None:
    alone.start()
    await alone.leads()
    await alone.node.execute(acquire("ann"))
    assert isinstance(await alone.node.execute(acquire("bob", wait_ms=50)), TimedOut)
    assert alone.batches[-1].commands == []


async def test_a_cancelled_request_leaves_the_queue(alone: Alone) -> None:
    alone.start()
    await alone.leads()
    await alone.node.execute(acquire("ann"))
    waiting = asyncio.create_task(alone.node.execute(acquire("bob")))
    await until(lambda: alone.node.lock("a").waiters)
    waiting.cancel()
    await until(lambda: not alone.node.lock("a").waiters)
    assert await alone.node.execute(Release("ann", "a")) == Released("a", "ann")
    assert alone.node.lock("a").holders == []


async def test_nothing_is_acknowledged_after_a_failed_write(alone: Alone) -> None:
    alone.start()
    await alone.leads()
    asked = asyncio.create_task(alone.node.execute(acquire("ann")))
    await asyncio.sleep(0)
    alone.node._on_store_failed(StoreFailed("disk on fire"))
    with pytest.raises((NotLeader, ApiError)) as refused:
        await asked
    assert getattr(refused.value, "status", 503) == 503
    code, why = await alone.node.halted
    assert code == 1
    assert "disk on fire" in why
    with pytest.raises(NotLeader):
        await alone.node.execute(acquire("bob"))


async def test_an_entry_that_cannot_be_applied_halts_the_node(alone: Alone) -> None:
    alone.start()
    await alone.leads()
    alone.node._core.propose([b"\xc1 not a batch"])
    alone.node._wake()
    code, why = await asyncio.wait_for(alone.node.halted, 20)
    assert code == 1
    assert "cannot go on" in why
