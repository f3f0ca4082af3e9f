"""The HTTP table on one running pair: versions, lists, transactions, tokens, policies, streams."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import Cluster, HttpClient
from testkit.sim.loading import load

pytestmark = pytest.mark.cluster


kit = load(str(Path(__file__).with_name("pair.py")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with kit.running(tmp_path_factory.mktemp("api")) as cluster:
        yield cluster


@pytest.fixture
async def admin(cluster: Cluster):
    async with cluster.client(0) as client:
        yield client


call = kit.call


async def new_token(cluster: Cluster, admin: HttpClient, **fields: Any) -> tuple[HttpClient, str]:
    made = await call(admin, "POST", "/tokens", fields)
    assert made.status == 200, made.body
    client = cluster.client(0, headers={"Authorization": f"Bearer {made.json['token']}"})
    return client, made.json["accessor"]


async def test_any_json_value_comes_back_as_it_was(cluster: Cluster, admin: HttpClient) -> None:
    for value in (None, True, 0, -1.5, "", "ünï", [1, [2]], {"a": {"b": []}}, "x" * 100_000):
        assert (await kit.set_value(admin, "any", value)).json["value"] == value
        for index in (0, 1):
            async with cluster.client(index) as client:
                assert (await kit.get(client, "/get?key=any")).json == {
                    "key": "any",
                    "value": value,
                }
    too_long = await kit.set_value(admin, "any", "x" * (1 << 20))
    assert (too_long.status, too_long.json["error"]) == (413, "Value too large")


async def test_versions_deletes_and_history(admin: HttpClient) -> None:
    assert (await kit.set_value(admin, "v", 1, expected_version=0)).headers["etag"] == '"1"'
    clash = await kit.set_value(admin, "v", 2, expected_version=0)
    assert (clash.status, clash.json["current_version"]) == (409, 1)
    await kit.set_value(admin, "v", 2, expected_version=1)
    assert (await kit.get(admin, "/get?key=v&version=1")).json["value"] == 1
    assert (await call(admin, "POST", "/delete", {"key": "v"})).json == {"status": "ok", "key": "v"}
    gone = await kit.get(admin, "/get?key=v")
    assert (gone.status, gone.body) == (404, b'{"error":"Key not found"}')
    assert (await call(admin, "POST", "/delete", {"key": "v"})).status == 404
    assert (await call(admin, "POST", "/undelete", {"key": "v"})).status == 200
    assert (await kit.get(admin, "/get?key=v")).json["value"] == 2
    assert (await call(admin, "POST", "/destroy", {"key": "v", "version": 1})).status == 200
    assert (await kit.get(admin, "/get?key=v&version=1")).status == 404
    versions = (await kit.get(admin, "/history?key=v")).json["versions"]
    assert [(v["version"], v["destroyed"], v["readable"]) for v in versions] == [
        (1, True, False), (2, False, True),
    ]  # fmt: skip
    assert (await call(admin, "POST", "/destroy", {"key": "v"})).status == 200
    assert (await kit.get(admin, "/history?key=v")).status == 404


async def test_a_value_with_a_ttl_goes_away_on_both_nodes(cluster: Cluster, admin) -> None:
    await kit.set_value(admin, "brief", 1, ttl_ms=300)
    assert (await kit.get(admin, "/get?key=brief")).status == 200

    async def gone() -> bool:
        async with cluster.client(1) as replica:
            return (await kit.get(replica, "/get?key=brief")).status == 404

    await kit.eventually(gone)
    assert (await kit.get(admin, "/get?key=brief")).status == 404


async def test_a_value_whose_time_is_over_is_destroyed_on_both_disks(
    cluster: Cluster, admin: HttpClient
) -> None:
    await kit.set_value(admin, "kept", 1, ttl_ms=600_000)
    await kit.set_value(admin, "over", "v1", ttl_ms=50)
    await kit.set_value(admin, "over", "v2")

    def stored(index: int) -> list[tuple[str, int]]:
        path = cluster.root / "data" / f"node{'AB'[index]}" / "store.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return db.execute(
                "SELECT key, version FROM vals WHERE key IN ('over', 'kept') ORDER BY key"
            ).fetchall()

    async def gone() -> bool:
        return all(stored(index) == [("kept", 1), ("over", 2)] for index in (0, 1))

    await kit.eventually(gone)
    for index in (0, 1):
        async with cluster.client(index) as client:
            versions = (await kit.get(client, "/history?key=over")).json["versions"]
            assert [v["destroyed"] for v in versions] == [True, False]
            assert (await kit.get(client, "/get?key=over")).json["value"] == "v2"
            assert (await kit.get(client, "/get?key=over&version=1")).status == 404
            assert (await kit.get(client, "/get?key=kept")).json["value"] == 1
    assert (await kit.get(admin, "/metrics")).json["values_expired"] >= 1
    entries = (await kit.get(admin, "/audit?limit=1000")).json["entries"]
    told = [e for e in entries if e["action"] == "expire" and "over" in e["key"].split()]
    assert [(e["who"], e["outcome"], e["record"] > 0) for e in told] == [
        ("node:nodeA", "allowed", True)
    ]


async def test_a_transaction_is_all_or_nothing(cluster: Cluster, admin: HttpClient) -> None:
    ops = [{"op": "set", "key": "t/a", "value": 1}, {"op": "set", "key": "t/b", "value": 2}]
    done = await call(admin, "POST", "/txn", {"ops": ops})
    assert done.json == {"status": "ok", "versions": [1, 1]}
    ops = [{"op": "delete", "key": "t/a"}, {"op": "check", "key": "t/b", "expected_version": 7}]
    failed = await call(admin, "POST", "/txn", {"ops": ops})
    assert (failed.status, failed.json["index"]) == (409, 1)
    assert (await kit.get(admin, "/get?key=t/a")).status == 200
    await call(admin, "PUT", "/policies/half", {"rules": [
        {"pattern": "t/a", "verbs": ["write"]}, {"pattern": "t/*", "verbs": ["read"]},
    ]})  # fmt: skip
    half, _ = await new_token(cluster, admin, roles=["half"])
    async with half:
        ops = [{"op": "set", "key": "t/a", "value": 9}, {"op": "set", "key": "t/b", "value": 9}]
        assert (await call(half, "POST", "/txn", {"ops": ops})).status == 403
        assert (await kit.get(half, "/get?key=t/a")).json["value"] == 1
        assert (await call(half, "POST", "/txn", {"ops": ops[:1]})).status == 200


async def test_a_list_shows_only_what_the_caller_may_list(cluster: Cluster, admin) -> None:
    for key in ("l/a", "l/b", "l/secret/x", "l/c"):
        await kit.set_value(admin, key, 1)
    await call(admin, "PUT", "/policies/lister", {"rules": [
        {"pattern": "l/*", "verbs": ["list"]},
        {"pattern": "l/secret/*", "verbs": ["list"], "effect": "deny"},
    ]})  # fmt: skip
    lister, _ = await new_token(cluster, admin, roles=["lister"])
    async with lister:
        assert (await kit.get(lister, "/list?prefix=l/")).json == {
            "keys": ["l/a", "l/b", "l/c"], "next": None,
        }  # fmt: skip
        page = (await kit.get(lister, "/list?prefix=l/&limit=2")).json
        assert page == {"keys": ["l/a", "l/b"], "next": "l/b"}
        rest = (await kit.get(lister, "/list?prefix=l/&limit=2&after=l/b")).json
        assert rest["keys"] == ["l/c"]
        assert (await kit.get(lister, "/get?key=l/a")).status == 403
    assert "l/secret/x" in (await kit.get(admin, "/list?prefix=l/")).json["keys"]


async def test_tokens_expire_are_counted_and_are_revoked_with_their_children(
    cluster: Cluster, admin: HttpClient
) -> None:
    parent, accessor = await new_token(cluster, admin, roles=["admin"])
    child, _ = await new_token(cluster, parent, roles=["user"])
    listed = (await kit.get(admin, "/tokens")).json["tokens"]
    assert {t["accessor"]: t for t in listed}[accessor]["roles"] == ["admin"]
    assert "token" not in listed[0]
    async with parent, child:
        assert (await kit.get(child, "/list")).status == 200
        revoked = await call(admin, "DELETE", "/tokens", {"accessor": accessor})
        assert revoked.status == 200
        unknown = await kit.get(parent, "/list")
        assert unknown.status == 401
        for index in (0, 1):
            async with cluster.client(index, headers={"Authorization": "Bearer never"}) as never:
                assert (await kit.get(never, "/list")).body == unknown.body
        assert (await kit.get(child, "/list")).status == 401
    assert (await call(admin, "DELETE", "/tokens", {"accessor": accessor})).status == 404
    twice, _ = await new_token(cluster, admin, roles=["user"], uses=2)
    async with twice:
        statuses = [(await kit.get(twice, "/list")).status for _ in range(3)]
    assert statuses == [200, 200, 401]


async def test_a_repeated_idempotency_key_does_it_once(admin: HttpClient) -> None:
    body = {"key": "idem", "value": 1}
    first = await call(admin, "POST", "/set", body, **{"Idempotency-Key": "k1"})
    again = await call(admin, "POST", "/set", body, **{"Idempotency-Key": "k1"})
    assert (again.status, again.body, again.headers["etag"]) == (200, first.body, '"1"')
    assert again.headers["idempotent-replay"] == "true"
    other = await call(
        admin, "POST", "/set", {"key": "idem", "value": 2}, **{"Idempotency-Key": "k1"}
    )
    assert other.status == 422
    assert len((await kit.get(admin, "/history?key=idem")).json["versions"]) == 1


async def test_a_watch_gets_what_its_token_may_read_and_ends_when_it_is_revoked(
    cluster: Cluster, admin: HttpClient
) -> None:
    await call(admin, "PUT", "/policies/watcher", {"rules": [
        {"pattern": "w/*", "verbs": ["read"]},
        {"pattern": "w/no", "verbs": ["read"], "effect": "deny"},
    ]})  # fmt: skip
    made = (await call(admin, "POST", "/tokens", {"roles": ["watcher"]})).json
    host, port = cluster.views[0].bind().split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=cluster.tls)
    writer.write(
        f"GET /watch?prefix=w/ HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {made['token']}\r\n\r\n".encode()
    )
    async with asyncio.timeout(20):
        head = await reader.readuntil(b": connected")
        assert b"text/event-stream" in head
        assert b"Strict-Transport-Security" in head
        await kit.set_value(admin, "w/no", 1)
        await kit.set_value(admin, "other", 1)
        await kit.set_value(admin, "w/yes", [1])
        seen = await reader.readuntil(b"}\n\n")
        assert b'data: {"key":"w/yes","version":1,"value":[1]}' in seen
        await call(admin, "DELETE", "/tokens", {"accessor": made["accessor"]})
        async with asyncio.timeout(10):  # at once, and not at the next keep-alive
            rest = await reader.read()
        assert b"event: end" in rest
    writer.close()


async def test_policies_are_checked_and_take_effect_on_both_nodes(cluster, admin) -> None:
    bad: list[list[dict[str, Any]]] = [
        [{"pattern": "a*", "verbs": ["read"]}],
        [{"pattern": "a", "verbs": ["fly"]}],
        [{"pattern": "a/../b", "verbs": ["read"]}],
        [{"pattern": "a", "verbs": []}],
    ]
    for rules in bad:
        assert (await call(admin, "PUT", "/policies/x", {"rules": rules})).status == 400
    assert (await call(admin, "PUT", "/policies/Root", {"rules": []})).status == 400
    assert (await kit.get(admin, "/policies/none")).status == 404
    await kit.set_value(admin, "p/a", 1)
    rules = [{"pattern": "p/*", "verbs": ["read"]}]
    await call(admin, "PUT", "/policies/both", {"rules": rules})
    made = (await call(admin, "POST", "/tokens", {"roles": ["both"]})).json
    for index in (0, 1):
        async with cluster.client(
            index, headers={"Authorization": f"Bearer {made['token']}"}
        ) as client:
            assert (await kit.get(client, "/get?key=p/a")).status == 200
            assert (await kit.get(client, "/get?key=q")).status == 403
            assert (await kit.get(client, "/audit")).status == 403


async def test_the_audit_log_names_who_did_what_and_never_a_value(admin: HttpClient) -> None:
    await call(
        admin, "POST", "/set", {"key": "aud", "value": "v4lue"}, **{"X-Request-Id": "my-req"}
    )
    entries: list[dict] = []
    after = 0
    while page := (await kit.get(admin, f"/audit?after={after}&limit=1000")).json["entries"]:
        entries += page
        after = page[-1]["seq"]
        if any(e["request_id"] == "my-req" for e in page):
            break
    (mine,) = [e for e in entries if e["request_id"] == "my-req"]
    assert (mine["who"], mine["action"], mine["key"], mine["status"], mine["outcome"]) == (
        "demo:admin", "set_value", "aud", 200, "allowed",
    )  # fmt: skip
    assert "v4lue" not in json.dumps(entries)


async def test_a_rotated_data_key_keeps_old_values_readable(admin: HttpClient) -> None:
    await kit.set_value(admin, "rot", "old")
    before = (await kit.get(admin, "/status")).json["data_key"]
    assert (await call(admin, "POST", "/admin/rotate", {})).json["data_key"] == before + 1
    await kit.set_value(admin, "rot2", "new")
    assert (await kit.get(admin, "/get?key=rot")).json["value"] == "old"
    assert (await kit.get(admin, "/get?key=rot2")).json["value"] == "new"
