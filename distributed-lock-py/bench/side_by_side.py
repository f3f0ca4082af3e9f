"""The same work against every contender in turn, several rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import floor
import outage
from contender import Contender
from load import Sample
from report import median_of, ratio, table

Measure = Callable[[Contender, float], Sample | None]
Figure = Callable[[Sample], float]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: one measurement, and one number of it."""

    title: str
    measure: str
    value: Figure


MEASURES: dict[str, Measure] = {
    "pairs-32": lambda c, s: c.pairs(32, s),
    "pairs-1": lambda c, s: c.pairs(1, s),
    "hot-8": lambda c, s: c.hand_overs(8, s),
    "reads-32": lambda c, s: c.reads(32, s),
}
ROWS = (
    Row("acquire+release pairs/s, 32 clients, own locks", "pairs-32", lambda s: s.per_second),
    Row("- p50, ms", "pairs-32", lambda s: s.p50_ms),
    Row("- p99, ms", "pairs-32", lambda s: s.p99_ms),
    Row("- CPU of all nodes a pair, us", "pairs-32", lambda s: s.server_cpu_us),
    Row("pairs/s, 1 client", "pairs-1", lambda s: s.per_second),
    Row("- p50, ms", "pairs-1", lambda s: s.p50_ms),
    Row("- p99, ms", "pairs-1", lambda s: s.p99_ms),
    Row("hand-overs/s, 8 clients, one lock", "hot-8", lambda s: s.per_second),
    Row("- p99 of a pair, ms", "hot-8", lambda s: s.p99_ms),
    Row("linearizable reads/s, 32 clients", "reads-32", lambda s: s.per_second),
    Row("- p50, ms", "reads-32", lambda s: s.p50_ms),
)


@dataclass(slots=True)
class Results:
    """Per contender and measurement, one sample a round; and the floor meanwhile."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    sync_us: list[float] = field(default_factory=list)
    loopback_us: list[float] = field(default_factory=list)


def measure(contenders: Sequence[Contender], scratch: Path, seconds: float, rounds: int) -> Results:
    """Every measurement, every contender right after the other, so that what else the machine does
    meets all alike."""
    results = Results()
    for number in range(rounds):
        results.sync_us.append(floor.sync_us(scratch))
        results.loopback_us.append(floor.loopback_us())
        for name, work in MEASURES.items():
            for contender in contenders:
                found = work(contender, seconds)
                if found is not None:
                    results.samples.setdefault((contender.name, name), []).append(found)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return results


def as_table(contenders: Sequence[Contender], results: Results) -> str:
    names = [contender.name for contender in contenders]
    others = names[1:]
    rows: list[list[str]] = []
    for row in ROWS:
        values: dict[str, list[float]] = {
            name: [row.value(s) for s in results.samples.get((name, row.measure), [])]
            for name in names
        }
        cells = [median_of(values[name]) if values[name] else "–" for name in names]
        ratios = [
            ratio(values[names[0]], values[name]) if values[name] and all(values[name]) else "–"
            for name in others
        ]
        rows.append([row.title, *cells, *ratios])
    rows.append(_floor_row("floor: a synced write of 300 B, us", results.sync_us, len(names)))
    rows.append(_floor_row("floor: loopback round trip, us", results.loopback_us, len(names)))
    return table(["", *names, *(f"ours / {name}" for name in others)], rows)


def _floor_row(title: str, values: list[float], columns: int) -> list[str]:
    return [title, median_of(values), *([""] * (2 * columns - 2))]


def outages(
    contenders: Sequence[Contender], repeat: Callable[[Contender], int]
) -> list[tuple[str, list[float]]]:
    """Seconds without service after kill -9 of the leader, `repeat(contender)` times each."""
    return [
        (one.name, [outage.after_kill(one, 2.0 if one.name == "ours" else 5.0)
                    for _ in range(repeat(one))])
        for one in contenders
    ]  # fmt: skip
