"""Histories under faults on real processes, judged per key: every one must be linearizable.

`SOAK=1` goes on for `SOAK_MINUTES` (default 10), faults drawn by seed, alone and together.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from testkit.cluster import Cluster

sys.path.insert(0, str(Path(__file__).parent))

from cache_load import (
    FAULTS,
    HOLD_S,
    Fault,
    Load,
    all_killed,
    cut_one_way,
    isolated,
    killed,
    load_on,
    paused,
    silent_one_way,
)
from cache_nodes import argv, linked

pytestmark = pytest.mark.cluster
IN_FAULT, AFTER = 20, 120  # calls


async def suffer(cluster: Cluster, load: Load, faults: Iterable[Fault]) -> None:
    """All of `faults` at once, for longer than a lease, under load; then a time without any."""
    async with AsyncExitStack() as stack:
        for fault in faults:
            await stack.enter_async_context(fault)
        await load.more(IN_FAULT)
        await asyncio.sleep(HOLD_S)
    await linked(cluster)
    await load.more(AFTER)


async def test_faults_under_load_leave_every_history_linearizable(tmp_path: Path) -> None:
    """No read is ever stale, no acknowledged change is ever lost or done twice, and a named one has
    one answer, whatever happens meanwhile: to a home, to an owner, to both."""
    async with Cluster(argv(), 3, root=tmp_path, proxied=("http",)) as cluster:
        await linked(cluster)
        async with load_on(cluster, 0) as load:
            await load.more(AFTER)
            await suffer(cluster, load, [cut_one_way(cluster, 2), paused(cluster, 1)])
            await suffer(cluster, load, [killed(cluster, 0), silent_one_way(cluster, 1)])
            await all_killed(cluster)
            await load.more(AFTER)
            await suffer(cluster, load, [isolated(cluster, 2)])
        kinds = Counter(f"{op.kind} {op.status}" for op in load.recorder.history)
        print(f"{len(load.recorder.history)} calls, {load.asked_again} asked again", dict(kinds))


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="SOAK=1 asks for it")
@pytest.mark.timeout(0)
async def test_soak(tmp_path: Path) -> None:
    """One cluster, one history a seed, up to three faults at a time, as long as asked."""
    until_s = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "10"))
    seed = int(os.environ.get("SOAK_SEED", "0"))
    flags = os.environ.get("SOAK_FLAGS", "").split()
    async with Cluster(argv(*flags), 3, root=tmp_path, proxied=("http",)) as cluster:
        await linked(cluster)
        calls = 0
        while not calls or time.monotonic() < until_s:
            rng, seen, undecided = random.Random(seed), Counter[str](), list[str]()
            async with load_on(cluster, seed, undecided=undecided.append) as load:
                for _ in range(5):
                    drawn = rng.sample(FAULTS, rng.choice((1, 1, 2, 2, 3)))
                    seen.update(fault.__name__ for fault in drawn)
                    # A paused node answers nobody, so it must be the first to come back.
                    drawn.sort(key=lambda fault: fault is paused)
                    nodes = rng.sample(range(3), len(drawn))
                    at = zip(drawn, nodes, strict=True)
                    await suffer(cluster, load, [fault(cluster, node) for fault, node in at])
                    if rng.random() < 0.2:
                        await all_killed(cluster)
                        seen["all_killed"] += 1
            history = load.recorder.history
            calls += len(history)
            kinds = dict(Counter(str(operation.status) for operation in history))
            print(
                f"seed {seed}: {len(history)} calls, {kinds}, {load.asked_again} asked again, "
                f"{dict(seen)}: {undecided or 'linearizable'}",
                flush=True,
            )
            seed += 1
        print(f"{calls} calls")
