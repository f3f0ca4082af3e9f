"""What goes away by itself goes on doing so, whatever became of one attempt."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from secure_store import sweeping
from secure_store.core import kv
from secure_store.core.plan import OpFailed, Write
from secure_store.metrics import Metrics
from secure_store.sweeping import Sweeper


class Due:
    """A view where one value is over until it is destroyed."""

    def __init__(self) -> None:
        self.left = [("k", 1)]
        self.head_tokens = self

    def due(self, now_ms: int, limit: int) -> list[tuple[str, int]]:
        return self.left[:limit]

    def expired(self, before_ms: int, limit: int) -> list[str]:
        return []


class Refuses:
    """An engine whose first write cannot be done."""

    def __init__(self, view: Due) -> None:
        self.state = None
        self.view = view
        self.writes = 0
        self.done = asyncio.Event()

    async def write(self, write: Write) -> None:
        self.writes += 1
        if self.writes == 1:
            raise OpFailed(0, kv.Missing())
        self.view.left.clear()
        self.done.set()


async def test_a_pass_that_failed_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "EXPIRY_S", 0.001)
    monkeypatch.setattr(sweeping, "is_open", lambda state, now_ms: True)
    view, metrics = Due(), Metrics()
    engine = Refuses(view)
    sweeper = Sweeper(
        "n", cast(Any, view), cast(Any, engine), metrics,
        note=lambda action, detail: None, audit_key=str,
    )  # fmt: skip
    async with asyncio.timeout(5):
        await engine.done.wait()
    await sweeper.stop()
    assert engine.writes == 2
    assert metrics.values_expired == 1
