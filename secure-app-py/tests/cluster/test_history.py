"""Clients write and read one pair while its nodes are killed and paused; the history is judged.

SOAK=5 (minutes) goes on for longer. A failed history is saved beside the nodes' logs.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from testkit.checkers import linearizable
from testkit.cluster import Cluster, NoReply, Reply
from testkit.history import History
from testkit.sim.loading import load

pytestmark = pytest.mark.cluster

SECONDS = 60 * float(os.environ.get("SOAK", "0")) or 7.0
KEYS = ("x", "y", "z")


kit = load(str(Path(__file__).with_name("pair.py")))


async def client(cluster: Cluster, history: History, name: str, until: float) -> None:
    """Unique writes, compare-and-set and reads at the primary."""
    rng = random.Random(name)
    number = 0
    async with cluster.client(0) as http:
        while time.monotonic() < until:
            key = rng.choice(KEYS)
            if rng.random() < 0.4:
                operation = history.invoke(name, "read", key)
                reply = await http.get(f"/get?key={key}", timeout_s=4)
                if isinstance(reply, Reply) and reply.status == 200:
                    version = int(reply.headers["etag"].strip('"'))
                    found = {"value": reply.json["value"], "version": version}
                    history.ok(operation, found)
                elif isinstance(reply, Reply) and reply.status == 404:
                    history.ok(operation, None)
                else:
                    history.fail(operation)
                continue
            number += 1
            body: dict[str, object] = {"key": key, "value": f"{name}-{number}"}
            argument: object = body["value"]
            kind = "write"
            if rng.random() < 0.3:
                seen = await http.get(f"/get?key={key}", timeout_s=4)
                if not (isinstance(seen, Reply) and seen.status in (200, 404)):
                    continue
                version = int(seen.headers["etag"].strip('"')) if seen.status == 200 else 0
                body["expected_version"] = version
                argument = {"expected_version": version, "value": body["value"]}
                kind = "cas"
            operation = history.invoke(name, kind, key, argument)
            reply = await http.post("/set", body, timeout_s=6)
            if isinstance(reply, Reply) and reply.status == 200:
                history.ok(operation, int(reply.headers["etag"].strip('"')))
            elif isinstance(reply, Reply) and reply.status == 409:
                history.ok(operation, False)
            elif isinstance(reply, NoReply):
                if reply.definite:
                    history.fail(operation)
                    await asyncio.sleep(0.02)
                else:
                    history.unknown(operation)
            elif reply.status == 503 and reply.json.get("definite") is True:
                history.fail(operation)
            else:
                history.unknown(operation)


async def faults(cluster: Cluster, until: float) -> None:
    rng = random.Random(5)
    kinds = ["kill primary", "kill replica", "power cut", "pause replica", "pause primary",
             "cut link", "silent link"]  # fmt: skip
    rng.shuffle(kinds)
    while time.monotonic() < until:
        for kind in kinds:
            if time.monotonic() >= until:
                return
            match kind:
                case "power cut":
                    cluster.power_cut()
                case "kill primary":
                    cluster.kill(0)
                case "kill replica":
                    cluster.kill(1)
                case "pause replica":
                    cluster.pause(1)
                case "cut link":
                    cluster.cut(0, 1)
                case "silent link":
                    cluster.blackhole(0, 1)
                case _:
                    cluster.pause(0)
            await asyncio.sleep(rng.uniform(0.05, 0.4))
            cluster.heal()
            for index in (0, 1):
                if kind.startswith("pause"):
                    cluster.resume(index)
                elif not cluster.nodes[index].running:
                    cluster.start(index)
            await asyncio.gather(*(cluster.ready(index) for index in (0, 1)))
            await asyncio.sleep(rng.uniform(0.1, 0.6))


@pytest.mark.timeout(120 + 2 * SECONDS)
async def test_the_history_of_a_tormented_pair_is_linearizable(tmp_path: Path) -> None:
    history = History()
    async with kit.pair(tmp_path, proxied=True) as cluster:
        until = time.monotonic() + SECONDS
        clients = [client(cluster, history, f"c{n}", until) for n in range(4)]
        await asyncio.gather(*clients, faults(cluster, until))

        async def live() -> bool:
            async with cluster.client(0) as admin:
                return (await kit.get(admin, "/status")).json["link"] == "live"

        await kit.eventually(live)
        async with cluster.client(0) as admin, cluster.client(1) as replica:
            for key in KEYS:
                operation = history.invoke("last", "read", key)
                reply = await kit.get(admin, f"/get?key={key}")
                found = None  # a slow machine may not have come to write this key
                if reply.status != 404:
                    version = int(reply.headers["etag"].strip('"'))
                    found = {"value": reply.json["value"], "version": version}
                history.ok(operation, found)
                assert (await kit.get(replica, f"/get?key={key}")).body == reply.body
        assert await cluster.terminate_all() == [0, 0]
    for name in ("nodeA", "nodeB"):
        done = kit.command(tmp_path, "audit", "verify", "--id", name)
        assert done.returncode == 0, done.stdout
    verdict = linearizable.check(history, linearizable.VersionedRegister())
    if verdict.valid is False:
        history.save(tmp_path / "failed.jsonl")
    verdict.require()
    assert sum(op.status == "ok" for op in history) > 50
