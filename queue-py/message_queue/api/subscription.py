"""A queue that a stream gets messages of, and how much of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from message_queue.api import frames
from message_queue.api.errors import ApiError
from message_queue.api.frames import Cid, SubscribeItem
from message_queue.core.operations import MAX_WAIT_MS, Consume


class Subscription:
    """Fed by a task of its own (`feed`), which sleeps while there is no credit."""

    def __init__(
        self,
        cid: Cid,
        queue: str,
        item: SubscribeItem,
        feed: Callable[[Subscription], Coroutine[Any, Any, None]],
        ended: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self.cid = cid
        self.credit = item.credit
        self.waits = False
        """Its feeder sleeps until there is credit."""
        self._window = item.credit
        self._queue = queue
        self._visibility_ms = item.visibility_ms
        self._more = asyncio.Event()
        self.task = asyncio.create_task(feed(self), name=f"feed of {queue}")
        self.task.add_done_callback(ended)

    @property
    def has_plenty(self) -> bool:
        """The client, which gives back as credit what it is done with, has half of what it asked
        for at first, or more: it is not waiting for the next message. (As a receiver in TCP
        announces no small windows: RFC 1122, 4.2.3.3.)"""
        return 2 * self.credit <= self._window

    def add(self, credit: int) -> None:
        """More may be delivered. Raises ApiError beyond what one may be owed."""
        if self.credit + credit > frames.MAX_CREDIT:
            raise ApiError(429, "Too much credit", limit=frames.MAX_CREDIT)
        self.credit += credit

    def wake(self) -> None:
        """There is credit."""
        self.waits = False
        self._more.set()

    async def has_credit(self) -> None:
        """Wait until there is some."""
        while not self.credit:
            self.waits = True
            self._more.clear()
            await self._more.wait()

    def next(self) -> Consume:
        """What to ask the owner now."""
        return Consume(self._queue, self.credit, True, MAX_WAIT_MS, self._visibility_ms)
