"""Tokens from birth to death, what they may do, and the streams that they opened; on one pair."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from testkit.cluster import Cluster, HttpClient, Reply
from testkit.sim.loading import load

kit = load(str(Path(__file__).with_name("pair.py")))
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with kit.running(tmp_path_factory.mktemp("identity")) as cluster:
        yield cluster


@pytest.fixture
async def admin(cluster: Cluster):
    async with cluster.client(0) as client:
        yield client


call = kit.call


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def put_policy(admin: HttpClient, role: str, *rules: dict[str, Any]) -> None:
    assert (await call(admin, "PUT", f"/policies/{role}", {"rules": rules})).status == 200


async def made(client: HttpClient, **fields: Any) -> dict[str, Any]:
    reply = await call(client, "POST", "/tokens", fields)
    assert reply.status == 200, reply.body
    return reply.json


@asynccontextmanager
async def stream(
    cluster: Cluster, index: int, path: str, token: str, *headers: str
) -> AsyncIterator[asyncio.StreamReader]:
    """An open stream, past its first comment. (HTTP/1.0: nothing is cut into chunks.)"""
    host, port = cluster.views[index].bind().split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=cluster.tls)
    lines = [f"GET {path} HTTP/1.0", "Host: x", f"Authorization: Bearer {token}", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        async with asyncio.timeout(20):
            head = await reader.readuntil(b": connected\n\n")
            assert b"200 OK" in head
            yield reader
    finally:
        writer.close()


async def test_a_child_neither_outlives_nor_outranks_what_made_it(cluster, admin) -> None:
    rules = [{"pattern": "tokens", "verbs": ["admin"]}, {"pattern": "team/*", "verbs": ["read"]}]
    await put_policy(admin, "lead", *rules)
    await put_policy(admin, "member", {"pattern": "team/docs/*", "verbs": ["read"]})
    lead = await made(admin, roles=["lead"], ttl_ms=60_000)
    async with cluster.client(0, headers=bearer(lead["token"])) as client:
        for roles in (["admin"], ["user"], ["member", "admin"]):
            refused = await call(client, "POST", "/tokens", {"roles": roles})
            assert refused.status == 403, roles
            assert refused.body == b'{"error":"Insufficient permissions"}'
            assert 'error="insufficient_scope"' in refused.headers["www-authenticate"]
        child = await made(client, roles=["member"], ttl_ms=86_400_000)
        forever = await made(client, roles=["member"])
    assert child["expires_ms"] == forever["expires_ms"] == lead["expires_ms"]
    rows = {t["accessor"]: t for t in (await kit.get(admin, "/tokens")).json["tokens"]}
    assert rows[child["accessor"]]["parent"] == lead["accessor"]
    assert rows[lead["accessor"]]["parent"] == "demo:admin"
    # What the parent may do later bounds the child later: roles are looked up at every request.
    await kit.set_value(admin, "team/docs/a", 1)
    await kit.set_value(admin, "wider", 1)
    await put_policy(admin, "member", {"pattern": "*", "verbs": ["read"]})
    for index in (0, 1):
        async with cluster.client(index, headers=bearer(child["token"])) as client:
            assert (await kit.get(client, "/get?key=team/docs/a")).status == 200
            assert (await kit.get(client, "/get?key=wider")).status == 403
    async with cluster.client(0) as any_admin:
        revoked = await call(any_admin, "DELETE", "/tokens", {"accessor": lead["accessor"]})
        assert "x-replication" not in revoked.headers
    for index in (0, 1):
        for each in (lead, child, forever):
            async with cluster.client(index, headers=bearer(each["token"])) as client:
                assert (await kit.get(client, "/get?key=team/docs/a")).status == 401


async def test_an_expired_parent_takes_its_children_on_both_nodes(cluster, admin) -> None:
    parent = await made(admin, roles=["admin"], ttl_ms=700)
    async with cluster.client(0, headers=bearer(parent["token"])) as client:
        child = await made(client, roles=["user"])
    for index in (0, 1):
        async with cluster.client(index, headers=bearer(child["token"])) as client:

            async def gone(client: HttpClient = client) -> bool:
                return (await kit.get(client, "/list")).status == 401

            await kit.eventually(gone)


async def test_a_use_limit_is_exact_under_requests_at_once_and_counts_at_the_primary(
    cluster: Cluster, admin: HttpClient
) -> None:
    three = await made(admin, roles=["admin"], uses=3)
    async with cluster.client(1, headers=bearer(three["token"])) as replica:
        moved = await kit.get(replica, "/list")
        assert (moved.status, moved.json["primary"]) == (421, cluster.url(0))

    async def once() -> int:
        async with cluster.client(0, headers=bearer(three["token"])) as client:
            return (await kit.get(client, "/list")).status

    statuses = sorted(await asyncio.gather(*(once() for _ in range(9))))
    assert statuses == [200] * 3 + [401] * 6

    async def each_use_is_a_line() -> bool:
        entries = (await kit.get(admin, "/audit?limit=1000")).json["entries"]
        mine = [e["action"] for e in entries if e["who"] == f"token:{three['accessor']}"]
        assert len(mine) <= 3
        return mine == ["list_keys"] * 3

    await kit.eventually(each_use_is_a_line)
    limited = await made(admin, roles=["admin"], uses=5)
    async with cluster.client(0, headers=bearer(limited["token"])) as client:
        refused = await call(client, "POST", "/tokens", {"roles": ["user"]})
        assert refused.status == 403, "it would make itself immortal"


async def test_what_a_static_token_made_is_revoked_by_its_name(cluster, admin) -> None:
    one = await made(admin, roles=["user"])
    assert (await call(admin, "DELETE", "/tokens", {"accessor": "demo:admin"})).status == 200
    async with cluster.client(0, headers=bearer(one["token"])) as client:
        assert (await kit.get(client, "/list")).status == 401
    unknown = await call(admin, "DELETE", "/tokens", {"accessor": "demo:admin"})
    assert (unknown.status, unknown.json) == (404, {"error": "Token not found"})


async def test_a_stream_ends_when_its_token_is_revoked_and_when_it_expires(
    cluster: Cluster, admin: HttpClient
) -> None:
    token = await made(admin, roles=["user"])
    brief = await made(admin, roles=["user"], ttl_ms=3_000)

    async def ends(index: int, path: str, held: str, opened: list[str]) -> None:
        async with stream(cluster, index, path, held) as reader:
            opened.append(path)
            async with asyncio.timeout(10):  # at once, and not at the next keep-alive
                assert (await reader.read()).endswith(b"event: end\ndata: {}\n\n")

    opened: list[str] = []
    places = [(i, path) for i in (0, 1) for path in ("/watch?prefix=s/", "/events")]
    async with asyncio.TaskGroup() as tasks:
        for place in places:
            tasks.create_task(ends(*place, token["token"], opened))
            tasks.create_task(ends(*place, brief["token"], []))

        async def all_open() -> bool:
            return len(opened) == len(places)

        await kit.eventually(all_open)
        await call(admin, "DELETE", "/tokens", {"accessor": token["accessor"]})


async def test_a_watch_goes_on_where_it_broke_at_either_node(cluster, admin) -> None:
    async with stream(cluster, 0, "/watch?prefix=r/", "token-user-ABC") as reader:
        await kit.set_value(admin, "r/1", 1)
        ops = [{"op": "set", "key": f"r/{n}", "value": n} for n in (2, 3)]
        seen = await reader.readuntil(b"}\n\n")
        (last_id,) = [x[4:] for x in seen.decode().splitlines() if x.startswith("id: ")]
        await call(admin, "POST", "/txn", {"ops": [*ops, {"op": "delete", "key": "r/1"}]})
        both = await reader.readuntil(b'"version":1}\n\n')
        assert both.count(b"id: ") == 1, "the last event of a record names it"
        assert both.index(b"id: ") > both.index(b'"r/3"')
    for index in (0, 1):
        header = f"Last-Event-ID: {last_id}"
        async with stream(cluster, index, "/watch?prefix=r/", "token-user-ABC", header) as reader:
            again = await reader.readuntil(b'"version":1}\n\n')
            assert again == both
        for strange in (last_id.replace("-", "0-"), last_id[:-4] + "beef", "x", "9" * 30):
            header = f"Last-Event-ID: {strange}"
            path = "/watch?prefix=r/"
            async with stream(cluster, index, path, "token-user-ABC", header) as reader:
                assert await reader.readuntil(b"\n\n") == b"event: lost\ndata: {}\n\n"


async def test_a_token_is_taken_from_one_authorization_header_only(cluster: Cluster) -> None:
    async with HttpClient.of_url(cluster.url(0)) as client:
        realm = 'Bearer realm="secure-store"'
        for value, challenge in {
            None: realm,
            "Basic dXNlcjpwYXNz": realm,
            "Bearer": realm,
            "Bearer ": realm,
            "token-admin-123": realm,
            "Bearer nonsense": realm + ', error="invalid_token"',
            "Bearer " + "x" * 600: realm + ', error="invalid_token"',
            "bearer token-user-ABC x": realm + ', error="invalid_token"',
        }.items():
            headers = {} if value is None else {"Authorization": value}
            reply = await kit.get(client, "/get?key=a", **headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, challenge), value
            assert reply.body == b'{"error":"Authorization token required or invalid"}'
        for path in ("/get?key=a&token=token-admin-123", "/get?key=a&ACCESS_TOKEN=x",
                     "/list?authorization=token-admin-123"):  # fmt: skip
            reply = await kit.get(client, path, **kit.ADMIN)
            assert reply.status == 400
            assert 'error="invalid_request"' in reply.headers["www-authenticate"]
        ok = await kit.get(client, "/list", Authorization="bEaReR token-user-ABC")
        assert ok.status == 200, "the scheme's case does not matter"


async def test_a_list_never_names_a_key_that_the_caller_may_not_list(cluster, admin) -> None:
    for n in range(25):
        ops = [{"op": "set", "key": f"hid/{n:02}/{i:03}", "value": 0} for i in range(100)]
        assert (await call(admin, "POST", "/txn", {"ops": ops})).status == 200
    await kit.set_value(admin, "hid/zz", 0)
    await put_policy(admin, "narrow", {"pattern": "hid/zz", "verbs": ["list"]})
    narrow = await made(admin, roles=["narrow"])
    for index in (0, 1):
        async with cluster.client(index, headers=bearer(narrow["token"])) as client:
            first = (await kit.get(client, "/list?prefix=hid/")).json
            assert first["keys"] == []
            assert "hid" not in first["next"]
            other = 1 - index
            async with cluster.client(other, headers=bearer(narrow["token"])) as elsewhere:
                path = f"/list?prefix=hid/&after={first['next']}"
                assert (await kit.get(elsewhere, path)).json == {"keys": ["hid/zz"], "next": None}
    page = (await kit.get(admin, "/list?prefix=hid/00/&limit=100")).json
    assert (len(page["keys"]), page["next"]) == (100, None)


async def test_policies_are_listed_and_tried_without_doing_anything(cluster, admin) -> None:
    rules = [{"pattern": "p/*", "verbs": ["read"]},
             {"pattern": "p/+/x", "verbs": ["read"], "effect": "deny"}]  # fmt: skip
    await put_policy(admin, "trial", *rules)
    listed = (await kit.get(admin, "/policies")).json["roles"]
    assert {"admin", "user", "trial"} <= set(listed)
    for verb, key, allowed, pattern in (
        ("read", "p/a", True, "p/*"), ("read", "p/a/x", False, "p/+/x"),
        ("write", "p/a", False, None), ("read", "pp", False, None),
    ):  # fmt: skip
        found = (await kit.get(admin, f"/policies/trial/check?verb={verb}&key={key}")).json
        assert found["allowed"] is allowed
        assert (found["rule"] or {}).get("pattern") == pattern
    for path in ("trial/check?verb=fly&key=a", "trial/check?verb=read&key=a/../b",
                 "Trial/check?verb=read&key=a"):  # fmt: skip
        assert (await kit.get(admin, f"/policies/{path}")).status == 400
    assert (await kit.get(admin, "/policies/nobody/check?verb=read&key=a")).status == 404
    for rules in ([], [{"pattern": "*", "verbs": ["read"]}]):
        locked = await call(admin, "PUT", "/policies/admin", {"rules": rules})
        assert (locked.status, locked.json["error"]) == (
            409, "This would lock you out of the policies",
        )  # fmt: skip
    async with cluster.client(0, headers=kit.USER) as user:
        for path in ("/policies", "/policies/trial/check?verb=read&key=a"):
            assert (await kit.get(user, path)).status == 403

    # Changes are in the audit log, by role.
    async def told() -> bool:
        lines = (await kit.get(admin, "/audit?limit=1000")).json["entries"]
        return any(x["action"] == "put_policy" and x["key"] == "policy trial" for x in lines)

    await kit.eventually(told)


async def test_a_revocation_that_the_replica_cannot_learn_says_so(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        token = await made(admin, roles=["user"])
        cluster.pause(1)
        revoked = await admin.request(
            "DELETE", "/tokens", body=kit.json_body({"accessor": token["accessor"]}), timeout_s=20
        )
        assert isinstance(revoked, Reply)
        assert (revoked.status, revoked.headers["x-replication"]) == (200, "degraded")
        cluster.resume(1)
        async with cluster.client(1, headers=bearer(token["token"])) as replica:

            async def gone() -> bool:
                return (await kit.get(replica, "/list")).status == 401

            await kit.eventually(gone)
