"""An asyncio event loop on virtual time, in which whole processes are played: code that is not
sans-IO runs as it is, and can be stopped, let go on and killed at any await.

A *process* is a context: what is called in it, and every task, timer and callback that comes of it,
belongs to it. A paused process's callbacks wait; a killed one's never run again, not even a
`finally`: that is what kill -9 leaves. Blocking calls (`run_in_executor`) are done at once and
answered after a virtual moment. Nothing waits for the real clock or a socket, so a second takes as
long as its work, and one seed gives one run, as far as the code draws its chances from that seed.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from random import Random
from types import CoroutineType
from typing import Any, TypeVar

T = TypeVar("T")

_current: ContextVar[Process | None] = ContextVar("process", default=None)


class Process:
    """One life of something that may be killed. Make it by `VirtualLoop.process`."""

    def __init__(self, loop: VirtualLoop, name: str, rate: float, offset_ms: int) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self._loop = loop
        self._rate = rate
        self._offset_ms = offset_ms
        self._parked: list[asyncio.Handle] = []
        self.context: Context = copy_context()
        self.context.run(_current.set, self)

    def now_ms(self) -> int:
        """Its monotonic clock."""
        return self._offset_ms + int(self._loop.time() * 1000 * self._rate)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have it call something soon; ignored when it is dead, later when it is paused."""
        self._loop.call_soon(function, *arguments, context=self.context)

    def later(self, delay_s: float, function: Callable[..., object], *arguments: Any) -> None:
        """`call` after a virtual while."""
        self._loop.call_later(delay_s, function, *arguments, context=self.context)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task in it."""
        return self._loop.create_task(work, context=self.context)

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT: everything that became due meanwhile, in order."""
        self.paused = False
        parked, self._parked = self._parked, []
        self._loop.unpark(parked)

    def kill(self) -> None:
        """kill -9."""
        self.alive = False
        self._parked.clear()

    def park(self, handle: asyncio.Handle) -> None:
        """Called by the loop: it is paused."""
        self._parked.append(handle)


def current_process() -> Process | None:
    """Whose code is running."""
    return _current.get()


class Deadlock(AssertionError):
    """Nothing is due, ever."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Give it to `asyncio.Runner(loop_factory=…)`, or run it by hand. `executor_ms`: between which
    bounds a blocking call takes."""

    def __init__(self, rng: Random, executor_ms: tuple[float, float] = (0.05, 2.0)) -> None:
        super().__init__(selectors.SelectSelector())
        self._now_s = 0.0
        self._rng = rng
        self._executor_ms = executor_ms
        self.turns = 0
        self.failures: list[Mapping[str, Any]] = []
        """What nobody caught: it ends the run."""
        self.set_exception_handler(lambda _, context: self.failures.append(context))
        self.each_turn: Callable[[], None] = lambda: None
        """Called after every turn: invariants."""
        self._kept: list[asyncio.Task[Any]] = []
        """The tasks of processes: not to be collected before the end, for a coroutine that is
        collected runs its `finally`."""
        self.set_task_factory(self._keep_task)  # type: ignore[arg-type]  # as asyncio calls it

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def process(self, name: str, *, drift: float = 0.0, offset_ms: int = 0) -> Process:
        """A new one; `drift` 0.001: its clock goes so much too fast."""
        return Process(self, name, 1 + drift, offset_ms)

    def unpark(self, handles: list[asyncio.Handle]) -> None:
        """These may run now."""
        self._internals["_ready"].extend(handles)

    def bury(self) -> None:
        """The end: what processes left undone is undone quietly, while it can do no harm."""
        kept, self._kept = self._kept, []
        for task in kept:
            work = task.get_coro()
            if isinstance(work, CoroutineType) and not task.done():
                with suppress(Exception):
                    copy_context().run(work.close)

    def run_in_executor(  # type: ignore[override]  # narrower than the base class's overloads
        self, executor: Executor | None, function: Callable[..., T], *arguments: Any
    ) -> asyncio.Future[T]:
        """Done here and now; known a moment later."""
        done: asyncio.Future[T] = self.create_future()
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the caller
            self.call_later(self._moment_s(), _fail, done, error)
        else:
            self.call_later(self._moment_s(), _answer, done, result)
        return done

    def _moment_s(self) -> float:
        return self._rng.uniform(*self._executor_ms) / 1000

    def _keep_task(
        self, _: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], **options: Any
    ) -> asyncio.Task[T]:
        task = asyncio.Task(work, loop=self, **options)
        # A killed process's tasks are never done, and that is no mistake.
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        if current_process() is not None or options.get("context") is not None:
            self._kept.append(task)
        return task

    @property
    def _internals(self) -> dict[str, Any]:
        return self.__dict__

    def _run_once(self) -> None:
        """`BaseEventLoop._run_once` without a selector, and with processes."""
        inside = self._internals
        ready, scheduled = inside["_ready"], inside["_scheduled"]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
            inside["_timer_cancelled_count"] -= 1
        if not ready and not inside["_stopping"]:
            if not scheduled:
                raise Deadlock("nothing is due any more")
            self._now_s = max(self._now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_current)
            if process is not None and not process.alive:
                continue
            if process is not None and process.paused:
                process.park(handle)
                continue
            handle._run()
        self.turns += 1
        if self.failures:
            failure = self.failures.pop()
            raise failure.get("exception") or AssertionError(str(failure))
        self.each_turn()


def _answer(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def run_virtually(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]], rng: Random) -> T:
    """Run `main(loop)` to its end on a loop of its own; an error that nobody caught is raised."""
    loop = VirtualLoop(rng)
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.each_turn = lambda: None
        loop.bury()
        loop.close()
