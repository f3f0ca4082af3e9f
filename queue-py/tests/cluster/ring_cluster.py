"""A cluster whose members change: three nodes found it, others stand by."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import testkit.cluster
from testkit.cluster import Cluster, NodeView, Reply

from .nodes import MAIN, until

FOUNDERS = 3
REROUTED = Path(testkit.cluster.__file__).with_name("rerouted.py")


def argv(view: NodeView) -> list[str]:
    """Three founders; the others join. If there are proxies, all reach each other by them, also
    those of whom they only hear."""
    founders = view.reals()[:FOUNDERS]
    place = f"--peers={','.join(founders)}" if view.index < FOUNDERS else f"--join={founders[1]}"
    routes = ",".join(
        f"{view.real(n)}={view.dial(n)}" for n in view.others() if view.real(n) != view.dial(n)
    )
    return [
        sys.executable, *((str(REROUTED), routes) if routes else ()), str(MAIN),
        f"--id=node{view.index}", f"--addr={view.bind()}", place, f"--dataDir={view.data_dir}",
    ]  # fmt: skip


@asynccontextmanager
async def founded(root: Path, size: int = 4, *, proxied: bool = False) -> AsyncIterator[Cluster]:
    """Three nodes that run and others that do not yet."""
    channels = ("http",) if proxied else ()
    cluster = Cluster(argv, size, root=root, cwd=root, proxied=channels, env={"CLUSTER_SECRET": ""})
    cluster.prepare()
    try:
        for index in range(FOUNDERS):
            cluster.start(index)
        for index in range(FOUNDERS):
            await cluster.ready(index)
        yield cluster
    finally:
        cluster.close()


def joins(cluster: Cluster, index: int, members: Sequence[int]) -> None:
    """From now on that machine starts as one that wants in, whatever it was before."""
    asked = ",".join(cluster.views[member].bind() for member in members)
    place = [f"--join={asked}"]
    node = cluster.nodes[index]
    node.argv = [*(arg for arg in node.argv if not arg.startswith(("--peers", "--join"))), *place]


async def ask(cluster: Cluster, index: int, path: str, body: object) -> Reply:
    found: list[Reply] = []

    async def answered() -> bool:
        # 503: some partition is just changing hands; the client is told to come again.
        async with cluster.client(index) as client:
            reply = await client.post(path, body)
        assert isinstance(reply, Reply), reply
        found.append(reply)
        return reply.status != 503

    await until(f"{path} is answered", answered)
    return found[-1]


async def ring(cluster: Cluster, index: int) -> dict[str, Any]:
    async with cluster.client(index) as client:
        reply = await client.get("/ring")
    assert isinstance(reply, Reply), reply
    assert reply.status == 200, reply
    found: dict[str, Any] = reply.json
    return found


async def changed(cluster: Cluster, index: int, version: int, members: set[int]) -> None:
    """The change is over, as that node knows, and these are the members."""

    async def over() -> bool:
        try:
            found = await ring(cluster, index)
        except AssertionError:
            return False
        positions = {node["position"] for node in found["nodes"]}
        return found["version"] >= version and found["change"] is None and positions == members

    await until(f"version {version} with members {members}", over)


async def at_rest(cluster: Cluster, index: int) -> dict[int, str]:
    """Every partition is with its best owner; who that is."""
    found: dict[int, str] = {}

    async def best() -> bool:
        partitions = (await ring(cluster, index))["partitions"]
        found.update({p["partition"]: p["owner"] for p in partitions})
        return all(p["owner"] == p["replicas"][0] for p in partitions)

    await until("every partition is with its best owner", best)
    return found
