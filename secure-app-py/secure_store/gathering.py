"""Under load, the next batch of writes waits while each turn of the event loop brings more.

When a batch is answered its clients come back within a millisecond. Without this those who came
first make a batch of their own, and the clients fall into halves that take turns: twice the frames
and fsyncs. No time is waited for: a turn that brings nothing, or the last of TURNS, lets the batch
go. After a batch of one nothing is waited for at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TURNS = 6


class Gathering:
    """`waiting()` says how many writes wait; `go()` is called, on the loop, when they shall leave:
    at the end of this turn of the loop, or some turns later."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        waiting: Callable[[], int],
        go: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._waiting = waiting
        self._go = go
        self._last_batch = 0
        self._seen = 0
        self._turns = 0

    def begin(self) -> None:
        """The first write of a batch has come."""
        self._seen = self._turns = 0
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        waiting = self._waiting()
        if self._last_batch > 1 and waiting > self._seen and self._turns < TURNS:
            self._seen = waiting
            self._turns += 1
            self._loop.call_soon(self._look)
            return
        self._last_batch = waiting
        self._go()
