"""The seed's walkthrough to the letter, on real nodes, with both kinds of certificate."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import pytest

from testkit.cluster import Cluster, HttpClient, Reply
from testkit.sim.loading import load

pytestmark = pytest.mark.cluster


kit = load(str(Path(__file__).with_name("pair.py")))


async def walk(cluster: Cluster) -> None:
    async with (
        HttpClient.of_url(cluster.url(0)) as stranger,
        cluster.client(0, headers=kit.USER) as user,
        cluster.client(0) as admin,
        cluster.client(1, headers=kit.USER) as reader,
    ):
        reply = await kit.get(stranger, "/get?key=kunci1")
        assert (reply.status, reply.body) == (
            401, b'{"error":"Authorization token required or invalid"}',
        )  # fmt: skip
        reply = await kit.set_value(user, "kunci1", "gagal")
        assert (reply.status, reply.body) == (403, b'{"error":"Insufficient permissions"}')
        reply = await kit.set_value(admin, "kunci1", "berhasil")
        assert (reply.status, reply.body) == (
            200, b'{"status":"ok","key":"kunci1","value":"berhasil"}',
        )  # fmt: skip
        assert "x-replication" not in reply.headers
        reply = await kit.get(reader, "/get?key=kunci1")
        assert (reply.status, reply.body) == (200, b'{"key":"kunci1","value":"berhasil"}')


async def test_the_walkthrough_with_the_certificate_that_the_nodes_make(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        await walk(cluster)
        assert (tmp_path / "server.key").stat().st_mode & 0o077 == 0
        assert (tmp_path / "data" / "nodeA" / "master.key").stat().st_mode & 0o077 == 0
        assert await cluster.terminate_all() == [0, 0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
async def test_the_walkthrough_with_the_seeds_openssl_certificate(tmp_path: Path) -> None:
    kit.seeds_certificate(tmp_path)
    async with kit.pair(tmp_path) as cluster:
        await walk(cluster)


async def test_refusals_are_those_of_rfc_6750_and_every_answer_has_the_safe_headers(
    tmp_path: Path,
) -> None:
    async with kit.pair(tmp_path) as cluster, HttpClient.of_url(cluster.url(0)) as client:
        none = await kit.get(client, "/get?key=a")
        assert none.headers["www-authenticate"] == 'Bearer realm="secure-store"'
        wrong = await kit.get(client, "/get?key=a", Authorization="Bearer nonsense")
        assert wrong.headers["www-authenticate"].endswith('error="invalid_token"')
        assert wrong.body == none.body
        denied = await client.request(
            "POST", "/set", body=b'{"key":"a","value":1}', headers=kit.USER
        )
        assert isinstance(denied, Reply)
        assert denied.headers["www-authenticate"].endswith('error="insufficient_scope"')
        for reply in (none, denied, await kit.get(client, "/healthz")):
            assert reply.headers["strict-transport-security"] == "max-age=31536000"
            assert reply.headers["cache-control"] == "no-store"
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["server"] == "secure-store"
        url = await kit.get(client, "/get?key=a&access_token=x", **kit.ADMIN)
        assert url.status == 400
        twice = await client.raw(
            b"GET /get?key=a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-admin-123\r\n"
            b"Authorization: Bearer token-user-ABC\r\nConnection: close\r\n\r\n"
        )
        assert isinstance(twice, Reply)
        assert twice.status == 400
        # 401 before 400 before 403 before 421
        bad = b'{"key":5}'
        assert (await client.request("POST", "/set", body=bad)).status == 401
        assert (await client.request("POST", "/set", body=bad, headers=kit.USER)).status == 400
        async with cluster.client(1, headers=kit.USER) as replica:
            assert (await kit.set_value(replica, "a", 1)).status == 403
        async with cluster.client(1) as replica:
            moved = await kit.set_value(replica, "a", 1)
            assert moved.status == 421
            assert moved.json == {"error": "Not the primary", "primary": cluster.url(0)}


async def test_tls_13_only_and_the_peers_route_needs_a_pinned_certificate(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        host, port = cluster.views[0].bind().split(":")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname = False
        old.verify_mode = ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, int(port), ssl=old)
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        async with cluster.client(1) as client:
            reply = await client.request("GET", "/peer/stream", headers=upgrade)
            assert isinstance(reply, Reply)
            assert (reply.status, reply.json) == (403, {"error": "Peer certificate required"})
        assert "Traceback" not in cluster.nodes[0].output() + cluster.nodes[1].output()


async def test_brute_force_is_slowed_and_a_valid_token_still_works(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, HttpClient.of_url(cluster.url(0)) as client:
        statuses = [
            (await kit.get(client, "/get?key=a", Authorization=f"Bearer guess-{i}")).status
            for i in range(25)
        ]
        assert statuses == [401] * 20 + [429] * 5
        assert (await kit.get(client, "/status", **kit.ADMIN)).status == 200


async def test_no_secret_stands_in_any_file_or_log(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        await kit.set_value(admin, "k", "the-value-nobody-may-see")
        made = await admin.post("/tokens", {"roles": ["user"]})
        assert isinstance(made, Reply)
        token = made.json["token"]
        async with cluster.client(0, headers={"Authorization": f"Bearer {token}x"}) as guesser:
            assert (await kit.get(guesser, "/get?key=k")).status == 401
        assert await cluster.terminate_all() == [0, 0]
        for path in kit.files_under(tmp_path):
            raw = path.read_bytes()
            for secret in (b"the-value-nobody-may-see", token.encode(), b"token-admin-123"):
                assert secret not in raw, path
        log = (tmp_path / "data" / "nodeA" / "audit" / "audit.log").read_text()
        assert '"action":"set_value"' in log
        assert '"outcome":"denied"' in log
