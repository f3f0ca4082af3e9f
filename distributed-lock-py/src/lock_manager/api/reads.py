"""Reads that wait until this leader is confirmed: all that come in one turn share a round."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Reads:
    def __init__(self) -> None:
        self._new: list[asyncio.Future[None]] = []
        self._asked: dict[int, list[asyncio.Future[None]]] = {}  # by read id
        self._confirmed: list[tuple[int, int]] = []  # (log index to be applied first, read id)
        self._last_id = 0

    def confirmation(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Done when a read that arrives now is confirmed."""
        future: asyncio.Future[None] = loop.create_future()
        self._new.append(future)
        return future

    def ask(self, read_index: Callable[[int], None]) -> None:
        """Ask the core once for everything that arrived."""
        if self._new:
            self._last_id += 1
            self._asked[self._last_id] = self._new
            self._new = []
            read_index(self._last_id)

    def confirm(self, read_id: int, index: int) -> None:
        self._confirmed.append((index, read_id))

    def serve(self, applied_index: int) -> None:
        """Let go whatever may be answered from a machine that applied so much."""
        if not self._confirmed:
            return
        for index, read_id in self._confirmed:
            if index <= applied_index:
                for future in self._asked.pop(read_id, ()):
                    if not future.done():
                        future.set_result(None)
        self._confirmed = [row for row in self._confirmed if row[0] > applied_index]

    def refuse(self, read_id: int, error: Exception) -> None:
        for future in self._asked.pop(read_id, ()):
            if not future.done():
                future.set_exception(error)

    def refuse_all(self, error: Exception) -> None:
        self._asked[0], self._new = self._new, []
        for read_id in list(self._asked):
            self.refuse(read_id, error)
        self._confirmed.clear()
