"""Disks that are lost, damaged or full, and nodes that come and go, with real processes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from testkit.cluster import NodeView, NoReply, Reply
from testkit.cluster.files import CAN_LIMIT, cut_tail, flip_bit, limit_file_size

from .lock_cluster import MAIN, LockCluster, make_cluster, until

pytestmark = pytest.mark.cluster

LOCK = {"lock_name": "kept", "client_id": "keeper"}


async def acquired(cluster: LockCluster, body: dict[str, object], among: tuple[int, ...]) -> bool:
    """Whether some node grants it now; `wait_ms` is the node's business, the client's patience
    short."""
    for index in among:
        async with cluster.client(index) as client:
            match await client.post("/acquire", body, timeout_s=1.0):
                case Reply(status=200):
                    return True
                case Reply() | NoReply():
                    pass
    return False


async def test_a_node_that_lost_its_disk_counts_for_nothing_until_it_was_added_again(
    tmp_path: Path,
) -> None:
    async with make_cluster(tmp_path) as cluster:
        leader = await cluster.leader()
        wiped, other = (index for index in range(3) if index != leader)
        token = (await cluster.ask(leader, "/acquire", LOCK)).json["fencing_token"]
        await until(lambda: knows_its_members(cluster, leader))
        cluster.kill(wiped)
        shutil.rmtree(cluster.views[wiped].data_dir)
        cluster.start(wiped)
        await until(lambda: "its disk was lost" in cluster.nodes[wiped].output())
        # Leader and wiped node would be two of three: but nobody may count on the wiped one.
        cluster.kill(other)
        await until(lambda: leads_no_more(cluster, leader))
        assert not await acquired(cluster, {"lock_name": "x", "client_id": "c"}, (leader, wiped))
        cluster.start(other)
        leader = await cluster.leader((leader, other))
        assert await acquired(cluster, {"lock_name": "x", "client_id": "c"}, (leader,))
        # Removed and added again it catches up and is a full member.
        name, view = f"node{wiped + 1}", cluster.views[wiped]
        members = "/admin/members"
        removed = await cluster.ask(leader, members, {"action": "remove", "id": name})
        assert removed.status == 200, removed
        addresses = {"raft_addr": view.bind("raft"), "http_addr": view.bind("http")}
        added = await cluster.ask(leader, members, {"action": "add", "id": name, **addresses})
        assert added.status == 200, added
        await until(lambda: is_voter(cluster, leader, wiped))
        other = next(index for index in range(3) if index not in (leader, wiped))
        cluster.kill(other)
        assert await until(
            lambda: acquired(cluster, {"lock_name": "y", "client_id": "c"}, (leader, wiped))
        )
        leader = await cluster.leader((leader, wiped))
        kept = (await cluster.ask(leader, "/locks/kept")).json
        assert [holder["fencing_token"] for holder in kept["holders"]] == [token]


async def test_a_damaged_store_stops_its_node_in_one_line_and_nobody_else(tmp_path: Path) -> None:
    async with make_cluster(tmp_path) as cluster:
        leader = await cluster.leader()
        await cluster.ask(leader, "/acquire", LOCK)
        victim = (leader + 1) % 3
        store = cluster.views[victim].data_dir / "raft.sqlite3"
        wal = store.with_name(store.name + "-wal")
        cluster.kill(victim)
        sound = {path: path.read_bytes() for path in (store, wal)}
        used = len(sound[wal].rstrip(b"\0"))  # the rest is kept ready for what comes
        for damage in (
            lambda: cut_tail(wal, len(sound[wal]) - used * 2 // 3),
            lambda: wal.write_bytes(b""),
            lambda: flip_bit(wal, 1, start=used // 2, end=used - 4_000),
            lambda: store.write_bytes(b""),
            lambda: store.unlink(),
        ):
            for path, content in sound.items():
                path.write_bytes(content)
            damage()
            log = cluster.root / f"node{victim}.log"
            before = log.stat().st_size
            cluster.start(victim)
            assert await cluster.nodes[victim].wait() == 2
            said = log.read_bytes()[before:].decode().strip()
            assert len(said.splitlines()) == 1, said
            assert "raft.sqlite3" in said
            assert "corrupt" in said
        for path, content in sound.items():
            path.write_bytes(content)
        cluster.start(victim)
        await cluster.ready(victim)


@pytest.mark.skipif(not CAN_LIMIT, reason="needs Linux's prlimit")
async def test_a_full_disk_halts_the_node_and_loses_nothing(tmp_path: Path) -> None:
    async with make_cluster(tmp_path) as cluster:
        full = await cluster.leader()
        others = tuple(index for index in range(3) if index != full)
        token = (await cluster.ask(full, "/acquire", LOCK)).json["fencing_token"]
        limit_file_size(cluster.nodes[full].pid, 16_000)  # its own log still fits
        attempt = {"lock_name": "more", "client_id": "c", "request_id": "r"}
        await until(lambda: acquired(cluster, attempt, (full, *others)))
        assert await cluster.nodes[full].wait() not in (0, 2)
        assert "the store failed" in cluster.nodes[full].output()
        leader = await cluster.leader(others)
        cluster.start(full)
        await cluster.ready(full)
        kept = (await cluster.ask(leader, "/locks/kept")).json
        assert [holder["fencing_token"] for holder in kept["holders"]] == [token]


async def test_a_fourth_node_joins_and_one_that_is_removed_stops(tmp_path: Path) -> None:
    def argv(view: NodeView) -> list[str]:
        known = 4 if view.index == 3 else 3
        return [
            sys.executable,
            str(MAIN),
            f"--id=node{view.index + 1}",
            f"--raft_addr={view.bind('raft')}",
            f"--http_addr={view.bind('http')}",
            f"--peers={','.join(view.reals('raft')[:known])}",
            f"--peer_http_addrs={','.join(view.reals('http')[:known])}",
            f"--data_dir={view.data_dir}",
            *(["--join"] if view.index == 3 else []),
        ]

    cluster = LockCluster(argv, 4, root=tmp_path, channels=("http", "raft"))
    cluster.prepare()
    try:
        for index in range(4):
            cluster.start(index)
        leader = await cluster.leader((0, 1, 2))
        token = (await cluster.ask(leader, "/acquire", LOCK)).json["fencing_token"]
        view = cluster.views[3]
        body = {"id": "node4", "raft_addr": view.bind("raft"), "http_addr": view.bind("http")}
        await until(lambda: done(cluster, leader, {"action": "add", **body}))
        await until(lambda: is_voter(cluster, leader, 3))
        gone = next(index for index in range(3) if index != leader)
        await until(lambda: done(cluster, leader, {"action": "remove", "id": f"node{gone + 1}"}))
        assert await cluster.nodes[gone].wait() == 0
        # Three members, one of them new: it is needed, and it serves.
        old = next(index for index in range(3) if index not in (leader, gone))
        cluster.kill(old)
        await until(lambda: acquired(cluster, {"lock_name": "y", "client_id": "c"}, (leader, 3)))
        now = await cluster.leader((leader, 3))
        kept = (await cluster.ask(now, "/locks/kept")).json
        assert [holder["fencing_token"] for holder in kept["holders"]] == [token]
    finally:
        cluster.close()


# ---------------------------------------------------------------------------------------- watching


async def leads_no_more(cluster: LockCluster, index: int) -> bool:
    return (await cluster.status(index)).get("state") != "LEADER"


async def is_voter(cluster: LockCluster, leader: int, index: int) -> bool:
    peers = (await cluster.status(leader)).get("peers", [])
    return any(peer["position"] == index + 1 and peer["voter"] for peer in peers)


async def knows_its_members(cluster: LockCluster, leader: int) -> bool:
    """All nodes have met, and what they are called is committed everywhere."""
    states = [await cluster.status(index) for index in range(cluster.size)]
    return all(
        state.get("commit_index", 0) == states[leader].get("last_index") for state in states
    ) and all(peer["connected"] for peer in states[leader].get("peers", [])[:3])


async def done(cluster: LockCluster, leader: int, body: dict[str, str]) -> bool:
    """The leader may still be settling an earlier change: ask until it is done."""
    return (await cluster.ask(leader, "/admin/members", body)).status == 200
