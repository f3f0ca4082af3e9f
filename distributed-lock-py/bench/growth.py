"""How cost grows: with the number of nodes, and with the number of locks that are held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from contender import expect_ok
from lean_client import LeanClient
from load import Sample, fast_loop
from ours import Ours

LOCKS_A_REQUEST = 64
CONNECTIONS = 16
SNAPSHOT_ENTRIES = 1500
PATIENCE_S = 60.0
CALM_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held:
    """The cluster with so many locks held."""

    locks: int
    bytes_a_lock: float  # resident memory of the leader, over that of an empty one
    pair_p50_ms: float  # one client, another lock
    pairs_per_second: float  # 32 clients
    snapshots_ms: float  # until every node had taken one under that client's load
    longest_ms: float  # the longest of one client's requests meanwhile
    calm_longest_ms: float  # the same afterwards, for at most as long


def by_nodes(
    scratch: Path, sizes: tuple[int, ...], seconds: float
) -> list[tuple[int, Sample, Sample]]:
    """(nodes, pairs of 1 client, of 32) for each size."""
    rows = []
    for size in sizes:
        directory = scratch / f"{size}-nodes"
        directory.mkdir()
        ours = Ours(directory, size)
        try:
            ours.start()
            rows.append((size, ours.pairs(1, seconds), ours.pairs(32, seconds)))
        finally:
            ours.stop()
    return rows


def by_locks(scratch: Path, steps: tuple[int, ...], seconds: float) -> list[Held]:
    """Holds more and more locks in one cluster, and measures at each step."""
    directory = scratch / "many-locks"
    directory.mkdir()
    ours = Ours(directory, flags=(f"--snapshot_entries={SNAPSHOT_ENTRIES}",))
    rows: list[Held] = []
    try:
        ours.start()
        leader = ours.lead()
        ours.pairs(32, min(seconds, 1.0))
        empty, held = ours.server(leader).rss_bytes(), 0
        for step in steps:
            run(_hold(ours.http[leader], held, step))
            held = step
            rss = ours.server(leader).rss_bytes()
            alone, many = ours.pairs(1, seconds), ours.pairs(32, seconds)
            during, calm, took = _pauses(ours, leader)
            rows.append(
                Held(
                    locks=step,
                    bytes_a_lock=(rss - empty) / step,
                    pair_p50_ms=alone.p50_ms,
                    pairs_per_second=many.per_second,
                    snapshots_ms=took * 1000,
                    longest_ms=during * 1000,
                    calm_longest_ms=calm * 1000,
                )
            )
    finally:
        ours.stop()
    return rows


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        return runner.run(work)


async def _hold(address: str, first: int, last: int) -> None:
    """Takes locks number `first` up to `last`, 64 in a request, for ever."""
    connections = [await LeanClient.connect(address) for _ in range(CONNECTIONS)]
    starts = iter(range(first, last, LOCKS_A_REQUEST))

    async def work(connection: LeanClient, number: int) -> None:
        for start in starts:
            asks = ",".join(
                f'{{"lock_name":"held-{i}"}}'
                for i in range(start, min(last, start + LOCKS_A_REQUEST))
            )
            # As many clients as in a large installation, not one that holds everything.
            body = f'{{"client_id":"holder-{start % 9973}","locks":[{asks}]}}'
            expect_ok(await connection.post(b"/acquire", body.encode()), "/acquire")

    await asyncio.gather(*(work(c, i) for i, c in enumerate(connections)))
    for connection in connections:
        connection.close()


async def _longest(address: str, until: Callable[[], bool]) -> float:
    """The longest that one acquire or release of one client took until `until()`, in seconds."""
    client = await LeanClient.connect(address)
    body, longest = b'{"lock_name":"probe","client_id":"probe"}', 0.0
    deadline, looked = time.perf_counter() + PATIENCE_S, 0.0
    while (now := time.perf_counter()) < deadline:
        if now - looked > 0.5:
            if until():
                break
            looked = time.perf_counter()
        for path in (b"/acquire", b"/release"):
            began = time.perf_counter()
            expect_ok(await client.post(path, body), "a probe")
            longest = max(longest, time.perf_counter() - began)
    client.close()
    return longest


def _snapshots(ours: Ours) -> list[int]:
    """How many snapshots each node has taken."""
    return [
        sum("snapshot at index" in line for line in (ours.scratch / f"node{i}.log").open())
        for i in range(ours.size)
    ]


def _pauses(ours: Ours, leader: int) -> tuple[float, float, float]:
    """(longest request while every node takes a snapshot, longest for as long without, how long
    that was), in seconds."""
    before = _snapshots(ours)
    began = time.perf_counter()

    def all_took_one() -> bool:
        return all(now > then for now, then in zip(_snapshots(ours), before, strict=True))

    during = run(_longest(ours.http[leader], all_took_one))
    took = time.perf_counter() - began
    calm_until = time.perf_counter() + min(took, CALM_S)
    calm = run(_longest(ours.http[leader], lambda: time.perf_counter() > calm_until))
    return during, calm, took
