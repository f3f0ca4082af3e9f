"""Under load, the next batch waits while each turn of the event loop brings more requests.

When a batch is answered, its clients come back within a millisecond. Without this, those who
came first make a batch of their own, and the clients fall into two halves that take turns: twice
the messages and syncs. No time is waited for: a turn that brings nothing, or the last of TURNS,
lets the batch go. After a batch of one nothing is waited for at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TURNS = 6


class Gathering:
    """`waiting()` says how many requests wait; `go()` is called when they shall leave."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        waiting: Callable[[], int],
        go: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._waiting = waiting
        self._go = go
        self._last_batch = 0  # its commands
        self._seen = 0
        self._turns = 0  # 0: not begun
        self._done = False

    def proposed(self, commands: int) -> None:
        """A batch left; the next one gathers anew."""
        self._last_batch = commands
        self._done = False

    def is_over(self) -> bool:
        """Whether the next batch may leave now; if not, `go` follows within TURNS turns."""
        if self._done or self._last_batch <= 1:
            return True
        if not self._turns:
            self._turns, self._seen = 1, self._waiting()
            self._loop.call_soon(self._look)
        return False

    def _look(self) -> None:
        waiting = self._waiting()
        if waiting > self._seen and self._turns < TURNS:
            self._seen = waiting
            self._turns += 1
            self._loop.call_soon(self._look)
            return
        self._turns = 0
        self._done = True
        self._go()
