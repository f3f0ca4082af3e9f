"""Who waits for an answer of the pair machine, and what is said when it comes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import NamedTuple

from secure_store.core import plan
from secure_store.core.effects import Effects, Promotion

BARRIER_S = 1.5


class _Begun:
    """A write on its way: its plan once it is admitted, and who waits for it."""

    __slots__ = ("future", "planned", "write")

    def __init__(self, write: plan.Write, future: asyncio.Future[plan.Written]) -> None:
        self.write = write
        self.future = future
        self.planned: plan.Planned | None = None


class _Barrier(NamedTuple):
    """An answer that rests on undecided writes: it waits until `seq` is decided."""

    seq: int
    request: int
    error: Exception | None
    since_s: float


class Waiting:
    """Requests by number. Used on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._requests = 0
        self._writes: dict[int, _Begun] = {}
        self._promotions: dict[int, asyncio.Future[Promotion]] = {}
        self._leaving: dict[int, asyncio.Future[None]] = {}
        self._barriers: deque[_Barrier] = deque()

    def _next(self) -> int:
        self._requests += 1
        return self._requests

    def write(self, write: plan.Write) -> tuple[int, asyncio.Future[plan.Written]]:
        """A write has come: its number, and what to wait for."""
        request = self._next()
        future: asyncio.Future[plan.Written] = self._loop.create_future()
        self._writes[request] = _Begun(write, future)
        return request, future

    def promotion(self) -> tuple[int, asyncio.Future[Promotion]]:
        request = self._next()
        future = self._promotions[request] = self._loop.create_future()
        return request, future

    def leave(self) -> tuple[int, asyncio.Future[None]]:
        request = self._next()
        future = self._leaving[request] = self._loop.create_future()
        return request, future

    # --- plans --------------------------------------------------------------------------------

    def asked(self, request: int) -> plan.Write:
        return self._writes[request].write

    def planned(self, request: int, planned: plan.Planned) -> None:
        self._writes[request].planned = planned

    def after(self, seq: int, shown_seq: int, request: int, error: Exception | None) -> None:
        """An answer that rests on undecided writes waits until they are decided."""
        barrier = _Barrier(seq, request, error, time.monotonic())
        if seq <= shown_seq:
            self._pass(barrier)
        else:
            self._barriers.append(barrier)

    # --- answers ------------------------------------------------------------------------------

    def shown(self, seq: int) -> None:
        """Everything up to `seq` is decided."""
        while self._barriers and self._barriers[0].seq <= seq:
            self._pass(self._barriers.popleft())

    def _pass(self, barrier: _Barrier) -> None:
        begun = self._writes.pop(barrier.request)
        if begun.future.done():
            return
        if barrier.error is not None:
            begun.future.set_exception(barrier.error)
        elif begun.planned is not None:
            begun.future.set_result(_written(begun.planned, degraded=False, line=0))

    def answer(self, fx: Effects, lines: dict[int, int]) -> None:
        """What the machine has decided; `lines`: the audit line of each record that has one."""
        for done in fx.done:
            begun = self._writes.pop(done.request)
            if begun.planned is not None and not begun.future.done():
                line = lines.get(done.seq, 0)
                written = _written(begun.planned, degraded=done.degraded, line=line)
                begun.future.set_result(written)
        for request, reason in fx.unknown:
            self._fail(request, plan.OutcomeUnknown(reason))
        for rejected in fx.reject:
            self._fail(
                rejected.request,
                plan.Rejected(rejected.reason, not_primary=rejected.not_primary),
            )
        if fx.unknown:
            self._fail_barriers(time.monotonic())
        for promotion in fx.promotions:
            waiting = self._promotions.pop(promotion.request, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(promotion)
        for request in fx.left:
            leaving = self._leaving.pop(request, None)
            if leaving is not None and not leaving.done():
                leaving.set_result(None)

    def _fail(self, request: int, error: Exception) -> None:
        begun = self._writes.pop(request, None)
        if begun is not None and not begun.future.done():
            begun.future.set_exception(error)

    def tick(self) -> None:
        """Time passed: what rests on others for too long is given up."""
        self._fail_barriers(time.monotonic() - BARRIER_S)

    def _fail_barriers(self, older_than_s: float) -> None:
        """What these answers rest on is not decided in time. They changed nothing: say so."""
        while self._barriers and self._barriers[0].since_s <= older_than_s:
            late = plan.Rejected("Replica did not confirm in time", not_primary=False)
            self._fail(self._barriers.popleft().request, late)


def _written(planned: plan.Planned, *, degraded: bool, line: int) -> plan.Written:
    return plan.Written(planned.body, planned.version, degraded, planned.replayed, line)
