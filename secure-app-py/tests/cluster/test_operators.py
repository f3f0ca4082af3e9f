"""The operator's commands as they are typed, on real nodes: tokens, policies, keys, backups."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest

from secure_store.client import Conflict, NotFound, SecureClient, Unauthenticated, Unavailable
from secure_store.trust import Trust
from testkit.cluster import Cluster
from testkit.sim.loading import load

kit = load(str(Path(__file__).with_name("pair.py")))
pytestmark = pytest.mark.cluster
TOKEN = "token-admin-123"


async def run(root: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A command, in a thread: the pair's clients go on meanwhile."""
    return await asyncio.to_thread(kit.command, root, *words, SECURE_STORE_TOKEN=token)


def client_of(cluster: Cluster, root: Path, token: str = TOKEN, **settings) -> SecureClient:
    trust = Trust(cert=[root / "server.crt"])
    return SecureClient([cluster.url(0), cluster.url(1)], token, trust=trust, **settings)


async def test_tokens_and_policies_by_command(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        urls = ["--url", cluster.url(1), "--url", cluster.url(0)]  # the primary is found
        made = await run(tmp_path, "token", "create", "--role", "user", "--ttl", "1h", "--name",
                         "ci", "--out", "ci.token", *urls)  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert stat.S_IMODE((tmp_path / "ci.token").stat().st_mode) == 0o600
        accessor = made.stdout.split("accessor ")[1].split(";")[0]
        listed = await run(tmp_path, "token", "list", "--json", *urls)
        (row,) = [json.loads(line) for line in listed.stdout.splitlines()]
        assert (row["accessor"], row["name"], row["roles"]) == (accessor, "ci", ["user"])
        held = ["--token_file", "ci.token"]
        denied = await run(tmp_path, "policy", "list", *held, *urls)
        assert (denied.returncode, denied.stdout) == (1, "")
        assert "Insufficient permissions" in denied.stderr
        (tmp_path / "rules.json").write_text('[{"pattern":"a/*","verbs":["read"]}]')
        put = await run(tmp_path, "policy", "put", "reader", "rules.json", *urls)
        assert put.returncode == 0, put.stderr
        for extra in (urls, ["--file", "rules.json"]):
            yes = await run(tmp_path, "policy", "check", "reader", "read", "a/b", *extra)
            no = await run(tmp_path, "policy", "check", "reader", "write", "a/b", *extra)
            assert (yes.returncode, no.returncode) == (0, 1)
            assert 'by {"pattern":"a/*"' in yes.stdout
        assert (await run(tmp_path, "token", "revoke", accessor, *urls)).returncode == 0
        late = await run(tmp_path, "policy", "get", "reader", *held, *urls)
        assert (late.returncode, "401" in late.stderr) == (1, True)


async def test_every_command_has_help_with_examples_and_one_line_for_a_mistake(tmp_path) -> None:
    kit.command(tmp_path, "cert")
    for words in (["token"], ["token", "create"], ["policy", "check", "r", "fly", "k"],
                  ["token", "list", "--pin", "12"], ["token", "list", "--url", "http://a:1"],
                  ["token", "create", "--role", "x", "--ttl", "5 parsecs"],
                  ["token", "list", "--token_file", "none"], ["backup", "--id", "nodeA"],
                  ["policy", "put", "r", "none.json"], ["restore", "--id", "x"],
                  ["promote", "--ca", "none.pem"], ["key", "rotate", "--id", "none"],
                  ["doctor", "--only", "nothing"], ["token", "list", "--cert", "none.crt"],
                  ["backup", "--verify", "none", "--master_key_file", "none"]):  # fmt: skip
        wrong = await run(tmp_path, *words)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), words
    assert (await run(tmp_path, "token", "list", token="")).returncode == 2
    for words in (["token"], ["token", "create"], ["token", "list"], ["token", "revoke"],
                  ["token", "bootstrap"], ["policy"], ["policy", "get"], ["policy", "list"],
                  ["policy", "put"], ["policy", "check"], ["promote"], ["key"], ["key", "make"],
                  ["key", "rotate"], ["backup"], ["restore"], ["cert"], ["audit"],
                  ["audit", "verify"], ["doctor"]):  # fmt: skip
        helped = await run(tmp_path, *words, "--help")
        assert helped.returncode == 0
        assert "examples:" in helped.stdout, words
        assert "main.py" in helped.stdout, words


async def test_the_first_admin_token_is_made_offline(tmp_path: Path) -> None:
    first = await run(tmp_path, "token", "bootstrap", "t.json", "--name", "ops")
    second = await run(tmp_path, "token", "bootstrap", "t.json", "--role", "user", "--name", "b")
    assert (first.returncode, second.returncode) == (0, 0)
    text = (tmp_path / "t.json").read_text()
    assert first.stdout.strip() not in text
    assert [row["name"] for row in json.loads(text)] == ["ops", "b"]
    assert stat.S_IMODE((tmp_path / "t.json").stat().st_mode) == 0o600
    again = await run(tmp_path, "token", "bootstrap", "t.json", "--name", "b")
    assert again.returncode == 2


async def test_keys_rotate_while_the_node_serves_and_old_ones_are_not_needed(tmp_path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with client_of(cluster, tmp_path) as store:
            for i in range(120):
                await store.set(f"k{i % 30}", {"n": i, "pad": "x" * 500})
            made = await store.create_token(["user"])
            serving = asyncio.create_task(_write_on(store))
            done = await run(tmp_path, "key", "rotate", "--master", "--url", cluster.url(0))
            assert (done.returncode, done.stdout) == (
                0, "nodeA: everything is sealed under data key 2\n",
            )  # fmt: skip
            serving.cancel()
        old = tmp_path / "data" / "nodeA" / "master.key.old"
        assert old.exists()
        old.unlink()
        cluster.power_cut()
        with sqlite3.connect(tmp_path / "data" / "nodeA" / "store.db") as raw:
            for table in ("meta", "log", "keys", "vals", "tokens"):
                for (sealed,) in raw.execute(f"SELECT sealed FROM {table}"):  # noqa: S608
                    assert int.from_bytes(sealed[:4], "big") == 2, table
        raw.close()
        await cluster.start_all()
        async with client_of(cluster, tmp_path, made.token) as reader:
            assert (await reader.get("k29")).value["n"] == 119, "tokens are not affected"
        assert await cluster.nodes[1].terminate() == 0
        stopped = await run(tmp_path, "key", "rotate", "--id", "nodeB", "--master")
        assert stopped.returncode == 0, stopped.stderr
        running = await run(tmp_path, "key", "rotate", "--id", "nodeA")
        assert (running.returncode, "in use" in running.stderr) == (2, True)
        cluster.start(1)
        await cluster.ready(1)
    for name in ("nodeA", "nodeB"):
        assert (await run(tmp_path, "doctor", "--id", name)).stdout == "ok\n"


async def _write_on(store: SecureClient) -> None:
    n = 0
    while True:
        n += 1
        await store.set("busy", n)


async def test_the_doctor_goes_through_the_production_checklist(tmp_path: Path) -> None:
    first = await run(tmp_path, "token", "bootstrap", "tokens.json", "--name", "ops")
    for words in (["cert"], ["cert", "--cert", "b.crt", "--key", "b.pem"]):
        assert (await run(tmp_path, *words)).returncode == 0

    def failing(done: subprocess.CompletedProcess[str]) -> set[str]:
        found = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")}
        assert done.returncode == bool(found), done.stdout
        return found

    async with kit.pair(tmp_path) as careless:
        async with careless.client(0) as admin:
            await admin.post("/tokens", {"roles": ["user"]})
        asked = ["doctor", "--production", "--id", "nodeA", "--url", careless.url(0)]
        assert failing(await run(tmp_path, *asked)) == {
            "master-key", "certificate", "tokens", "audit", "backups", "service",
        }  # fmt: skip
        careless.kill(1)
        await careless.terminate_all()
        replica = await run(tmp_path, "doctor", "--only", "replication", "--id", "nodeB")
        assert failing(replica) == set(), replica.stdout
    shutil.rmtree(tmp_path / "data")
    token = first.stdout.strip()

    careful = kit.pair(
        tmp_path, "--tokens_file=tokens.json", headers={"Authorization": f"Bearer {token}"}
    )
    async with careful:
        done = await run(tmp_path, "backup", "--id", "nodeA", "--out", "backups.1")
        assert done.returncode == 0, done.stderr
        (tmp_path / "kept").mkdir()
        (tmp_path / "backups.1").rename(tmp_path / "kept" / "one")
        asked = ["doctor", "--production", "--id", "nodeA", "--url", careful.url(0), "--backups",
                 "kept", "--peer_cert", "b.crt", "--tokens_file", "tokens.json"]  # fmt: skip
        done = await run(tmp_path, *asked, token=token)
        assert failing(done) == {"master-key", "audit"}, done.stdout
        shutil.move(tmp_path / "data" / "nodeA" / "master.key", tmp_path / "moved.key")
        done = await run(tmp_path, *asked, "--master_key_file", "moved.key", token=token)
        assert failing(done) == {"audit"}, "one disk only, here"
        (tmp_path / "server.key").chmod(0o644)
        (tmp_path / "data" / "nodeA" / "quarantine-epoch1-seq1.db").touch()
        done = await run(tmp_path, *asked, "--master_key_file", "moved.key", token=token)
        assert failing(done) == {"audit", "certificate", "data"}


async def test_a_backup_is_restored_as_a_cluster_of_its_own(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster:
        async with client_of(cluster, tmp_path) as store:
            await store.set("kept", "before")
            token = await store.create_token(["user"])
            busy = asyncio.create_task(_write_on(store))
            made = await run(tmp_path, "backup", "--id", "nodeA", "--out", "b1")
            busy.cancel()
            assert made.returncode == 0, made.stderr
            await store.set("kept", "after")
            await store.revoke_token(token.accessor)
        await cluster.terminate_all()
        master = tmp_path / "a.key"
        shutil.copy2(tmp_path / "data" / "nodeA" / "master.key", master)
        flags = ["--id", "nodeA", "--from", "b1", "--master_key_file", "a.key"]
        assert (await run(tmp_path, "restore", *flags)).returncode == 1, "it overwrites nothing"
        whole = (tmp_path / "b1").read_bytes()
        shutil.rmtree(tmp_path / "data" / "nodeA")
        (tmp_path / "b1").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        refused = await run(tmp_path, "restore", *flags)
        assert (refused.returncode, "damaged" in refused.stderr) == (1, True)
        assert not (tmp_path / "data" / "nodeA").exists()
        (tmp_path / "b1").write_bytes(whole)
        checked = await run(tmp_path, "backup", "--verify", "b1", "--master_key_file", "a.key")
        assert checked.returncode == 0, checked.stderr
        restored = await run(tmp_path, "restore", *flags)
        assert restored.returncode == 0, restored.stderr
        shutil.copy2(master, tmp_path / "data" / "nodeA" / "master.key")
        # The old replica and the restored primary do not know each other.
        cluster.start(0)
        cluster.start(1)
        await cluster.nodes[0].wait_log("Replica belongs to another cluster")
        async with cluster.client(0) as admin:
            assert (await kit.get(admin, "/get?key=kept")).json["value"] == "before"
            audit = tmp_path / "data" / "nodeA" / "audit" / "audit.log"
            await kit.eventually(lambda: _reached(lambda: "restored" in audit.read_text()))
        async with cluster.client(1) as old:
            assert (await kit.get(old, "/get?key=kept")).json["value"] == "after"
        # An empty one joins, though nothing was written since.
        assert await cluster.nodes[1].terminate() == 0
        shutil.rmtree(tmp_path / "data" / "nodeB")
        cluster.start(1)
        await cluster.ready(1)
        async with cluster.client(1, headers=kit.USER) as fresh:

            async def joined() -> bool:
                return (await kit.get(fresh, "/get?key=kept")).status == 200

            await kit.eventually(joined)
        async with client_of(cluster, tmp_path) as store:

            async def writes() -> bool:
                return not (await store.set("kept", "again")).degraded

            await kit.eventually(writes)
        await cluster.terminate_all()
    for name in ("nodeA", "nodeB"):
        assert (await run(tmp_path, "doctor", "--id", name)).stdout == "ok\n"


async def test_the_client_follows_a_killed_and_a_promoted_primary(tmp_path: Path) -> None:
    async with (
        kit.pair(tmp_path, "--replication=strict") as cluster,
        client_of(cluster, tmp_path, persist_s=40) as store,
    ):
        seen: list[int] = []

        async def listen() -> None:
            async for change in store.watch("n"):
                if change.kind == "set":
                    seen.append(change.value)

        watching = asyncio.create_task(listen())
        acknowledged = 0

        async def count() -> None:
            nonlocal acknowledged
            version = 0
            while acknowledged < 60:
                # A repeated write happens once, or this would be a conflict.
                written = await store.set("n", acknowledged + 1, expected_version=version)
                version = written.version or 0
                acknowledged += 1

        counting = asyncio.create_task(count())
        await kit.eventually(lambda: _reached(lambda: acknowledged >= 15))
        handed_over = await run(tmp_path, "promote", "--url", cluster.url(1))
        assert handed_over.returncode == 0, handed_over.stderr
        await kit.eventually(lambda: _reached(lambda: acknowledged >= 30))
        cluster.kill(1)
        promoted = await run(tmp_path, "promote", "--url", cluster.url(0))
        cluster.start(1)
        if promoted.returncode:  # it was not told yet that it is in step: rightly refused
            assert "409" in promoted.stderr
        await asyncio.wait_for(counting, 60)
        assert (await store.get("n")).value == 60
        assert len(await store.history("n")) == 20
        await kit.eventually(lambda: _reached(lambda: seen[-1:] == [60]))
        watching.cancel()
        assert seen == sorted(set(seen)), "in order, nothing twice"


async def _reached(what) -> bool:
    return what()


async def test_the_clients_words_are_the_services(tmp_path: Path) -> None:
    async with kit.pair(tmp_path) as cluster, client_of(cluster, tmp_path) as store:
        assert (await store.set("a/b", [1], expected_version=0)).version == 1
        with pytest.raises(Conflict) as conflict:
            await store.set("a/b", 2, expected_version=0)
        assert conflict.value.current_version == 1
        await store.delete("a/b")
        with pytest.raises(NotFound):
            await store.get("a/b")
        await store.undelete("a/b")
        assert (await store.get("a/b")).value == [1]
        versions = await store.txn([{"op": "check", "key": "a/b", "expected_version": 1},
                                    {"op": "set", "key": "a/c", "value": 2}])  # fmt: skip
        assert versions == [1, 1]
        assert [key async for key in store.list("a/")] == ["a/b", "a/c"]
        await store.destroy("a/c")
        await store.put_policy("reader", [{"pattern": "a/*", "verbs": ["read"]}])
        assert (await store.check_policy("reader", "read", "a/b"))["allowed"] is True
        assert "reader" in await store.policies()
        assert (await store.policy("reader"))[0]["pattern"] == "a/*"
        made = await store.create_token(["reader"], ttl_ms=60_000, uses=2)
        async with client_of(cluster, tmp_path, made.token) as reader:
            assert (await reader.get("a/b")).value == [1]
        assert [t["uses_left"] for t in await store.tokens()] == [1]
        await store.revoke_token(made.accessor)
        async with client_of(cluster, tmp_path, made.token) as reader:
            with pytest.raises(Unauthenticated):
                await reader.get("a/b")
        assert (await store.ask(cluster.url(1), "GET", "/status"))["role"] == "replica"
        trust = Trust(cert=[tmp_path / "server.crt"])
        for read_from, at in (("primary", 0), ("any", 1)):
            async with SecureClient(
                [cluster.url(1), cluster.url(0)], TOKEN, trust=trust, read_from=read_from
            ) as reader:
                assert (await reader.get("a/b")).value == [1]
                with pytest.raises(NotFound):
                    await reader.get("none")
                assert [key async for key in reader.list("a/")] == ["a/b"]
                assert reader.primary == cluster.url(at)
        cluster.kill(0)
        cluster.kill(1)
        async with client_of(cluster, tmp_path, persist_s=0.5) as nobody:
            with pytest.raises(Unavailable):
                await nobody.get("a/b")
