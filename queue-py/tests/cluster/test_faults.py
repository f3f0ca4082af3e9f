"""What survives what: real processes, killed, paused, cut off and robbed of their disks."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from message_queue.core.placement.ring import partition_of
from testkit.checkers import total_queue
from testkit.cluster import Cluster, Reply
from testkit.cluster.files import flip_bit
from testkit.history import History

from .nodes import Recorder, is_stored, leftovers, owner_of, queue_cluster, until
from .pipelining import Pipeline, post_request

pytestmark = pytest.mark.cluster


async def test_a_power_cut_of_all_nodes_loses_nothing_and_resurrects_nothing(
    tmp_path: Path,
) -> None:
    history = History()
    async with queue_cluster(tmp_path) as cluster:
        stop = asyncio.Event()

        async def producer(number: int) -> None:
            recorder = Recorder(cluster, history, f"p{number}", number % 3)
            n = 0
            while not stop.is_set():
                await recorder.produce("cut", f"{number}/{n}")
                n += 1
            recorder.close()

        async def consumer(number: int) -> None:
            recorder = Recorder(cluster, history, f"c{number}", number % 3)
            while not stop.is_set():
                for message in await recorder.consume("cut", 5, wait_ms=200):
                    await recorder.ack("cut", message)
            recorder.close()

        stored: list[str] = []

        async def pipeliner(number: int) -> None:
            """Writes twenty at once; notes those that were answered."""
            client = await Pipeline.open(cluster, number)
            with suppress(OSError, EOFError):
                while not stop.is_set():
                    bodies = [{"queue": f"lines-{number}", "body": n} for n in range(20)]
                    client.write([post_request("/produce", body) for body in bodies])
                    for _ in bodies:
                        status, body = await client.read()
                        if status == 201:
                            stored.append(json.loads(body)["id"])
            await client.close()

        work = [asyncio.create_task(producer(n)) for n in range(4)]
        work += [asyncio.create_task(consumer(n)) for n in range(2)]
        work += [asyncio.create_task(pipeliner(n)) for n in range(2)]
        await until("a few hundred operations", lambda: at_least(history, 300))
        cluster.power_cut()
        stop.set()
        await asyncio.gather(*work)
        await cluster.start_all()
        kept = set().union(*[await leftovers(cluster, f"lines-{n}") for n in range(2)])
        assert stored
        assert not set(stored) - kept
        await end_leases(cluster, history, "cut")


async def waits_for(cluster: Cluster, index: int, queue: str) -> str:
    """One long poll; the id of what it brings."""
    async with cluster.client(index) as client:
        reply = await client.get(f"/consume?queue={queue}&wait_ms=20000", timeout_s=25)
    assert isinstance(reply, Reply), reply
    assert reply.status == 200, reply
    found: str = reply.json["id"]
    return found


async def at_least(history: History, count: int) -> bool:
    return sum(o.status == "ok" for o in history) >= count


async def end_leases(cluster: Cluster, history: History, queue: str) -> None:
    """Judge: leases do not outlive the owner's epoch by more than they were passed on, so all that
    is stored is ready within a lease; here it is acked instead of waited for."""
    async with cluster.client(0) as client:
        shown = await client.get(f"/queues/{queue}")
    assert isinstance(shown, Reply)
    left = await leftovers(cluster, queue)
    stored = sum(shown.json[key] for key in ("ready", "in_flight", "delayed"))
    in_flight = delivered_not_acked(history, queue)
    verdict = total_queue.check(
        history, leftovers=left | in_flight, causes={total_queue.OWNER, total_queue.LEASE}
    )
    verdict.require()
    # Nothing is hidden: what is stored is what could be leased now, and what was leased before.
    assert len(left) <= stored <= len(left | in_flight)


def delivered_not_acked(history: History, queue: str) -> set[str]:
    """Messages whose lease may still run: handed out, and no ack succeeded."""
    acked = {o.argument for o in history if o.kind == "ack" and o.status == "ok"}
    delivered = {
        message["id"]
        for o in history
        if o.kind == "consume" and o.key == queue and o.status == "ok"
        for message in o.result or ()
    }
    return delivered - acked


async def test_killing_the_owner_under_load_loses_nothing_and_leaves_nobody_waiting(
    tmp_path: Path,
) -> None:
    history = History()
    async with queue_cluster(tmp_path) as cluster:
        owner = await owner_of(cluster, "load")
        others = [n for n in range(3) if n != owner]
        stop = asyncio.Event()

        async def producer(number: int) -> None:
            recorder = Recorder(cluster, history, f"p{number}", others[number % 2])
            n = 0
            while not stop.is_set():
                await recorder.produce("load", f"{number}/{n}")
                n += 1
                await asyncio.sleep(0.005)
            recorder.close()

        async def consumer() -> None:
            recorder = Recorder(cluster, history, "c", others[0])
            while not stop.is_set():
                for message in await recorder.consume("load", 5, wait_ms=200):
                    await recorder.ack("load", message)
            recorder.close()

        work = [asyncio.create_task(producer(n)) for n in range(4)]
        work.append(asyncio.create_task(consumer()))
        await until("load", lambda: at_least(history, 200))
        # In the same partition: one who waits, at another node, for what was put off under the
        # owner that dies now.
        quiet = next(
            name for n in range(10_000) if partition_of(name := f"q{n}") == partition_of("load")
        )
        async with cluster.client(others[1]) as client:
            late = {"queue": quiet, "body": "late", "delay_ms": 3_000}
            put_off = await client.post("/produce", late)
        assert isinstance(put_off, Reply)
        assert put_off.status == 201
        waiting = asyncio.create_task(waits_for(cluster, others[1], quiet))

        async def stands_in_line() -> bool:
            async with cluster.client(others[0]) as client:
                figures = await client.get(f"/queues/{quiet}")
            return isinstance(figures, Reply) and figures.json["waiting_consumers"] == 1

        await until("the poll has come to the owner", stands_in_line)
        cluster.kill(owner)
        killed = time.monotonic()
        probe = Recorder(cluster, history, "probe", others[0])
        probes = itertools.count()

        async def taken_over() -> bool:
            return is_stored(await probe.produce("load", f"probe/{next(probes)}"))

        await until("another owner", taken_over)
        outage_s = time.monotonic() - killed
        done = sum(o.status == "ok" for o in history)
        await until("load goes on", lambda: at_least(history, done + 100))
        assert await waiting == put_off.json["id"]
        stop.set()
        await asyncio.gather(*work)
        probe.close()
        assert outage_s < 10, "the contract says 2 s on an idle machine"
        await cluster.start_all()
        await end_leases(cluster, history, "load")


async def test_an_owner_cut_off_from_both_replicas_refuses_and_the_others_take_over(
    tmp_path: Path,
) -> None:
    async with queue_cluster(tmp_path, proxied=True) as cluster:
        owner = await owner_of(cluster, "split")
        others = [n for n in range(3) if n != owner]
        async with cluster.client(owner) as inside, cluster.client(others[0]) as outside:
            first = await inside.post("/produce", {"queue": "split", "body": "before"})
            assert isinstance(first, Reply)
            assert first.status == 201
            cluster.partition({owner}, set(others), silent=True)
            began = time.monotonic()
            refused = await inside.post("/produce", {"queue": "split", "body": "lost side"})
            assert isinstance(refused, Reply)
            assert refused.status == 503
            assert "definite" in refused.json
            assert time.monotonic() - began < 5, "the contract says 2 s on an idle machine"

            async def served() -> bool:
                reply = await outside.post("/produce", {"queue": "split", "body": "after"})
                return isinstance(reply, Reply) and reply.status == 201

            await until("the majority has an owner", served)
            stale = await inside.get("/consume?queue=split")
            assert isinstance(stale, Reply)
            assert stale.status == 503
            cluster.heal()

            async def whole() -> bool:
                reply = await inside.get("/readyz")
                return isinstance(reply, Reply) and reply.status == 200

            await until("the cut-off node is back", whole)
            seen = await inside.get("/queues/split/peek?max=100")
            assert isinstance(seen, Reply)
            bodies = [m["body"] for m in seen.json["messages"]]
            assert bodies[0] == "before"
            assert "after" in bodies
            # A produce with an unknown outcome may have been stored; a definite refusal may not.
            if refused.json["definite"]:
                assert "lost side" not in bodies


async def test_a_paused_owner_that_wakes_up_serves_nothing_old(tmp_path: Path) -> None:
    async with queue_cluster(tmp_path) as cluster:
        owner = await owner_of(cluster, "pause")
        others = [n for n in range(3) if n != owner]
        async with cluster.client(others[0]) as client:
            reply = await client.post("/produce", {"queue": "pause", "body": "x"})
            assert isinstance(reply, Reply)
            name = reply.json["id"]
            cluster.pause(owner)

            async def acked() -> bool:
                ack = await client.post("/ack", {"message_id": name})
                return isinstance(ack, Reply) and ack.status == 200

            await until("another owner takes the ack", acked)
            async with cluster.client(owner) as sleeper:
                asked = asyncio.create_task(sleeper.get("/consume?queue=pause"))
                await asyncio.sleep(0.1)
                cluster.resume(owner)
                answer = await asked
                # Acked is acked, whoever is asked and however long it slept.
                if isinstance(answer, Reply):
                    assert answer.status in (204, 503)
                for _ in range(5):
                    again = await sleeper.get("/consume?queue=pause")
                    assert isinstance(again, Reply)
                    assert again.status in (204, 503)


async def test_a_node_that_lost_its_disk_is_filled_again_before_it_counts(tmp_path: Path) -> None:
    async with queue_cluster(tmp_path) as cluster:
        async with cluster.client(0) as client:
            kept = []
            for n in range(30):
                reply = await client.post("/produce", {"queue": f"disk{n % 7}", "body": n})
                assert isinstance(reply, Reply)
                assert reply.status == 201
                kept.append(reply.json["id"])
            for name in kept[:10]:
                assert isinstance(await client.post("/ack", {"message_id": name}), Reply)
        cluster.kill(2)
        shutil.rmtree(cluster.views[2].data_dir)
        await cluster.start_all()

        async def filled() -> bool:
            async with cluster.client(2) as client:
                reply = await client.get("/status")
            assert isinstance(reply, Reply)
            return reply.json["storage"]["stored_records"] >= 20

        await until("the wiped node has copies", filled)
        # Now the first two lose theirs, one after the other: the third has kept everything.
        for index in (0, 1):
            cluster.kill(index)
            await end_of_absence(cluster, index)
        found = set()
        for n in range(7):
            found |= await leftovers(cluster, f"disk{n}", ask=2)
        assert found == set(kept[10:])


async def end_of_absence(cluster: Cluster, index: int) -> None:
    """Start a node again and wait until it is ready."""
    cluster.start(index)
    await cluster.ready(index)


async def test_a_flipped_bit_is_reported_quarantined_and_healed_from_the_peers(
    tmp_path: Path,
) -> None:
    async with queue_cluster(tmp_path, flags=("--segment_bytes=65536",)) as cluster:
        kept = set()
        async with cluster.client(0) as client:
            for n in range(40):
                body = {"queue": f"flip{n % 5}", "body": f"{n} " + "x" * 2_000}
                reply = await client.post("/produce", body)
                assert isinstance(reply, Reply)
                assert reply.status == 201
                kept.add(reply.json["id"])
        cluster.power_cut()
        log = cluster.views[1].data_dir / "log"
        first = min(log.glob("segment-*.log"))
        flip_bit(first, seed=7, start=first.stat().st_size // 2)
        await cluster.start_all()
        assert "has damaged records" in cluster.nodes[1].output()

        async def healed() -> bool:
            return any((log / "quarantine").glob("segment-*.log"))

        await until("the damaged segment is in quarantine", healed)

        async def whole() -> bool:
            async with cluster.client(1) as client:
                reply = await client.get("/status")
            assert isinstance(reply, Reply)
            return reply.json["storage"]["stored_records"] == 40

        await until("the node has everything again", whole)
        # The healed node now serves all of it with a peer that has nothing of its own.
        cluster.kill(0)
        shutil.rmtree(cluster.views[0].data_dir)
        await end_of_absence(cluster, 0)
        found = set()
        for n in range(5):
            found |= await leftovers(cluster, f"flip{n}", ask=1)
        assert found == kept


async def test_a_stop_hands_over_without_loss_or_duplicate(tmp_path: Path) -> None:
    async with queue_cluster(tmp_path) as cluster:
        owner = await owner_of(cluster, "handover")
        other = (owner + 1) % 3
        async with cluster.client(other) as client:
            produced = []
            for n in range(20):
                reply = await client.post("/produce", {"queue": "handover", "body": n})
                assert isinstance(reply, Reply)
                produced.append(reply.json["id"])
            reply = await client.get("/consume?queue=handover&max=5")
            assert isinstance(reply, Reply)
            leased = reply.json["messages"]
            assert await cluster.nodes[owner].terminate() == 0
            again = await leftovers(cluster, "handover", ask=other)
            # What is leased stays leased at the new owner, and its receipts are good.
            assert again == set(produced[5:])
            for message in leased:
                body = {"message_id": message["id"], "receipt": message["receipt"]}
                ack = await client.post("/ack", body)
                assert isinstance(ack, Reply)
                assert ack.status == 200
