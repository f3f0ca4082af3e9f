"""What a node keeps of the ring, whatever it hears while it writes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from message_queue import ring_keeper
from message_queue.admission import Place, keep_ring, read_ring
from message_queue.core.messages import Membership
from message_queue.core.operations import Answer
from message_queue.core.placement.membership import founding
from message_queue.ring_keeper import RingKeeper

FOUNDING = founding(("a:1", "b:1", "c:1"), 8, 3)


class Around(SimpleNamespace):
    """As much of a node as the keeper of its ring needs."""

    def __init__(self, ring: Membership) -> None:
        super().__init__(
            config=SimpleNamespace(position=0, scheme="http"),
            addresses={0: "a:1", 1: "b:1", 2: "c:1"},
            ids={},
            replicator=SimpleNamespace(ring=ring),
            wake=lambda: None,
            tasks=[],
        )

    def spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    def adopt(self, keeper: RingKeeper, version: int) -> None:
        self.replicator.ring = replace(FOUNDING, version=version)
        keeper.adopted(self.replicator.ring)


async def test_who_was_told_of_a_change_waits_until_its_ring_is_here(tmp_path: Path) -> None:
    around = Around(FOUNDING)
    looks = 0

    async def changes(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            around.replicator.ring = replace(FOUNDING, version=4)

    around.changes = changes
    keeper = RingKeeper(around, Place(0, "c", FOUNDING), tmp_path)  # type: ignore[arg-type]  # a part
    assert await keeper.heard_of(Answer(202, b'{"version":4}'))
    assert looks == 3
    assert not await keeper.heard_of(Answer(202, b'{"version":5}'), within_s=0.0)


async def test_rings_that_come_while_one_is_written_wait_and_the_latest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = threading.Lock()
    written: list[int] = []
    go_on = threading.Event()

    def slow(data_dir: Path, ring: Membership) -> None:
        assert writing.acquire(blocking=False), "two writers of one file"
        with_result = go_on.wait(10)
        written.append(ring.version)
        keep_ring(data_dir, ring)
        writing.release()
        assert with_result

    monkeypatch.setattr(ring_keeper, "keep_ring", slow)
    around = Around(FOUNDING)
    keeper = RingKeeper(around, Place(0, "c", FOUNDING), tmp_path)  # type: ignore[arg-type]  # a part
    for version in (2, 3, 4):
        around.adopt(keeper, version)
        await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*around.tasks)
    assert written[-1] == 4
    stored = read_ring(tmp_path)
    assert stored is not None
    assert stored.version == 4


async def test_a_ring_that_could_not_be_kept_is_kept_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data_dir: Path, ring: Membership) -> None:
        raise OSError(28, "No space left on device")

    around = Around(FOUNDING)
    keeper = RingKeeper(around, Place(0, "c", FOUNDING), tmp_path)  # type: ignore[arg-type]  # a part
    with monkeypatch.context() as patched:
        patched.setattr(ring_keeper, "keep_ring", full)
        around.adopt(keeper, 2)
        await asyncio.gather(*around.tasks)
    assert read_ring(tmp_path) is None
    around.adopt(keeper, 3)
    await asyncio.gather(*around.tasks)
    stored = read_ring(tmp_path)
    assert stored is not None
    assert stored.version == 3
