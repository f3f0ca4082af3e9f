"""What the primary does away with by itself: values whose time is over, tokens that expired long
ago. Each pass is a few records like any other: decided on both nodes, then gone from both.

Reads do not rely on this (a value is not found from its deadline on); it is about what lies on the
disk. The index by expiry (storage/fold.py) gives the oldest first, so a pass costs what it does
away with, and nothing when there is nothing. A pass is bounded, and so is each of its records: many
values that end together go in turns, between clients' writes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from secure_store.core.admission import is_open
from secure_store.core.changes import Audited
from secure_store.core.plan import (
    ExpireOp,
    OpFailed,
    OutcomeUnknown,
    Rejected,
    RevokeOp,
    Write,
)
from secure_store.engine import Engine, clock_ms, wall_ms
from secure_store.metrics import Metrics
from secure_store.storage.view import View

log = logging.getLogger(__name__)

EXPIRY_S = 2.0  # between two looks
BUSY_S = 1.0  # if the last look found more than a pass may do
PASS_KEYS = 512
RECORD_VALUES = 64
TOKENS_S = 30.0
TOKENS_AFTER_MS = 3_600_000
TOKENS_BATCH = 100


class Sweeper:
    """Used on the event loop, from where it begins at once."""

    def __init__(
        self,
        node_id: str,
        view: View,
        engine: Engine,
        metrics: Metrics,
        *,
        note: Callable[[str, str], None],
        audit_key: Callable[[str], str],
    ) -> None:
        self._node_id = node_id
        self._view = view
        self._engine = engine
        self._metrics = metrics
        self._note = note
        self._audit_key = audit_key
        self._tasks = [
            asyncio.create_task(self._values(), name="expiry"),
            asyncio.create_task(self._tokens(), name="sweep"),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _values(self) -> None:
        while True:
            found = self._view.due(wall_ms(), PASS_KEYS) if self._may_write() else []
            for start in range(0, len(found), RECORD_VALUES):
                if not await self._expire(found[start : start + RECORD_VALUES]):
                    break
            await asyncio.sleep(BUSY_S if len(found) >= PASS_KEYS else EXPIRY_S)

    def _may_write(self) -> bool:
        """Whether a write would be begun at once: to be tidy is no reason to wait for a replica
        that is away, or to go on alone."""
        return is_open(self._engine.state, clock_ms())

    async def _expire(self, values: Sequence[tuple[str, int]]) -> bool:
        """Destroy these; False if that is not possible now. The line that tells of it is part of
        the record, as that of a client's write is."""
        keys = " ".join(self._audit_key(key) for key in dict.fromkeys(key for key, _ in values))
        who = f"node:{self._node_id}"
        told = Audited(self._node_id, "expire", "", keys, "", wall_ms(), who)
        ops = tuple(ExpireOp(key, version) for key, version in values)
        done = await self._write(Write(ops, lambda _: b"", audited=told))
        if done:
            self._metrics.values_expired += len(values)
        return done

    async def _tokens(self) -> None:
        """Tokens that expired an hour ago are forgotten."""
        while True:
            expired = self._view.head_tokens.expired(wall_ms() - TOKENS_AFTER_MS, TOKENS_BATCH)
            if expired and self._may_write():
                ops = tuple(RevokeOp(accessor) for accessor in expired)
                if await self._write(Write(ops, lambda _: b"")):
                    self._note("tokens_swept", f"{len(expired)} expired tokens")
            await asyncio.sleep(TOKENS_S)

    async def _write(self, write: Write) -> bool:
        """False: not now. The next look finds what is left."""
        try:
            await self._engine.write(write)
        except (Rejected, OutcomeUnknown, OpFailed) as e:
            log.debug("what expired goes later: %r", e)
            return False
        return True
