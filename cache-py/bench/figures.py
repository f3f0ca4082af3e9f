"""Closed loops, medians, and the lines that are printed."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Operation = Callable[[int], Awaitable[object]]


@dataclass(frozen=True)
class Figure:
    """Operations a second, and milliseconds."""

    rate: float
    p50_ms: float
    p99_ms: float


async def closed_loop(operation: Operation, clients: int, seconds: float) -> Figure:
    """`clients` callers, each waiting for its answer."""
    latencies: list[float] = []
    stop = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        while (began := time.perf_counter()) < stop:
            await operation(number)
            latencies.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(caller(n) for n in range(clients)))
    return of(latencies, time.perf_counter() - began)


def of(latencies_ms: list[float], seconds: float | None = None) -> Figure:
    latencies_ms.sort()
    count = len(latencies_ms)
    rate = count / (seconds if seconds is not None else sum(latencies_ms) / 1000)
    return Figure(rate, latencies_ms[count // 2], latencies_ms[count * 99 // 100])


class Table:
    """Measures in turn: every round does each line once, so that all see the same weather."""

    def __init__(self, seconds: float, rounds: int) -> None:
        self.seconds = seconds
        self.rounds = rounds
        self._lines: dict[str, tuple[Operation, int, list[Figure]]] = {}

    def add(self, name: str, operation: Operation, clients: int) -> None:
        self._lines[name] = (operation, clients, [])

    async def measure(self) -> dict[str, Figure]:
        gc.collect()
        for _ in range(self.rounds):
            for operation, clients, figures in self._lines.values():
                figures.append(await closed_loop(operation, clients, self.seconds))
        return {name: median(figures) for name, (_, _, figures) in self._lines.items()}


def median(figures: list[Figure]) -> Figure:
    middle = statistics.median
    return Figure(
        middle(f.rate for f in figures),
        middle(f.p50_ms for f in figures),
        middle(f.p99_ms for f in figures),
    )


def show(name: str, figure: Figure, against: dict[str, Figure] | None = None) -> None:
    """One line; `against` names what its rate is compared with."""
    others = (against or {}).items()
    ratios = "  ".join(f"{figure.rate / f.rate:5.2f}x {other}" for other, f in others)
    print(
        f"{name:<52} {figure.rate:>9,.0f}/s   p50 {figure.p50_ms:7.3f} ms   "
        f"p99 {figure.p99_ms:7.3f} ms   {ratios}".rstrip(),
        flush=True,
    )


def show_latency(name: str, figure: Figure, note: str = "", *, unit: str = "ms") -> None:
    """One line where a rate says nothing. `unit`: ms or µs."""
    times = 1000 if unit == "µs" else 1
    print(
        f"{name:<52} {'':>9}     p50 {figure.p50_ms * times:7.3f} {unit}   "
        f"p99 {figure.p99_ms * times:7.3f} {unit}   {note}".rstrip(),
        flush=True,
    )
