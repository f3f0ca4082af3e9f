"""What clients notice of planned moves: a fourth node joins and leaves again, then each node in
turn is told to stop. `python queue-py/bench/moving.py` (inside the repository: it uses testkit).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from testkit.cluster import Cluster, NodeView, Reply  # noqa: E402 - the path comes first

MAIN = ROOT / "queue-py" / "main.py"
QUEUES = 200
CLIENTS = 6


def argv(view: NodeView) -> list[str]:
    founders = [view.bind() if view.index == i else view.real(i) for i in range(3)]
    place = f"--peers={','.join(founders)}" if view.index < 3 else f"--join={founders[0]}"
    return [
        sys.executable, str(MAIN), f"--id=node{view.index}", f"--addr={view.bind()}", place,
        f"--dataDir={view.data_dir}",
    ]  # fmt: skip


class Load:
    """Clients that produce all the time; how long each answer took, and what was refused."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.took: list[tuple[float, float]] = []
        self.refused = 0
        self.stop = asyncio.Event()

    async def client(self, number: int) -> None:
        async with self.cluster.client(number % 3) as client:
            for count in itertools.count():
                if self.stop.is_set():
                    return
                began_s = time.monotonic()
                body = {"queue": f"q{(count * 7 + number) % QUEUES}", "body": count}
                reply = await client.post("/produce", body)
                self.took.append((began_s, time.monotonic() - began_s))
                self.refused += not isinstance(reply, Reply) or reply.status != 201

    def told(self, what: str, from_s: float, to_s: float) -> None:
        took = sorted(d * 1000 for at, d in self.took if from_s <= at <= to_s)
        median, high = took[len(took) // 2], took[int(len(took) * 0.99)]
        print(f"{what:<8} {to_s - from_s:5.2f} s  produces {len(took):5}  "
              f"p50 {median:6.1f}  p99 {high:6.1f}  max {took[-1]:6.1f} ms")  # fmt: skip


async def in_force(cluster: Cluster, version: int, *, over: bool) -> None:
    """Until that version of the ring is known (and nothing moves any more)."""
    async with cluster.client(1) as client:
        while True:
            reply = await client.get("/ring")
            known = isinstance(reply, Reply) and reply.json["version"] >= version
            if known and (not over or reply.json["change"] is None):
                return
            await asyncio.sleep(0.02)


async def handed_over_ms(cluster: Cluster, victim: int) -> float:
    """From SIGTERM until every partition has another owner."""
    address = cluster.views[victim].bind()
    began_s = time.monotonic()
    stopping = asyncio.create_task(cluster.nodes[victim].terminate())
    async with cluster.client((victim + 1) % 3) as client:
        while True:
            reply = await client.get("/ring")
            if isinstance(reply, Reply):
                owners = {partition["owner"] for partition in reply.json["partitions"]}
                if not owners & {None, address}:
                    break
            await asyncio.sleep(0.01)
    took_ms = (time.monotonic() - began_s) * 1000
    await stopping
    return took_ms


async def measure(messages: int, root: Path) -> None:
    cluster = Cluster(argv, 4, root=root, cwd=root, env={"CLUSTER_SECRET": ""})
    cluster.prepare()
    try:
        for index in range(3):
            cluster.start(index)
        for index in range(3):
            await cluster.ready(index)
        async with cluster.client(0) as client:
            for q in range(QUEUES):
                batch = [{"body": "x" * 200}] * (messages // QUEUES)
                await client.post("/produce", {"queue": f"q{q}", "messages": batch})
        load = Load(cluster)
        work = [asyncio.create_task(load.client(n)) for n in range(CLIENTS)]
        began_s = time.monotonic()
        await asyncio.sleep(3)
        load.told("before", began_s, time.monotonic())
        cluster.start(3)
        await in_force(cluster, 2, over=False)
        began_s = time.monotonic()
        await in_force(cluster, 3, over=True)
        load.told("join", began_s, time.monotonic())
        began_s = time.monotonic()
        async with cluster.client(1) as client:
            await client.post("/admin/leave", {"addr": cluster.views[3].bind()})
        await in_force(cluster, 5, over=True)
        load.told("leave", began_s, time.monotonic())
        load.stop.set()
        await asyncio.gather(*work)
        print(f"refused  {load.refused}")
        for victim in range(3):
            print(f"SIGTERM  {await handed_over_ms(cluster, victim):.0f} ms to hand over")
            cluster.start(victim)
            await cluster.ready(victim)
            await asyncio.sleep(2.5)  # until it has its partitions back
    finally:
        cluster.close()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="stored before (20000)")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        asyncio.run(measure(asked.messages, Path(root)))


if __name__ == "__main__":
    main(sys.argv[1:])
