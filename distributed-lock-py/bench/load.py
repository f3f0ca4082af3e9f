"""Closed-loop load: so many clients, each sending its next request when the last is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. `server_cpu_us` is the servers' processor time for each operation."""

    per_second: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float = 0.0


def sample(took_s: Sequence[float], seconds: float, server_cpu_s: float = 0.0) -> Sample:
    """What operations that took so long, within `seconds`, amount to."""
    if not took_s:
        raise RuntimeError("nothing was done within the time")
    ordered = sorted(took_s)
    count = len(ordered)
    return Sample(
        count / seconds,
        ordered[count // 2] * 1000,
        ordered[count * 99 // 100] * 1000,
        server_cpu_s / count * 1e6,
    )


async def closed_loop(
    works: Sequence[Callable[[], Awaitable[None]]], seconds: float
) -> tuple[list[float], float]:
    """Repeats each of `works` until the time is over; returns each repetition's seconds, and how
    long it took in all."""
    took: list[float] = []
    began_all = time.perf_counter()
    until = began_all + seconds

    async def repeat(work: Callable[[], Awaitable[None]]) -> None:
        while (began := time.perf_counter()) < until:
            await work()
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(repeat(work) for work in works))
    return took, time.perf_counter() - began_all


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, if it is there: the load should cost little beside what it loads."""
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory
