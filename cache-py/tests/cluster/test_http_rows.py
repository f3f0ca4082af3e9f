"""Each row of the HTTP table, from outside, on three real nodes."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import Cluster, HttpClient, Reply

sys.path.insert(0, str(Path(__file__).parent))

from cache_nodes import argv, linked, until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(argv("--capacity=2000"), 3, root=tmp_path_factory.mktemp("rows"))
    cluster.prepare()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
async def nodes(running: Cluster) -> AsyncIterator[list[HttpClient]]:
    await running.start_all()
    await linked(running)
    async with running.client(0) as a, running.client(1) as b, running.client(2) as c:
        yield [a, b, c]


async def answer(reply: Any, status: int = 200) -> Any:
    got = await reply
    assert isinstance(got, Reply), got
    assert got.status == status, (got.status, got.text)
    return got.json


def named(client: HttpClient, path: str, body: object, name: str) -> Any:
    return client.request(
        "POST", path, body=json.dumps(body).encode(), headers={"Idempotency-Key": name}
    )


async def test_a_named_change_is_answered_alike_by_every_node_and_counts_once(
    nodes: list[HttpClient],
) -> None:
    calls: list[tuple[str, dict[str, object]]] = [
        ("/incr", {"key": "named-n", "by": 5}),
        ("/write", {"key": "named-w", "value": [1]}),
        ("/cas", {"key": "named-c", "expected_version": 0, "value": "x"}),
        ("/delete", {"key": "named-w"}),
    ]
    for number, (path, body) in enumerate(calls):
        answers = [await answer(named(each, path, body, f"name-{number}")) for each in nodes * 2]
        assert all(each == answers[0] for each in answers), answers
    assert (await answer(nodes[0].get("/read?key=named-n")))["value"] == 5
    assert (await answer(nodes[1].get("/read?key=named-c")))["version"] == 1
    await answer(nodes[0].get("/read?key=named-w"), 404)


async def test_the_same_name_with_another_body_is_422_and_does_nothing(
    nodes: list[HttpClient],
) -> None:
    await answer(named(nodes[0], "/write", {"key": "r", "value": 1}, "used"))
    others: list[tuple[str, dict[str, object]]] = [
        ("/write", {"key": "r", "value": 2}),
        ("/write", {"key": "another", "value": 1}),
        ("/write", {"key": "r", "value": 1, "ttl_ms": 5000}),
        ("/cas", {"key": "r", "expected_version": 1, "value": 2}),
        ("/incr", {"key": "r"}),
        ("/delete", {"key": "r"}),
    ]
    for client in nodes:
        for path, body in others:
            refused = await answer(named(client, path, body, "used"), 422)
            assert refused["error"] == "Idempotency-Key was used for another request"
    assert (await answer(nodes[1].get("/read?key=r")))["version"] == 1
    await answer(nodes[1].get("/read?key=another"), 404)


@pytest.mark.parametrize("name", ["", " ", "x" * 257, "tab\tinside", "schön"])
async def test_a_bad_name_is_400(name: str, nodes: list[HttpClient]) -> None:
    refused = await answer(named(nodes[0], "/incr", {"key": "bad-name"}, name), 400)
    assert refused["field"] == "Idempotency-Key"
    await answer(nodes[0].get("/read?key=bad-name"), 404)


async def test_a_batch_takes_no_name(nodes: list[HttpClient]) -> None:
    batch = {"items": [{"key": "batch-name", "value": 1}]}
    refused = await answer(named(nodes[0], "/mwrite", batch, "x"), 400)
    assert refused["field"] == "Idempotency-Key"
    await answer(nodes[0].get("/read?key=batch-name"), 404)


async def test_a_named_change_is_remembered_over_the_death_of_all_nodes(
    nodes: list[HttpClient], running: Cluster
) -> None:
    await answer(nodes[1].post("/write", {"key": "killed-text", "value": "text"}))
    calls: list[tuple[str, dict[str, object], int]] = [
        ("/incr", {"key": "killed", "by": 3}, 200),
        ("/cas", {"key": "killed-cas", "expected_version": 1, "value": 1}, 409),
        ("/delete", {"key": "killed-delete"}, 200),
        ("/incr", {"key": "killed-text"}, 409),
    ]
    first = [
        await answer(named(nodes[0], path, body, f"over-death{number}"), status)
        for number, (path, body, status) in enumerate(calls)
    ]
    for _, body, _ in calls[1:]:  # what had no effect would have one now
        await answer(nodes[2].post("/write", {"key": body["key"], "value": 1}))
    running.power_cut()
    await running.start_all()
    await linked(running)
    async with running.client(2) as c:

        async def again(number: int) -> bool:
            path, body, status = calls[number]
            reply = await named(c, path, body, f"over-death{number}")
            assert isinstance(reply, Reply)
            assert reply.status in (status, 503), reply
            return reply.status == status and bool(reply.json == first[number])

        for number in range(len(calls)):
            await until(lambda n=number: again(n), "the same answer after the restart")
        assert (await answer(c.get("/read?key=killed")))["value"] == 3
        assert (await answer(c.get("/read?key=killed-delete")))["value"] == 1


async def test_compare_and_set_goes_by_versions_that_never_come_again(
    nodes: list[HttpClient],
) -> None:
    a, b, c = nodes

    def cas(client: HttpClient, version: int, value: object) -> Any:
        return client.post("/cas", {"key": "cas", "expected_version": version, "value": value})

    mismatch = {"error": "Version mismatch", "key": "cas"}
    assert await answer(cas(a, 1, "x"), 409) == {**mismatch, "version": 0}
    assert await answer(cas(a, 0, None)) == {
        "status": "ok", "key": "cas", "value": None, "state": "M", "version": 1,
    }  # fmt: skip
    assert await answer(cas(b, 0, "x"), 409) == {**mismatch, "version": 1}
    assert (await answer(cas(b, 1, [2])))["version"] == 2
    assert await answer(cas(c, 1, "x"), 409) == {**mismatch, "version": 2}
    gone = await answer(c.post("/delete", {"key": "cas"}))
    assert gone == {"status": "ok", "key": "cas", "deleted": True}
    assert (await answer(a.post("/delete", {"key": "cas"})))["deleted"] is False
    assert await answer(a.get("/read?key=cas"), 404) == {"error": "Key not found"}
    assert "cas" not in {x["key"] for x in (await answer(c.get("/lines")))["lines"]}
    assert await answer(cas(b, 2, "x"), 409) == {**mismatch, "version": 0}
    assert (await answer(cas(b, 0, "x")))["version"] > 2


async def test_increments_on_all_nodes_at_once_are_atomic(nodes: list[HttpClient]) -> None:
    async def count(client: HttpClient) -> list[tuple[int, int]]:
        replies = [
            await answer(client.post("/incr", {"key": "atomic", "by": 3})) for _ in range(20)
        ]
        return [(reply["value"], reply["version"]) for reply in replies]

    seen = sorted(chain.from_iterable(await asyncio.gather(*map(count, nodes))))
    assert seen == [(3 * n, n) for n in range(1, 61)]
    assert (await answer(nodes[0].post("/incr", {"key": "atomic", "by": -180})))["value"] == 0
    await answer(nodes[1].post("/write", {"key": "text", "value": "1"}))
    refused = await answer(nodes[2].post("/incr", {"key": "text", "by": 1}), 409)
    assert refused == {
        "error": "Value is not an integer in range", "key": "text", "version": 1,
    }  # fmt: skip


async def test_each_item_of_a_batch_has_its_own_result_in_its_own_place(
    nodes: list[HttpClient],
) -> None:
    items = [
        {"key": "twice", "value": 1}, {"key": "null", "value": None}, {"key": "twice", "value": 2},
        {"key": "soon", "value": 0, "ttl_ms": 1},
    ]  # fmt: skip
    written = (await answer(nodes[0].post("/mwrite", {"items": items})))["results"]
    assert [(x["key"], x["value"], x["version"]) for x in written] == [
        ("twice", 1, 1), ("null", None, 1), ("twice", 2, 2), ("soon", 0, 1),
    ]  # fmt: skip

    async def over() -> bool:
        reply = await nodes[2].get("/read?key=soon")
        return isinstance(reply, Reply) and reply.status == 404

    await until(over, "its time is over")
    keys = ["null", "none", "twice", "twice", "soon"]
    read = (await answer(nodes[1].post("/mread", {"keys": keys})))["results"]
    assert read[0] == {
        "key": "null", "value": None, "state": "S", "hit": False, "source": "memory", "version": 1,
    }  # fmt: skip
    assert [read[n] for n in (1, 4)] == [
        {"key": key, "error": "Key not found"} for key in ("none", "soon")
    ]
    assert read[2]["value"] == read[3]["value"] == 2
    for path, body in (("/mread", {"keys": []}), ("/mwrite", {"items": []})):
        assert await answer(nodes[2].post(path, body)) == {"results": []}
    too_many = {"items": [{"key": "k", "value": 1}] * 1001}
    assert (await answer(nodes[2].post("/mwrite", too_many), 400))["field"] == "items"
    bad = await answer(
        nodes[2].post("/mwrite", {"items": [{"key": "k", "value": 1}, {"key": ""}]}), 400
    )
    assert bad["field"].startswith("items[1]")
    await answer(nodes[2].get("/read?key=k"), 404)


async def test_a_batch_goes_to_each_home_in_one_round(nodes: list[HttpClient]) -> None:
    keys = [f"batch{number}" for number in range(1000)]
    items = [{"key": key, "value": key} for key in keys]

    async def frames(client: HttpClient) -> int:
        return int((await answer(client.get("/metrics")))["peer_frames_sent"])

    before = await frames(nodes[0])
    written = await answer(nodes[0].post("/mwrite", {"items": items}))
    assert [each["key"] for each in written["results"]] == keys
    assert all(each["version"] == 1 and each["state"] == "M" for each in written["results"])
    before_read = await frames(nodes[1])
    read = await answer(nodes[1].post("/mread", {"keys": [*keys, "absent-one"]}), 400)
    assert read["field"] == "keys"
    read = await answer(nodes[1].post("/mread", {"keys": [*keys[:999], "absent-one"]}))
    assert [each.get("value") for each in read["results"]] == [*keys[:999], None]
    assert read["results"][-1] == {"key": "absent-one", "error": "Key not found"}
    # One frame to each of two homes, a few more for what else goes on (renewals, acks).
    assert await frames(nodes[0]) - before < 40
    assert await frames(nodes[1]) - before_read < 40


async def test_the_directory_tells_owner_sharers_and_version_also_of_an_idle_key(
    nodes: list[HttpClient],
) -> None:
    for number in range(6):  # keys of all three homes
        key = f"directory{number}"
        idle = await answer(nodes[0].get(f"/directory?key={key}"))
        assert (idle["state"], idle["owner"], idle["version"]) == ("U", None, 0)
        await answer(nodes[0].post("/write", {"key": key, "value": 1}))
        owned = [await answer(each.get(f"/directory?key={key}")) for each in nodes]
        assert owned[0] == owned[1] == owned[2]
        assert (owned[0]["state"], owned[0]["owner"], owned[0]["sharers"]) == ("EM", "nodeA", [])
        assert (owned[0]["version"], owned[0]["transaction"]) == (1, None)
        await answer(nodes[1].get(f"/read?key={key}"))
        shared = await answer(nodes[2].get(f"/directory?key={key}"))
        assert (shared["state"], shared["owner"]) == ("S", None)
        assert sorted(shared["sharers"]) == ["nodeA", "nodeB"]
        await answer(nodes[2].post("/delete", {"key": key}))
        gone = await answer(nodes[2].get(f"/directory?key={key}"))
        assert (gone["owner"], gone["sharers"], gone["version"]) == (None, [], 0)


async def test_the_directory_knows_the_version_of_what_only_the_store_has(
    nodes: list[HttpClient], running: Cluster
) -> None:
    await answer(nodes[0].post("/write", {"key": "stored", "value": 1}))
    await answer(nodes[0].post("/write", {"key": "stored", "value": 2}))
    running.kill(2)
    began = time.monotonic()  # a node that stops waits for nobody who is dead
    assert await asyncio.gather(*(running.nodes[n].terminate() for n in (0, 1))) == [0, 0]
    assert time.monotonic() - began < 5.0
    await running.start_all()
    await linked(running)
    async with running.client(1) as b:
        entry = await answer(b.get("/directory?key=stored"))
        assert (entry["state"], entry["version"]) == ("U", 2)
        # The first to read it has it alone, so that its own write needs no permission.
        assert await answer(b.get("/read?key=stored")) == {
            "key": "stored", "value": 2, "state": "E", "hit": False, "source": "memory",
            "version": 2,
        }  # fmt: skip
        assert (await answer(b.get("/metrics")))["states"]["E"] == 1
        assert (await answer(b.post("/write", {"key": "stored", "value": 3})))["version"] == 3
        found = await answer(b.get("/read?key=stored"))
        assert (found["state"], found["hit"], found["source"]) == ("M", True, "cache")


async def test_lines_are_those_that_hold_a_slot_in_the_order_of_use(
    nodes: list[HttpClient],
) -> None:
    for number in range(3):
        await answer(nodes[2].post("/write", {"key": f"line{number}", "value": 1}))
    await answer(nodes[2].get("/read?key=line0"))
    await answer(nodes[2].get("/read?key=line-absent"), 404)
    lines = (await answer(nodes[2].get("/lines")))["lines"]
    assert [each["key"] for each in lines][-3:] == ["line1", "line2", "line0"]
    assert lines[-1].keys() == {"key", "state", "version", "lease_left_ms"}
    assert "line-absent" not in {each["key"] for each in lines}


async def test_metrics_have_every_field_and_both_forms(nodes: list[HttpClient]) -> None:
    await answer(nodes[0].post("/write", {"key": "m", "value": 1}))
    for client in (nodes[0], nodes[1], nodes[1]):
        await answer(client.get("/read?key=m"))
    for client in nodes:
        metrics = await answer(client.get("/metrics"))
        for name in (
            "hits", "misses", "hit_ratio", "reads", "writes", "invalidations_sent",
            "invalidations_received", "writebacks", "evictions", "upgrades",
            "coherence_messages", "lines", "capacity",
        ):  # fmt: skip
            assert isinstance(metrics[name], int | float), name
        assert metrics["states"].keys() == {"M", "E", "S"}
        assert sum(metrics["states"].values()) == metrics["lines"] <= metrics["capacity"]
        for kind in ("hit", "miss", "write"):
            p50, p95, p99 = (metrics["latency_ms"][kind][f"p{q}"] for q in (50, 95, 99))
            assert 0 <= p50 <= p95 <= p99
        for how in (
            client.get("/metrics?format=prometheus"),
            client.request("GET", "/metrics", headers={"Accept": "text/plain"}),
            client.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text"}),
        ):
            reply = await how
            assert isinstance(reply, Reply)
            assert reply.headers["content-type"].startswith("text/plain")
            assert f"mesi_cache_capacity {metrics['capacity']}.0" in reply.text
            assert 'mesi_cache_latency_ms{of="write",quantile="p99"}' in reply.text
            assert 'mesi_cache_states{state="M"}' in reply.text


async def test_a_deadline_is_a_404_everywhere_and_survives_a_restart(
    nodes: list[HttpClient], running: Cluster
) -> None:
    await answer(nodes[0].post("/write", {"key": "brief", "value": 1, "ttl_ms": 300}))
    await answer(nodes[0].post("/write", {"key": "long", "value": 1, "ttl_ms": 1_500}))
    await nodes[1].get("/read?key=long")  # a copy of it, if the machine is not too busy

    async def is_gone(key: str) -> bool:
        replies = [await each.get(f"/read?key={key}") for each in nodes]
        return all(isinstance(each, Reply) and each.status == 404 for each in replies)

    await until(lambda: is_gone("brief"), "its time is over")
    written = await answer(nodes[1].post("/write", {"key": "brief", "value": 2}))
    assert written["version"] == 3  # the end of its time was a change like any other
    running.power_cut()
    await running.start_all()
    await until(lambda: is_gone("long"), "its time is over after the restart as well")
    assert (await answer(nodes[2].get("/read?key=brief")))["value"] == 2
