"""A cluster of real queue nodes, and a client that records what it did and saw."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TypeGuard

import msgspec

from testkit.checkers import total_queue
from testkit.cluster import Cluster, HttpClient, NodeView, Outcome, Reply
from testkit.history import History, Operation

MAIN = Path(__file__).resolve().parents[2] / "main.py"
DEADLINE_S = 20.0
VISIBILITY_MS = 1_000
CLOCK_SLACK_MS = 50
"""A lease is counted in cluster time, which may jump ahead by so much untold."""


def queue_cluster(
    root: Path,
    *,
    size: int = 3,
    proxied: bool = False,
    flags: tuple[str, ...] = (),
    main: tuple[str, ...] = (str(MAIN),),
) -> Cluster:
    """`proxied`: with a breakable link per ordered pair. `main`: what the interpreter runs."""

    def argv(view: NodeView) -> list[str]:
        return [
            sys.executable,
            *main,
            f"--id=node{view.index}",
            f"--addr={view.bind()}",
            f"--peers={','.join(view.dials())}",
            f"--dataDir={view.data_dir}",
            *flags,
        ]

    channels = ("http",) if proxied else ()
    return Cluster(argv, size, root=root, cwd=root, proxied=channels, env={"CLUSTER_SECRET": ""})


async def until(what: str, condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll until the condition holds; fails after `DEADLINE_S`."""
    give_up = time.monotonic() + DEADLINE_S
    while not await condition():
        assert time.monotonic() < give_up, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.05)


def judged(history: History, stored: Set[str], save_as: Path, told: str) -> None:
    """What the total-queue checker says of a history, with every duplicate explained; printed, and
    asserted. One that fails is saved."""
    verdict = total_queue.check(
        history, leftovers=stored, causes=total_queue.CAUSES, slack_ms=CLOCK_SLACK_MS
    )
    if not verdict.valid:
        history.save(save_as)
    done = sum(o.status == "ok" for o in history)
    doubt = sum(o.status == "unknown" for o in history)
    print(f"{told}: {done} ok, {doubt} in doubt, {verdict}")
    verdict.require()
    assert done > 50


async def owner_of(cluster: Cluster, queue: str, ask: int = 0) -> int:
    """The index of the node that owns a queue, as node `ask` sees it."""
    found: list[int] = []

    async def known() -> bool:
        async with cluster.client(ask) as client:
            reply = await client.get(f"/ring?queue={queue}")
        assert isinstance(reply, Reply), reply
        owner = reply.json["partitions"][0]["owner"]
        addresses = [view.bind() for view in cluster.views]
        if owner in addresses:
            found.append(addresses.index(owner))
        return bool(found)

    await until(f"{queue} has an owner", known)
    return found[-1]


def is_stored(outcome: Outcome) -> TypeGuard[Reply]:
    """A produce that was answered with 201, or 200 because it was stored before."""
    return isinstance(outcome, Reply) and outcome.status in (200, 201)


class Recorder:
    """One client that keeps to one node (`target` may be changed) and writes down what happens."""

    def __init__(self, cluster: Cluster, history: History, name: str, target: int) -> None:
        self.cluster = cluster
        self.history = history
        self.name = name
        self.target = target
        self._client: HttpClient | None = None
        self._connected = -1

    async def _ask(self, method: str, path: str, body: object = None) -> Outcome:
        if self._client is None or self._connected != self.target:
            if self._client is not None:
                self._client.close()
            self._client = self.cluster.client(self.target)
            self._connected = self.target
        if method == "GET":
            return await self._client.get(path)
        return await self._client.post(path, body)

    def _record(
        self, operation: Operation, outcome: Outcome, result: object, facts: Mapping[str, bool]
    ) -> None:
        info = {**facts, "answer": str(outcome)[:200]}
        if isinstance(outcome, Reply) and outcome.status in (200, 201, 204):
            self.history.ok(operation, result, info)
        elif outcome.definite:
            self.history.fail(operation, info=info)
        else:
            self.history.unknown(operation, info=info)

    async def produce(
        self, queue: str, body: str, *, dedupe: bool = False, retry: bool = False
    ) -> Outcome:
        """`dedupe`: with an id of its own; `retry`: what was sent before is in doubt."""
        operation = self.history.invoke(self.name, "produce", queue, body)
        message = {"queue": queue, "body": body}
        if dedupe:
            message["dedupe_id"] = body
        outcome = await self._ask("POST", "/produce", message)
        result = outcome.json["id"] if is_stored(outcome) else None
        self._record(operation, outcome, result, {"dedupe": dedupe, "retry": retry})
        return outcome

    async def consume(
        self, queue: str, most: int = 10, wait_ms: int = 0, visibility_ms: int = 30_000
    ) -> list[dict[str, object]]:
        operation = self.history.invoke(
            self.name, "consume", queue, {"visibility_ms": visibility_ms}
        )
        path = f"/consume?queue={queue}&max={most}&wait_ms={wait_ms}"
        path += f"&visibility_ms={visibility_ms}"
        outcome = await self._ask("GET", path)
        found = []
        if isinstance(outcome, Reply) and outcome.status == 200:
            found = outcome.json["messages"]
        self._record(operation, outcome, found, {})
        return found

    async def ack(self, queue: str, message: dict[str, object]) -> bool:
        operation = self.history.invoke(self.name, "ack", queue, message["id"])
        body = {"message_id": message["id"], "receipt": message["receipt"]}
        outcome = await self._ask("POST", "/ack", body)
        self._record(operation, outcome, None, {})
        return isinstance(outcome, Reply) and outcome.status == 200

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


async def leftovers(cluster: Cluster, queue: str, ask: int = 0) -> set[str]:
    """Ids that are still stored, wherever they stand: everything is leased until nothing comes."""
    async with cluster.client(ask) as client:
        found: set[str] = set()
        while True:
            reply = await client.get(f"/consume?queue={queue}&max=1000")
            assert isinstance(reply, Reply), reply
            if reply.status == 204:
                return found
            assert reply.status == 200, reply
            found |= {message["id"] for message in reply.json["messages"]}


async def configure(cluster: Cluster, queue: str) -> None:
    """Short leases, and no dead letters: they have other ids."""
    settings = msgspec.json.encode({"visibility_ms": VISIBILITY_MS, "max_deliveries": None})

    async def done() -> bool:
        async with cluster.client(0) as client:
            reply = await client.request("PUT", f"/queues/{queue}", body=settings)
        return isinstance(reply, Reply) and reply.status == 200

    await until(f"{queue} is configured", done)


async def producer(
    cluster: Cluster,
    history: History,
    number: int,
    stop: asyncio.Event,
    queues: Sequence[str],
    nodes: Sequence[int],
) -> None:
    """Stores numbered bodies through any of these nodes. What stays in doubt is sent again, often
    with a dedupe id: that must be one message in the end."""
    recorder = Recorder(cluster, history, f"p{number}", number)
    rng = random.Random(number)
    count = 0
    while not stop.is_set():
        queue, dedupe = rng.choice(queues), rng.random() < 0.5
        retry = False
        while not stop.is_set() or not retry:
            recorder.target = rng.choice(nodes)
            sent = await recorder.produce(queue, f"{number}/{count}", dedupe=dedupe, retry=retry)
            retry = retry or not sent.definite
            if is_stored(sent) or not retry or rng.random() < 0.3:
                break
            await asyncio.sleep(0.05)
        count += 1
        await asyncio.sleep(rng.uniform(0, 0.04))
    recorder.close()


async def consumer(
    cluster: Cluster,
    history: History,
    number: int,
    stop: asyncio.Event,
    queues: Sequence[str],
    nodes: Sequence[int],
) -> None:
    """Takes through any of these nodes, and acks nine of ten."""
    recorder = Recorder(cluster, history, f"c{number}", number)
    rng = random.Random(100 + number)
    while not stop.is_set():
        recorder.target = rng.choice(nodes)
        queue = rng.choice(queues)
        for message in await recorder.consume(
            queue, 5, wait_ms=rng.choice((0, 200)), visibility_ms=VISIBILITY_MS
        ):
            if rng.random() < 0.9:
                await recorder.ack(queue, message)
        await asyncio.sleep(rng.uniform(0, 0.04))
    recorder.close()


async def drained(cluster: Cluster, queues: Sequence[str], ask: int = 0) -> set[str]:
    """Ids of all that is still stored, once no lease runs any more."""
    found: set[str] = set()
    for queue in queues:

        async def at_rest(queue: str = queue) -> bool:
            async with cluster.client(ask) as client:
                shown = await client.get(f"/queues/{queue}")
            return isinstance(shown, Reply) and shown.status == 200 and not shown.json["in_flight"]

        await until(f"{queue} is at rest", at_rest)
        found |= await leftovers(cluster, queue, ask)
    return found
