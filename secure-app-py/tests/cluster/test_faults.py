"""Kill, pause, cut, promote: what was acknowledged is there, and the answers say what holds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from secure_store.core.audit import Entry, Head, make_line, read_line
from secure_store.heads import log_id_of
from secure_store.storage.keyring import open_keyring
from testkit.cluster import CAN_LIMIT, Cluster, NodeView, Reply, limit_file_size
from testkit.sim.loading import load

pytestmark = pytest.mark.cluster


kit = load(str(Path(__file__).with_name("pair.py")))


async def status(cluster, index: int) -> dict:
    async with cluster.client(index) as client:
        return (await kit.get(client, "/status")).json


async def test_everything_acknowledged_is_read_back_after_both_are_killed(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin:
            for i in range(50):
                assert (await kit.set_value(admin, f"k{i}", {"n": i})).status == 200
            made = await admin.post("/tokens", {"roles": ["user"], "name": "reader"})
            assert isinstance(made, Reply)
            put = {"rules": [{"pattern": "k1", "verbs": ["read"]}]}
            body = kit.json_body(put)
            assert (await admin.request("PUT", "/policies/narrow", body=body)).status == 200
        cluster.power_cut()
        await cluster.start_all()
        for index in (0, 1):
            bearer = {"Authorization": f"Bearer {made.json['token']}"}
            async with cluster.client(index, headers=bearer) as reader:
                for i in range(50):
                    reply = await kit.get(reader, f"/get?key=k{i}")
                    assert (reply.status, reply.json["value"]) == (200, {"n": i})
                assert (await kit.get(reader, "/tokens")).status == 403
            async with cluster.client(index) as admin:
                found = await kit.get(admin, "/policies/narrow")
                assert found.json["rules"][0]["pattern"] == "k1"
        for name in ("nodeA", "nodeB"):
            assert kit.command(tmp_path, "audit", "verify", "--id", name).returncode == 0
            examined = kit.command(tmp_path, "doctor", "--id", name)
            assert (examined.returncode, examined.stdout) == (0, "ok\n")


async def test_a_killed_replica_degrades_the_primary_and_catches_up(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        await kit.set_value(admin, "a", 1)
        cluster.kill(1)
        began = time.monotonic()
        reply = await kit.set_value(admin, "a", 2)
        assert (reply.status, reply.headers["x-replication"]) == (200, "degraded")
        assert time.monotonic() - began > 0.5, "it waits for a link in the making first"
        ready = await kit.get(admin, "/readyz")
        assert (ready.status, ready.headers["x-replication"]) == (200, "degraded")
        for i in range(20):
            await kit.set_value(admin, f"b{i}", i)
        for i in range(40):  # more than one window of bytes
            await kit.set_value(admin, f"big{i}", "x" * 900_000)
        cluster.start(1)

        async def caught_up() -> bool:
            return (await status(cluster, 0))["link"] == "live"

        await kit.eventually(caught_up)
        reply = await kit.set_value(admin, "a", 3)
        assert "x-replication" not in reply.headers
        async with cluster.client(1) as replica:
            assert (await kit.get(replica, "/get?key=a")).json["value"] == 3
            assert (await kit.get(replica, "/get?key=b19")).json["value"] == 19
            assert len((await kit.get(replica, "/get?key=big39")).json["value"]) == 900_000
        log = (tmp_path / "data" / "nodeA" / "audit" / "audit.log").read_text()
        assert "pair.went_alone" in log


async def test_a_strict_pair_refuses_writes_while_its_replica_is_away(tmp_path: Path) -> None:
    async with kit.pair(tmp_path, "--replication=strict") as cluster, cluster.client(0) as admin:
        assert (await kit.set_value(admin, "a", 1)).status == 200
        cluster.kill(1)
        await cluster.unlinked()
        reply = await kit.set_value(admin, "a", 2)
        assert reply.status == 503
        assert reply.json["definite"] is True
        assert (await kit.get(admin, "/get?key=a")).json["value"] == 1
        cluster.start(1)

        async def works() -> bool:
            return (await kit.set_value(admin, "a", 3)).status == 200

        await kit.eventually(works)


async def test_a_paused_replica_is_given_up_after_a_second_and_taken_back(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        await kit.set_value(admin, "a", 1)
        cluster.pause(1)
        reply = await kit.set_value(admin, "a", 2)
        assert reply.headers["x-replication"] == "degraded"
        cluster.resume(1)

        async def in_step() -> bool:
            return "x-replication" not in (await kit.set_value(admin, "a", 3)).headers

        await kit.eventually(in_step)
        async with cluster.client(1) as replica:
            assert (await kit.get(replica, "/get?key=a")).json["value"] == 3


async def test_a_primary_restarted_in_step_waits_for_its_replica(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin:
            await kit.set_value(admin, "a", 1)
        cluster.power_cut()
        cluster.start(0)
        await cluster.ready(0)  # it can serve reads
        async with cluster.client(0) as admin:
            ready = await kit.get(admin, "/readyz")
            assert (ready.status, ready.headers["x-replication"]) == (200, "degraded")
            reply = await kit.set_value(admin, "a", 2)
            assert reply.status == 503
            assert reply.json["definite"] is True
            assert (await kit.get(admin, "/get?key=a")).status in (200, 503)
            cluster.start(1)

            async def writes() -> bool:
                return (await kit.set_value(admin, "a", 3)).status == 200

            await kit.eventually(writes)
            assert (await kit.get(admin, "/get?key=a")).json["value"] == 3


async def test_promotion_hands_over_and_the_old_primary_follows(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin, cluster.client(1) as other:
            await kit.set_value(admin, "a", 1)
            promoted = await other.post("/admin/promote", {})
            assert isinstance(promoted, Reply)
            assert promoted.json["forced"] is False

            async def moved() -> bool:
                reply = await kit.set_value(other, "a", 2)
                return reply.status == 200 and "x-replication" not in reply.headers

            await kit.eventually(moved)
            assert (await kit.set_value(admin, "a", 3)).status == 421
            assert (await kit.get(admin, "/get?key=a")).json["value"] == 2
        # A clean stop is sealed: the other may take over without force.
        assert await cluster.nodes[1].terminate() == 0
        async with cluster.client(0) as admin:
            back = await admin.post("/admin/promote", {})
            assert isinstance(back, Reply)
            assert (back.status, back.json.get("forced")) == (200, False)


async def test_a_hasty_promotion_is_refused_and_a_forced_one_quarantines(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin:
            await kit.set_value(admin, "a", "both")
            cluster.kill(1)
            assert (await kit.set_value(admin, "lone", 1)).headers["x-replication"] == "degraded"
        cluster.kill(0)
        cluster.start(1)
        await cluster.ready(1)
        async with cluster.client(1) as other:
            refused = await other.post("/admin/promote", {})
            assert isinstance(refused, Reply)
            assert refused.status == 409
            assert {"epoch", "seq", "last_contact_ms_ago"} <= set(refused.json)
            forced = await other.post("/admin/promote", {"force": True})
            assert isinstance(forced, Reply)
            assert forced.json["forced"] is True
            await kit.set_value(other, "a", "new")
            cluster.start(0)

            async def joined() -> bool:
                return (await status(cluster, 1))["link"] == "live"

            await kit.eventually(joined)
        async with cluster.client(0) as old:
            assert (await kit.get(old, "/get?key=a")).json["value"] == "new"
            assert (await kit.get(old, "/get?key=lone")).status == 404
            assert (await kit.set_value(old, "a", 1)).status == 421
        assert list((tmp_path / "data" / "nodeA").glob("quarantine-epoch1-*.db"))
        shown = kit.command(tmp_path, "quarantine", "--id", "nodeA")
        assert shown.returncode == 0, shown.stderr
        (lone,) = [json.loads(line) for line in shown.stdout.splitlines()]
        assert (lone["change"], lone["key"], lone["value"]) == ("set", "lone", 1)


async def test_a_wiped_primary_is_refused_by_both(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin:
            await kit.set_value(admin, "a", 1)
        cluster.kill(0)
        kit.remove_tree(tmp_path / "data" / "nodeA")
        cluster.start(0)
        await cluster.nodes[0].wait_log("Replica belongs to another cluster")
        async with cluster.client(0) as admin:
            reply = await kit.set_value(admin, "a", 2)
            assert reply.status == 503
            assert reply.json["error"] == "Replica belongs to another cluster"
        async with cluster.client(1) as replica:
            assert (await kit.get(replica, "/get?key=a")).json["value"] == 1


async def test_an_older_database_that_was_put_back_is_refused_at_start(tmp_path: Path) -> None:
    """On a lone node: no replica could tell."""

    def argv(view: NodeView) -> list[str]:
        return [sys.executable, str(kit.MAIN), "--id=nodeA", f"--addr={view.bind()}"]

    folder = tmp_path / "data" / "nodeA"
    alone = Cluster(argv, 1, root=tmp_path, cwd=tmp_path, scheme="https", headers=kit.ADMIN)
    async with alone as cluster:
        async with cluster.client(0) as admin:
            assert (await kit.set_value(admin, "k", "old")).status == 200
        assert await cluster.terminate_all() == [0]
        older = {path: path.read_bytes() for path in folder.glob("store.db*")}
        await cluster.start_all()
        async with cluster.client(0) as admin:
            assert (await kit.set_value(admin, "k", "new")).status == 200
        assert await cluster.terminate_all() == [0]
        newer = {path: path.read_bytes() for path in folder.glob("store.db*")}

        def put(files: dict[Path, bytes]) -> None:
            for path in folder.glob("store.db*"):
                path.unlink()
            for path, content in files.items():
                path.write_bytes(content)

        put(older)
        refused = kit.command(tmp_path, *argv(cluster.views[0])[2:])
        assert refused.returncode == 2
        assert "an older copy of the database was put back" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        examined = kit.command(tmp_path, "doctor", "--id", "nodeA")
        assert (examined.returncode, "put back" in examined.stdout) == (1, True)
        put(newer)
        await cluster.start_all()
        async with cluster.client(0) as admin:
            assert (await kit.get(admin, "/get?key=k")).json["value"] == "new"


async def test_audit_verify_names_what_was_done_to_the_log(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin:
            for i in range(10):
                await kit.set_value(admin, f"k{i}", i)

            async def anchored() -> bool:
                return ((await status(cluster, 1))["audit"]["peer_anchor_seq"] or 0) >= 10

            await kit.eventually(anchored)
        url = cluster.url(1)
        path = tmp_path / "data" / "nodeA" / "audit" / "audit.log"
        lines = path.read_bytes().splitlines(keepends=True)
        asked = kit.command(
            tmp_path, "audit", "verify", "--id", "nodeA", "--peer", url,
            SECURE_STORE_TOKEN="token-admin-123",
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        assert "after the last anchor" in asked.stdout
        await cluster.terminate_all()
    kept_heads = tmp_path / "data" / "nodeB" / "audit" / "anchors-nodeA.jsonl"
    anchors = str(kept_heads)
    tampered = {
        10: [*lines[:4], lines[4].replace(b"200", b"403"), *lines[5:]],
        11: lines[:4] + lines[5:],
        12: [*lines[:4], lines[5], lines[4], *lines[6:]],
        13: lines[:5],
        16: [*path.read_bytes().splitlines(keepends=True), b'{"half'],
    }
    keyring = open_keyring(tmp_path / "data" / "nodeA" / "keyring.json",
                           tmp_path / "data" / "nodeA" / "master.key", finish=False)  # fmt: skip
    tampered[14] = rewritten(lines, keyring.audit_mac_key)
    named = {10: 5, 11: 5, 12: 5, 16: len(tampered[16])}
    for code, content in tampered.items():
        path.write_bytes(b"".join(content))
        words = ("audit", "verify", "--id", "nodeA", "--anchors", anchors)
        done = kit.command(tmp_path, *words)
        assert done.returncode == code, done.stdout
        word, said = done.stdout.split(": ")[:2]
        names = {10: "edit", 11: "delete", 12: "reorder", 13: "cut", 14: "rewrite", 16: "torn"}
        assert word == names[code]
        number = int(said.removeprefix("entry "))
        assert number == named.get(code, number)
    # A fork: two heads of one entry, both signed by the node.
    path.write_bytes(b"".join(lines))
    pin, *_ = kept_heads.read_bytes().splitlines(keepends=True)
    head = Head(log_id_of(keyring), "0" * 64, "nodeA", 3)
    signature = keyring.signer.sign(head.signed_text()).hex()
    forked = tmp_path / "forked.jsonl"
    forked.write_bytes(pin + msgspec.json.encode(replace(head, signature=signature)) + b"\n")
    true_head = replace(head, mac=json.loads(lines[2])["mac"])
    signature = keyring.signer.sign(true_head.signed_text()).hex()
    with forked.open("ab") as f:
        f.write(msgspec.json.encode(replace(true_head, signature=signature)) + b"\n")
    done = kit.command(tmp_path, *words[:-1], str(forked))
    assert (done.returncode, done.stdout.split(": ")[:2]) == (15, ["fork", "entry 3"])


def rewritten(lines: list[bytes], key: bytes) -> list[bytes]:
    """The same log with entry 5 told differently, chained anew by somebody who has the key."""
    made, mac = list(lines[:4]), bytes.fromhex(json.loads(lines[3])["mac"])
    for raw in lines[4:]:
        parsed = read_line(raw)
        assert parsed is not None
        fields = {k: v for k, v in msgspec.structs.asdict(parsed[0]).items() if k != "mac"}
        if fields["seq"] == 5:
            fields["who"] = "somebody else"
        line, mac = make_line(key, mac, Entry(**fields))
        made.append(line)
    return made


@pytest.mark.skipif(not CAN_LIMIT, reason="needs RLIMIT_FSIZE of another process (Linux)")
async def test_requests_are_refused_while_the_audit_log_cannot_be_written(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, cluster.client(0) as admin:
        audit = tmp_path / "data" / "nodeA" / "audit" / "audit.log"
        filler = "x" * 250
        for _ in range(1_500):
            await kit.get(admin, f"/get?key={filler}")
        size = audit.stat().st_size
        assert size > 500_000, "the audit log must be the longest file"
        limit_file_size(cluster.nodes[0].pid, size + 2_000)
        began = time.monotonic()
        while (reply := await kit.get(admin, f"/get?key={filler}")).status == 404:
            assert time.monotonic() - began < 10
        assert (reply.status, reply.json["error"]) == (503, "Audit log unavailable")
        refused = await kit.set_value(admin, "k", 1)
        assert (refused.status, refused.json["error"]) == (503, "Audit log unavailable")
        ready = await kit.get(admin, "/readyz")
        assert ready.status == 503
        limit_file_size(cluster.nodes[0].pid, None)
        await cluster.ready(0)
        assert (await kit.set_value(admin, "k", 1)).status == 200
        assert await cluster.terminate_all() == [0, 0]
        assert kit.command(tmp_path, "audit", "verify", "--id", "nodeA").returncode == 0


@pytest.mark.skipif(not CAN_LIMIT, reason="needs RLIMIT_FSIZE of another process (Linux)")
async def test_a_disk_that_fails_ends_the_node_and_nothing_acknowledged_is_lost(tmp_path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with cluster.client(0) as admin:
            for i in range(30):
                await kit.set_value(admin, f"k{i}", "x" * 2_000)
            limit_file_size(cluster.nodes[0].pid, 50_000)
            lost = await admin.post("/set", {"key": "k0", "value": "y" * 100_000}, timeout_s=10)
            assert not (isinstance(lost, Reply) and lost.status == 200)
            if isinstance(lost, Reply):
                assert lost.json["definite"] is False
        assert await cluster.nodes[0].wait() == 1
        assert "halted: the database cannot be written" in cluster.nodes[0].output()
        cluster.start(0)
        await cluster.ready(0)
        async with cluster.client(0) as admin:
            for i in range(1, 30):
                assert (await kit.get(admin, f"/get?key=k{i}")).json["value"] == "x" * 2_000
        assert kit.command(tmp_path, "audit", "verify", "--id", "nodeA").returncode == 0


def test_a_mistake_in_a_command_is_exit_code_2_and_one_line(tmp_path: Path) -> None:
    for words in (["nonsense"], ["audit"], ["audit", "verify"], ["cert", "--days", "0"],
                  ["--id", "x"], ["--id", "x", "--addr", "127.0.0.1:1", "--replica", "http://a:1"],
                  ["--id", "x", "--addr", "0.0.0.0:8000"]):  # fmt: skip
        done = kit.command(tmp_path, *words)
        assert done.returncode == 2, words
        assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
    assert kit.command(tmp_path, "cert").returncode == 0
    assert kit.command(tmp_path, "cert").returncode == 2, "nothing is overwritten"
    assert kit.command(tmp_path, "key", "m.key").returncode == 0


def test_beyond_loopback_nothing_is_made_up(tmp_path: Path) -> None:
    flags = ["--id", "x", "--addr", "0.0.0.0:18999"]
    assert "--tokens_file" in kit.command(tmp_path, *flags).stderr
    (tmp_path / "tokens.json").write_text(
        '[{"name":"ci","roles":["admin"],"token":"token-admin-123"}]'
    )
    (tmp_path / "tokens.json").chmod(0o600)
    flags += ["--tokens_file", "tokens.json"]
    assert "--master_key_file" in kit.command(tmp_path, *flags).stderr
    kit.command(tmp_path, "key", "master.key")
    flags += ["--master_key_file", "master.key"]
    assert "server.crt" in kit.command(tmp_path, *flags).stderr
    kit.command(tmp_path, "cert")
    refused = kit.command(tmp_path, *flags)
    assert refused.returncode == 2, "the demo token in a token file"
    assert "22 characters" in refused.stderr or "demo token" in refused.stderr
