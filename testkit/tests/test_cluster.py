"""Real processes and links: what the fault switches promise, tried on a node that only echoes."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from testkit import cluster as cluster_package
from testkit.cluster import (
    CAN_LIMIT,
    CAN_PAUSE,
    Cluster,
    HttpClient,
    LinkProxy,
    NodeProcess,
    NodeView,
    NoReply,
    ProcessFailure,
    Reply,
    Reservation,
    cut_tail,
    flip_bit,
    free_port,
    limit_file_size,
    settle,
    until,
)
from testkit.cluster.process import _leash
from testkit.history import History

pytestmark = pytest.mark.cluster
NODE = Path(__file__).with_name("echo_node.py")
REROUTED = Path(cluster_package.__file__).with_name("rerouted.py")


def argv(view: NodeView) -> list[str]:
    peers = ",".join(view.dial(other) for other in view.others())
    return [
        sys.executable,
        str(NODE),
        "--addr",
        view.bind(),
        "--peers",
        peers,
        "--data_dir",
        str(view.data_dir),
    ]


async def reaches(cluster: Cluster, source: int, target: int) -> bool:
    async with cluster.client(source) as client:
        reply = await client.get("/ask", peer=cluster.views[source].dial(target))
        assert isinstance(reply, Reply), reply
        return bool(reply.json["reached"])


async def test_nodes_survive_kill_restart_and_power_cut_with_their_files(tmp_path: Path) -> None:
    async with Cluster(argv, 2, root=tmp_path) as cluster:
        async with cluster.client(0) as client:
            first = await client.post("/increment", {})
            assert isinstance(first, Reply)
            assert first.json == {"value": 1}
            cluster.kill(0)
            gone = await client.post("/increment", {})
            assert isinstance(gone, NoReply)
            await cluster.start_all()
            cluster.power_cut()
            assert not any(node.running for node in cluster.nodes)
            await cluster.start_all()
            again = await client.post("/increment", {})
            assert isinstance(again, Reply)
            assert again.json == {"value": 2}
        assert await cluster.terminate_all() == [0, 0]
    assert not any(node.running for node in cluster.nodes)


@pytest.mark.skipif(not CAN_PAUSE, reason="SIGSTOP is POSIX")
async def test_a_paused_node_answers_nothing_and_goes_on_when_resumed(tmp_path: Path) -> None:
    async with Cluster(argv, 1, root=tmp_path) as cluster, cluster.client(0) as client:
        cluster.pause(0)
        outcome = await client.get("/readyz", timeout_s=0.3)
        assert isinstance(outcome, NoReply)
        assert outcome.kind == "timeout"
        assert not outcome.definite
        cluster.resume(0)
        assert isinstance(await client.get("/readyz"), Reply)


async def test_cuts_act_on_one_direction_of_one_link(tmp_path: Path) -> None:
    async with Cluster(argv, 3, root=tmp_path, proxied=("http",)) as cluster:
        assert await reaches(cluster, 0, 1)
        cluster.cut(0, 1, one_way=True)
        assert not await reaches(cluster, 0, 1)
        assert await reaches(cluster, 1, 0)
        assert await reaches(cluster, 0, 2)
        cluster.heal()
        assert await reaches(cluster, 0, 1)
        cluster.partition({0}, {1, 2}, silent=True)
        assert not await reaches(cluster, 1, 0)
        assert not await reaches(cluster, 0, 2)
        assert await reaches(cluster, 1, 2)
        cluster.heal()
        assert await reaches(cluster, 1, 0)


def rerouted(view: NodeView) -> list[str]:
    """It knows the others' own addresses only."""
    routes = ",".join(f"{view.real(other)}={view.dial(other)}" for other in view.others())
    return [sys.executable, str(REROUTED), routes, *argv(view)[1:]]


async def test_links_to_addresses_that_a_node_was_never_told_can_be_cut(tmp_path: Path) -> None:
    async with (
        Cluster(rerouted, 2, root=tmp_path, proxied=["http"]) as cluster,
        cluster.client(0) as client,
    ):
        for cut in (False, True):
            if cut:
                cluster.cut(0, 1, one_way=True)
            reply = await client.get("/ask", peer=cluster.views[0].real(1))
            assert isinstance(reply, Reply), reply
            assert reply.json["reached"] is not cut


async def test_a_node_that_dies_early_is_reported_with_its_log(tmp_path: Path) -> None:
    node = NodeProcess("n", [sys.executable, str(NODE), "--nonsense"], log=tmp_path / "n.log")
    with node, pytest.raises(ProcessFailure, match=r"unrecognized arguments|required"):
        await node.wait_url(f"http://127.0.0.1:{free_port()}/readyz")
    assert node.returncode == 2


async def test_log_lines_can_be_waited_for_per_incarnation(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(NODE), "--addr", address, "--data_dir", str(tmp_path / "d")]
    with NodeProcess("n", command, log=tmp_path / "n.log") as node:
        assert address in await node.wait_log("serving on")
        await node.restart(f"http://{address}/readyz")
        assert node.output().count("serving on") == 1
        with pytest.raises(ProcessFailure, match="never logged"):
            await node.wait_log("no such line", timeout_s=0.1)


async def test_the_http_client_reads_lengths_chunks_and_errors_as_values(tmp_path: Path) -> None:
    async with Cluster(argv, 1, root=tmp_path) as cluster, cluster.client(0) as client:
        big = b"x" * 300_000
        echoed = await client.request("PUT", "/echo", body=big)
        assert isinstance(echoed, Reply)
        assert echoed.body == big
        assert echoed.headers["x-kind"] == "PUT"
        streamed = await client.get("/stream")
        assert isinstance(streamed, Reply)
        assert streamed.text == "one two three"
        missing = await client.get("/none")
        assert isinstance(missing, Reply)
        assert missing.status == 404
        head = await client.request("HEAD", "/readyz")
        assert isinstance(head, Reply)
        assert head.body == b""
        late = await client.get("/slow", timeout_s=0.2)
        assert late == NoReply("timeout", False, "no answer in 0.2 s")
        assert isinstance(await client.get("/readyz"), Reply)
        broken = await client.raw(b"\x00\x01 nonsense\r\n\r\n")
        assert isinstance(broken, NoReply) or broken.status == 400
    async with HttpClient("127.0.0.1", free_port()) as nobody:
        refused = await nobody.get("/")
        assert isinstance(refused, NoReply)
        assert (refused.kind, refused.definite) == ("refused", True)


async def test_a_reserved_port_is_given_to_nobody_else_but_can_be_bound(tmp_path: Path) -> None:
    reservations = [Reservation() for _ in range(50)]
    assert len({reservation.port for reservation in reservations}) == 50
    held = reservations[0]
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", held.port))
    held.about_to_bind()
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", held.port)
    server.close()
    for reservation in reservations:
        reservation.release()


async def echo_server() -> tuple[asyncio.Server, str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_link_delays_holds_and_resets() -> None:
    server, address = await echo_server()
    link = LinkProxy(address)
    try:
        port = int(link.address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"hello"
        link.delay(150, "forward")
        began = time.monotonic()
        writer.write(b"later")
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"later"
        assert time.monotonic() - began >= 0.15
        link.heal()
        link.blackhole("backward")
        writer.write(b"stuck")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(5), 0.2)
        link.heal()
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"stuck"
        link.cut()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 20)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        link.heal()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"again")
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"again"
        writer.close()
    finally:
        link.close()
        link.close()
        server.close()
    assert not [t for t in threading.enumerate() if t.name == "link-proxies"]


async def test_a_link_passes_the_end_of_the_stream_and_a_dead_target() -> None:
    server, address = await echo_server()
    link = LinkProxy(address)
    port = int(link.address.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"bye")
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 20) == b"bye"
    writer.close()
    server.close()
    await server.wait_closed()

    async def talk() -> bytes:  # the reset may be so quick that the connect itself sees it
        reader, _ = await asyncio.open_connection("127.0.0.1", port)
        return await asyncio.wait_for(reader.read(), 20)

    with pytest.raises(ConnectionResetError):
        await talk()
    link.close()


def test_files_are_cut_and_flipped_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    at = flip_bit(path, seed=3, start=10, end=20)
    changed = [offset for offset, byte in enumerate(path.read_bytes()) if byte]
    assert changed == [at]
    assert 10 <= at < 20
    cut_tail(path, 95)
    assert path.read_bytes() == bytes(5)
    cut_tail(path, 95)
    assert path.read_bytes() == b""


@pytest.mark.skipif(not CAN_LIMIT, reason="prlimit is Linux's")
async def test_a_node_can_be_made_to_run_out_of_room_and_get_it_back(tmp_path: Path) -> None:
    async with Cluster(argv, 1, root=tmp_path) as cluster, cluster.client(0) as client:

        async def status() -> int:
            outcome = await client.post("/increment", {})
            assert isinstance(outcome, Reply), outcome
            return outcome.status

        assert await status() == 200
        limit_file_size(cluster.nodes[0].pid, 0)
        assert await status() == 500
        limit_file_size(cluster.nodes[0].pid, None)
        (cluster.views[0].data_dir / "counter").write_text("7")
        assert await status() == 200


@pytest.mark.skipif(not _leash(), reason="needs Linux's setpriv")
def test_nodes_die_with_a_test_runner_that_is_killed(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(NODE), "--addr", address, "--data_dir", str(tmp_path / "d")]
    program = (
        "import pathlib, sys, time; from testkit.cluster import NodeProcess;"
        f"node = NodeProcess('n', {command!r}, log=pathlib.Path({str(tmp_path / 'log')!r}));"
        "node.start(); print(node.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[2]
    runner = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE)
    assert runner.stdout is not None
    pid = int(runner.stdout.readline())
    deadline = time.monotonic() + 20
    # Not on the leash yet: setpriv, or (empty) a program whose exec is not over.
    while b"setpriv" in (line := Path(f"/proc/{pid}/cmdline").read_bytes()) or not line:
        assert time.monotonic() < deadline, "the node never started"
        time.sleep(0.02)
    runner.kill()
    runner.wait()
    runner.stdout.close()
    deadline = time.monotonic() + 20
    while _exists(pid):
        assert time.monotonic() < deadline, f"node {pid} outlived the process that started it"
        time.sleep(0.02)


def _exists(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


async def test_waiting_returns_what_came_and_names_what_did_not() -> None:
    seen = iter([None, 0, "", "here"])
    assert await until(lambda: next(seen)) == "here"

    async def never() -> bool:
        return False

    with pytest.raises(AssertionError, match="a miracle"):
        await until(never, "a miracle", timeout_s=0.05)


def test_outcomes_settle_operations_as_ok_failed_or_unknown() -> None:
    def status(outcome: Reply | NoReply) -> str:
        history = History(clock=lambda: 0)
        operation = history.invoke("c", "write", "k", 1)
        assert settle(history, operation, outcome, lambda reply: reply.json["v"]) == (
            operation.status == "ok"
        )
        return f"{operation.status} {operation.result}"

    head = b"HTTP/1.1 200 OK"
    assert status(Reply(201, head, b'{"v":7}')) == "ok 7"
    assert status(Reply(409, head, b'{"error":"no"}')) == "fail None"
    assert status(Reply(503, head, b'{"error":"No leader"}')) == "fail None"
    assert status(Reply(503, head, b'{"error":"Timed out","definite":false}')) == "unknown None"
    assert status(Reply(502, head, b"<html>")) == "unknown None"
    assert status(NoReply("refused", True)) == "fail None"
    assert status(NoReply("timeout", False)) == "unknown None"
