"""The end of a step: when what one frame, or one batch on the disk, led to is done.

What a step has to tell clients and peers is gathered while it runs, so that it leaves as one frame
each; it leaves when the step is over, not a turn of the event loop later. That turn would cost
little on a busy loop. But one message alone passes through four processes that all have slept, and
each turn in each of them is paid for in full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class Turn:
    """Of one node. Outside of steps the end is that of the present turn of the loop."""

    __slots__ = ("_calls", "_in_step", "_loop")

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._in_step = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this once, when the step that is being taken is over."""
        if not self._in_step and not self._calls:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._end)
        self._calls.append(call)

    def step(self, do: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Take one. What was asked for in it (and before it) is called, even if it fails."""
        if self._in_step:
            do(*args, **kwargs)
            return
        self._in_step = True
        try:
            do(*args, **kwargs)
        finally:
            self._in_step = False
            self._end()

    def _end(self) -> None:
        while self._calls:
            calls, self._calls = self._calls, []
            for call in calls:
                call()
