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
from lock_manager.core.locks import snapshot
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Batch,
    LeaderStarted,
    Release,
    decode_batch,
    encode_batch,
)
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import Acquired, Released, TimedOut
from lock_manager.core.raft import (
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Member,
    Persist,
    Role,
    Snapshot,
)
from lock_manager.metrics import Metrics
from lock_manager.node import Node
from lock_manager.storage import Owner, Store, StoreFailed

OWNER = Owner("node1", 1, "127.0.0.1:7000", "127.0.0.1:8000")


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
            "raft_addr": OWNER.raft_addr,
            "http_addr": OWNER.http_addr,
            "peers": "127.0.0.1:7000",
            "peer_http_addrs": "127.0.0.1:8000",
            "data_dir": str(path),
        }
        config = self.config = parse([f"--{name}={value}" for name, value in flags.items()], {})
        self.store = Store.open(path, OWNER)
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


async def store_of(path: Path, machine: LockMachine) -> None:
    """A store that holds nothing but a snapshot of the machine."""
    members = Configuration((Member(node_id=1),))
    taken = Snapshot(machine.applied_index, 1, members, snapshot.encode(machine))
    done = asyncio.Event()
    store = Store.open(path, OWNER)
    store.start(lambda seq: done.set(), lambda error: None)
    after = taken.index + 1
    store.submit(
        Persist(
            seq=1,
            hard_state=HardState(1, 1),
            snapshot=taken,
            truncate_from=after,
            compact_to=taken.index,
        )
    )
    await asyncio.wait_for(done.wait(), 20)
    await store.close()


async def test_a_large_snapshot_is_read_while_the_loop_goes_on_and_shows_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = LockMachine()
    names = [f"lock-{i}" for i in range(5_000)]
    machine.apply(1, Batch(1, [Acquire("ann", (Ask(name),)) for name in names]))
    await store_of(tmp_path / "data", machine)
    alone = Alone(tmp_path / "data")
    monkeypatch.setattr("lock_manager.node.CATCH_UP_S", 0.0)  # one step a turn
    alone.start()
    turns = 0
    while alone.node.status()["applied_index"] == 0:
        assert alone.node.not_ready_because() is not None
        shown, complete = alone.node.locks(10_000)
        assert (shown, complete) == ([], True)
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 5
    assert len(alone.node.locks(10_000)[0]) == len(names)
    await alone.leads()
    granted = await alone.node.execute(Acquire("bob", (Ask("new"),)))
    assert isinstance(granted, Acquired)
    assert granted.fencing_token == len(names) + 1
    await alone.node.stop()
    await alone.store.close()


async def test_a_long_log_is_applied_in_parts_and_answers_wait_for_theirs(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lock_manager.node.CATCH_UP_S", 0.0)  # one entry a turn
    alone.start()
    await alone.leads()
    node = alone.node
    stamps = [encode_batch(Batch(0)) for _ in range(50)]
    node._core.propose(stamps)
    before = node.status()["applied_index"]
    answer = await node.execute(acquire("ann"))
    assert isinstance(answer, Acquired)
    await node.confirm_leadership()
    assert node.status()["applied_index"] >= before + 51
