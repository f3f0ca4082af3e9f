"""start.sh and stop.sh on stand-in services: what they promise whoever runs them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
from scripts.tests.copies import SCRIPTS, Copy

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform == "win32", reason="bash; Windows has the .ps1 twins"),
]


def alive(pids: dict[str, int]) -> set[str]:
    return {name for name, pid in pids.items() if processes.started_at(pid) is not None}


def test_all_four_start_beside_each_other_and_stop_leaves_nothing(
    copy: Copy, tmp_path: Path
) -> None:
    done = copy.run("start.sh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base = copy.port_base
    for url in (
        f"http://127.0.0.1:{base}/",
        f"http://127.0.0.1:{base + 102}/",
        "dashboard",
        "curl",
    ):
        assert url in done.stdout
    everyone = {s: copy.pids(s) for s in ("lock", "queue", "cache", "secure")}
    assert [len(alive(pids)) for pids in everyone.values()] == [3, 3, 3, 2]
    done = copy.run("stop.sh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stopped node1, node2, node3" in done.stdout
    assert not any(alive(pids) for pids in everyone.values())
    assert all(copy.pids(service) == {} for service in everyone)


def test_a_second_start_says_so_and_changes_nothing(copy: Copy) -> None:
    assert copy.run("start.sh", "lock").returncode == 0
    before = copy.pids("lock")
    begun = time.monotonic()
    again = copy.run("start.sh", "lock")
    assert again.returncode == 0
    assert "was running already: nothing changed" in again.stdout
    assert copy.pids("lock") == before
    assert alive(before) == {"node1", "node2", "node3"}
    assert time.monotonic() - begun < 15


def test_a_node_that_was_killed_comes_back_with_its_data_and_the_others_stay(copy: Copy) -> None:
    assert copy.run("start.sh", "queue").returncode == 0
    before = copy.pids("queue")
    os.kill(before["nodeB"], signal.SIGKILL)
    processes.wait_gone({before["nodeB"]: "whatever"}, 5)
    assert copy.run("start.sh", "queue").returncode == 0
    after = copy.pids("queue")
    assert after["nodeB"] != before["nodeB"]
    assert {**after, "nodeB": 0} == {**before, "nodeB": 0}
    data = copy.root / ".run" / "queue" / "data" / str(copy.port_base) / "nodeB" / "starts"
    assert data.read_text().splitlines() == ["started", "started"]


def test_one_started_in_all_is_found_again_by_its_own_name(copy: Copy) -> None:
    """`start all` puts the cache at base + 200: `start cache` must not start another at base."""
    assert copy.run("start.sh", "cache", PORT_BASE=str(copy.port_base + 200)).returncode == 0
    before = copy.pids("cache")
    again = copy.run("start.sh", "cache")
    assert "nothing changed" in again.stdout
    assert copy.pids("cache") == before


def test_a_taken_port_is_named_with_its_holder_and_nothing_is_started(copy: Copy) -> None:
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", copy.port_base + 1))
        squatter.listen()
        done = copy.run("start.sh", "lock")
    assert done.returncode == 1
    assert f"port {copy.port_base + 1} (for lock node2) is taken by" in done.stderr
    if sys.platform == "linux":
        assert f"pid {os.getpid()}" in done.stderr
    assert copy.pids("lock") == {}
    assert "Traceback" not in done.stderr


def test_two_services_that_want_the_same_ports_are_told_about_each_other(copy: Copy) -> None:
    assert copy.run("start.sh", "queue").returncode == 0
    done = copy.run("start.sh", "cache")
    assert done.returncode == 1
    assert "is taken by the queue node nodeA of this copy" in done.stderr
    assert len(alive(copy.pids("queue"))) == 3


@pytest.mark.parametrize(
    ("mode", "said"), [("exit", "exited with code 1"), ("unready", "no quorum yet")]
)
def test_a_failed_start_shows_the_log_and_stops_what_it_started(
    copy: Copy, mode: str, said: str
) -> None:
    done = copy.run("start.sh", "queue", STAND_IN_NODEC=mode, START_TIMEOUT="3")
    assert done.returncode == 1
    assert said in done.stderr
    assert "| stand-in nodeC says hello" in done.stderr
    assert copy.pids("queue") == {}
    assert processes.port_is_free(copy.port_base)


def test_a_failed_start_leaves_nodes_alone_that_ran_before(copy: Copy) -> None:
    assert copy.run("start.sh", "queue").returncode == 0
    before = copy.pids("queue")
    os.kill(before["nodeC"], signal.SIGKILL)
    done = copy.run("start.sh", "queue", STAND_IN_NODEC="exit")
    assert done.returncode == 1
    assert alive(before) == {"nodeA", "nodeB"}


def test_a_node_deaf_to_sigterm_is_killed_after_its_grace(copy: Copy) -> None:
    assert copy.run("start.sh", "queue", STAND_IN_NODEA="deaf").returncode == 0
    pids = copy.pids("queue")
    done = copy.run("stop.sh", "queue")
    assert done.returncode == 0
    assert f"nodeA (pid {pids['nodeA']}) did not stop in 6 s: killing it" in done.stdout
    assert alive(pids) == set()


def test_a_stale_record_never_gets_a_stranger_killed(copy: Copy) -> None:
    """The machine was reset; the pid in our file is now somebody else's process."""
    assert copy.run("start.sh", "queue").returncode == 0
    record = copy.root / ".run" / "queue" / "nodeA.json"
    ours = copy.pids("queue")["nodeA"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        record.write_text(record.read_text().replace(f'"pid": {ours}', f'"pid": {stranger.pid}'))
        done = copy.run("stop.sh", "queue")
        try:
            assert done.returncode == 0
            assert stranger.poll() is None
        finally:
            stranger.kill()
            os.kill(ours, signal.SIGKILL)
    assert "stopped nodeB, nodeC" in done.stdout


def test_stop_without_anything_running_is_fine_twice(copy: Copy) -> None:
    for _ in range(2):
        done = copy.run("stop.sh")
        assert done.returncode == 0
        assert "lock: not running" in done.stdout


@pytest.mark.parametrize("script", ["start.sh", "stop.sh", "demo.sh"])
@pytest.mark.parametrize("wrong", [["kunci"], ["lock", "queue"], ["lock "]])
def test_a_wrong_argument_gets_the_usage_and_exit_code_2(script: str, wrong: list[str]) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *wrong],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert f"usage: {script} [all|lock|queue|cache|secure]" in done.stderr


@pytest.mark.parametrize("named", [True, False], ids=["by PYTHON", "on PATH"])
def test_a_python_that_is_too_old_is_named_with_its_version(tmp_path: Path, named: bool) -> None:
    copied = tmp_path / "old python"
    copied.mkdir()
    for name in ("lib.sh", "start.sh"):
        (copied / "scripts").mkdir(exist_ok=True)
        (copied / "scripts" / name).write_text((SCRIPTS / name).read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = tools / "python3"
    fake.write_text("#!/bin/sh\necho '3.8 is too old'\n")
    fake.chmod(0o755)
    for tool in ("bash", "dirname"):
        found = next(
            Path(place, tool)
            for place in os.environ["PATH"].split(os.pathsep)
            if Path(place, tool).exists()
        )
        (tools / tool).symlink_to(found)
    environ = {"PATH": str(tools)} | ({"PYTHON": str(fake)} if named else {})
    done = subprocess.run(
        ["bash", str(copied / "scripts" / "start.sh")],
        env=environ,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "3.8 is too old" in done.stderr
    assert not (copied / ".venv").exists()


def test_a_wrong_port_base_is_one_clear_line(copy: Copy) -> None:
    done = copy.run("start.sh", "lock", PORT_BASE="many")
    assert done.returncode == 1
    assert "PORT_BASE must be a port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps here")
def test_a_process_is_told_apart_without_proc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that macOS takes: ps, whatever the caller's language and time zone."""
    monkeypatch.setattr(processes, "_PROC", Path("/no/proc/here"))
    monkeypatch.setenv("TZ", "Asia/Makassar")
    here = processes.started_at(os.getpid())
    monkeypatch.setenv("TZ", "America/Lima")
    assert here is not None
    assert processes.started_at(os.getpid()) == here
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait(20)
        assert processes.started_at(child.pid) is None
