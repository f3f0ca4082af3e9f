"""A fourth node comes and another goes, while clients work: real processes, and a judge."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.checkers import total_queue
from testkit.checkers.verdict import Verdict
from testkit.cluster import Cluster, Reply
from testkit.history import History

from .nodes import Recorder, leftovers, until
from .ring_cluster import FOUNDERS, ask, at_rest, changed, founded, ring

pytestmark = pytest.mark.cluster

QUEUES = tuple(f"jobs{n}" for n in range(10))


class Load:
    """Clients that keep to the nodes they are told."""

    def __init__(self, cluster: Cluster, *, planned: bool = True) -> None:
        """``planned``: nothing fails, so no delivery is lost to its consumer."""
        self.cluster = cluster
        self.planned = planned
        self.history = History()
        self.targets = list(range(FOUNDERS))
        self._stop = asyncio.Event()
        self._work: list[asyncio.Task[None]] = []

    def __enter__(self) -> Load:
        self._work = [asyncio.create_task(self._produce(n)) for n in range(3)]
        self._work += [asyncio.create_task(self._consume(n)) for n in range(3)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    async def end(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._work)

    async def some(self) -> None:
        """A few dozen more operations."""
        wanted = len(self.history) + 40

        async def enough() -> bool:
            return len(self.history) >= wanted

        await until("clients go on", enough)

    def _turns(self, seed: int) -> Iterator[tuple[str, random.Random]]:
        rng = random.Random(seed)
        while not self._stop.is_set():
            yield rng.choice(QUEUES), rng

    async def _produce(self, number: int) -> None:
        recorder = Recorder(self.cluster, self.history, f"p{number}", 0)
        for count, (queue, rng) in enumerate(self._turns(number)):
            recorder.target = rng.choice(self.targets)
            await recorder.produce(queue, f"{number}/{count}")
            await asyncio.sleep(rng.uniform(0, 0.03))
        recorder.close()

    async def _consume(self, number: int) -> None:
        recorder = Recorder(self.cluster, self.history, f"c{number}", 0)
        for queue, rng in self._turns(100 + number):
            recorder.target = rng.choice(self.targets)
            messages = await recorder.consume(queue, 5, wait_ms=rng.choice((0, 50)))
            # Long enough for an owner to change between delivery and ack.
            await asyncio.sleep(rng.uniform(0, 0.2))
            for message in messages:
                done = await recorder.ack(queue, message)
                assert done or not self.planned, "its lease did not survive the move"
        recorder.close()

    async def judge(self, ask_index: int) -> Verdict:
        left: set[str] = set()
        for queue in QUEUES:
            left |= await leftovers(self.cluster, queue, ask_index)
        # Where no owner is lost, that is no excuse for a second delivery.
        causes = {total_queue.LEASE} if self.planned else {total_queue.LEASE, total_queue.OWNER}
        return total_queue.check(
            self.history, leftovers=left, exclusive=self.planned, causes=causes
        )


async def test_a_node_joins_and_another_leaves_without_a_loss_or_a_duplicate(
    tmp_path: Path,
) -> None:
    async with founded(tmp_path) as cluster:
        before = await at_rest(cluster, 0)
        with Load(cluster) as load:
            await load.some()
            cluster.start(3)
            await changed(cluster, 0, 3, {0, 1, 2, 3})
            await cluster.ready(3)
            after = await at_rest(cluster, 0)
            moved = sum(before[p] != after[p] for p in before)
            assert 0 < moved <= 32, f"{moved} of 64 owners changed; about 16 should"
            load.targets = [0, 1, 2, 3]
            await load.some()

            again = await ask(cluster, 2, "/admin/join", {"addr": cluster.views[3].bind()})
            assert again.status == 200
            assert again.json["status"] == "member"
            load.targets = [1, 2, 3]
            leaver = {"addr": cluster.views[0].bind()}
            accepted = await ask(cluster, 0, "/admin/leave", leaver)
            assert accepted.status == 202, accepted
            assert accepted.json["status"] == "leaving"
            await changed(cluster, 1, 5, {1, 2, 3})
            await load.some()
            await left(cluster, 0)
            assert await cluster.nodes[0].terminate() == 0
            await load.some()
            await load.end()
        verdict = await load.judge(3)
        print(verdict)
        verdict.require()
        doubts = [o for o in load.history if o.status == "unknown"]
        assert not doubts, f"a planned move left clients in doubt: {doubts[:3]}"
        assert verdict.counts["duplicates"] == 0, verdict


async def left(cluster: Cluster, index: int) -> None:
    """That node says that it is no member any more, and serves nobody."""

    async def says_so() -> bool:
        async with cluster.client(index) as client:
            readiness = await client.get("/readyz")
            answer = await client.post("/produce", {"queue": "late", "body": 1})
        return (
            isinstance(readiness, Reply)
            and isinstance(answer, Reply)
            and "has left the cluster" in readiness.json.get("reason", "")
            and answer.status == 503
            and answer.json["definite"] is True
        )

    await until("the leaver knows that it has left", says_so)


async def test_a_change_survives_the_death_of_everybody_in_the_middle_of_it(
    tmp_path: Path,
) -> None:
    async with founded(tmp_path) as cluster:
        with Load(cluster, planned=False) as load:
            await load.some()
            cluster.start(3)

            async def begun() -> bool:
                return (await ring(cluster, 0))["version"] >= 2

            await until("the join was accepted", begun)
            cluster.power_cut()
            await load.end()
        await cluster.start_all()
        await changed(cluster, 2, 3, {0, 1, 2, 3})
        cluster.kill(3)  # with its place by now, and the same --join
        cluster.start(3)
        await cluster.ready(3)
        # And one that leaves, with what it still has to hand over: it comes back to do so.
        leaver = {"addr": cluster.views[0].bind()}
        assert (await ask(cluster, 1, "/admin/leave", leaver)).status == 202
        cluster.kill(0)
        cluster.start(0)
        await changed(cluster, 2, 5, {1, 2, 3})
        verdict = await load.judge(3)
        print(verdict)
        verdict.require()


async def test_a_join_is_called_off_mistakes_are_refused_and_a_stopped_node_is_replaced(
    tmp_path: Path,
) -> None:
    async with founded(tmp_path) as cluster:
        nobody = {"addr": cluster.views[3].bind()}
        accepted = await ask(cluster, 1, "/admin/join", nobody)
        assert accepted.status == 202
        # Who looks where it asked takes no change for over that has not come there yet.
        seen = await ring(cluster, 1)
        assert (seen["version"], seen["change"]["kind"]) == (accepted.json["version"], "join")
        assert accepted.json["status"] == "joining"
        assert accepted.json["position"] == 3
        other = await ask(cluster, 0, "/admin/join", {"addr": "127.0.0.1:9"})
        assert other.status == 409
        assert other.json["error"] == "Another ring change is in progress"
        assert other.json["change"]["addr"] == nobody["addr"]
        assert (await ask(cluster, 2, "/admin/join", nobody)).status == 202  # a retry
        assert (await ask(cluster, 2, "/admin/leave", nobody)).status == 202
        await changed(cluster, 0, 4, {0, 1, 2})

        assert (await ask(cluster, 0, "/admin/leave", nobody)).status == 404
        wrong = await ask(cluster, 0, "/admin/join", {"addr": "nonsense"})
        assert wrong.status == 400
        assert wrong.json["field"] == "addr"
        assert (await ask(cluster, 0, "/admin/join", {})).status == 400

        # Now the first one stops, stays away, and is replaced.
        address = cluster.views[0].bind()
        began_s = time.monotonic()
        stopping = asyncio.create_task(cluster.nodes[0].terminate())

        async def handed_over() -> bool:
            found = await ring(cluster, 1)
            return all(p["owner"] not in (None, address) for p in found["partitions"])

        await until("all partitions have other owners", handed_over)
        handed_over_s = time.monotonic() - began_s
        assert await stopping == 0
        print(f"handed over after {handed_over_s * 1000:.0f} ms")
        assert handed_over_s < 5  # a second, on a machine that is not busy with other tests

        assert (await ask(cluster, 1, "/admin/leave", {"addr": address})).status == 202
        await changed(cluster, 1, 6, {1, 2})
        last = await ask(cluster, 1, "/admin/leave", {"addr": cluster.views[1].bind()})
        assert last.status == 409
        assert last.json["error"] == "Too few nodes would be left"
        cluster.start(3)
        await changed(cluster, 2, 8, {1, 2, 4})
        await cluster.ready(3)
        # The one that was away learns that it is no member any more.
        cluster.start(0)
        await left(cluster, 0)
