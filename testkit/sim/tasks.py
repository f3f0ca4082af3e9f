"""Coroutines on the virtual clock, so that a sequential client reads like one.

    async def client(world):
        reply = world.promise(timeout_ms=500)
        world.tell("n1", lambda node: node.submit("x", reply))
        outcome = await reply            # the value, or TIMED_OUT
        await world.sleep_ms(10)

No asyncio: `spawn` drives the coroutine by hand, in the clock's order.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

from testkit.sim.clock import Clock


class _TimedOut:
    def __repr__(self) -> str:
        return "TIMED_OUT"


TIMED_OUT: Final = _TimedOut()


class Promise:
    """A value that arrives once; later arrivals are ignored (a reply after the timeout)."""

    __slots__ = ("_listener", "done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self._listener: Callable[[Any], None] | None = None

    def resolve(self, value: Any) -> bool:
        """Deliver; False if a value (or the timeout) was there before."""
        if self.done:
            return False
        self.done = True
        self.value = value
        if self._listener is not None:
            self._listener(value)
        return True

    def on_done(self, listener: Callable[[Any], None]) -> None:
        """Call `listener(value)` at the arrival (at once if it was). One listener only."""
        if self.done:
            listener(self.value)
            return
        assert self._listener is None, "a promise has one listener"
        self._listener = listener

    def __await__(self) -> Generator[Promise, Any, Any]:
        if not self.done:
            yield self
        return self.value


def promise(clock: Clock, timeout_ms: float | None = None) -> Promise:
    """A promise that resolves to TIMED_OUT after `timeout_ms`, if given."""
    made = Promise()
    if timeout_ms is not None:
        clock.call_later(timeout_ms, lambda: void(made.resolve(TIMED_OUT)))
    return made


def void(_: object) -> None:
    """Discard a result where a callback must return nothing."""


def spawn(clock: Clock, coroutine: Coroutine[Promise, Any, Any]) -> Promise:
    """Run a coroutine that awaits promises; the returned promise holds what it returns.

    An exception inside it leaves through the clock's step and ends the run, as it should.
    """
    finished = Promise()

    def resume(value: Any) -> None:
        try:
            awaited = coroutine.send(value)
        except StopIteration as stop:
            finished.resolve(stop.value)
            return
        # Resuming through the clock keeps stacks flat and the order that of the events.
        awaited.on_done(lambda result: void(clock.call_later(0, resume, result)))

    clock.call_later(0, resume, None)
    return finished
