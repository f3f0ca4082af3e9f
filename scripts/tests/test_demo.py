"""start, demo and stop on the real services: the README's commands, in a path with spaces."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes
from scripts.tests.copies import ROOT, Copy, free_base, lend_environment

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform == "win32", reason="bash; Windows has the .ps1 twins"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="the demo needs curl"),
]
FOLDERS = ("scripts", "distributed-lock-py", "queue-py", "cache-py", "secure-app-py")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    root = tmp_path_factory.mktemp("real") / "a path with spaces"
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder,
            root / folder,
            ignore=shutil.ignore_patterns("tests", "bench", "data", "__pycache__"),
        )
    lend_environment(root)
    made = Copy(root, free_base())
    yield made
    made.run("stop.sh")


def curl(*arguments: str) -> dict[str, object]:
    """The JSON object that the server answered."""
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "--max-time", "20", *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def said(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_the_demo_starts_what_is_missing_and_stops_it_again(real: Copy, tmp_path: Path) -> None:
    done = real.run("demo.sh", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert "Every answer was as expected: lock queue cache secure" in done.stdout
    for service in ("lock", "queue", "cache", "secure"):
        assert real.pids(service) == {}
        assert f"{service}: stopped" in done.stdout


def test_the_demo_plays_again_on_running_clusters_and_leaves_them(real: Copy) -> None:
    started = real.run("start.sh")
    assert started.returncode == 0, said(started)
    before = {s: real.pids(s) for s in ("lock", "queue", "cache", "secure")}
    done = real.run("demo.sh")
    assert done.returncode == 0, said(done)
    assert {s: real.pids(s) for s in before} == before
    for pids in before.values():
        assert all(processes.started_at(pid) is not None for pid in pids.values())


def test_a_restart_finds_the_data(real: Copy) -> None:
    assert real.run("start.sh").returncode == 0
    queue = f"http://127.0.0.1:{real.port_base + 100}"
    cache = f"http://127.0.0.1:{real.port_base + 200}"
    kept = curl(f"{queue}/produce", "-d", '{"queue": "kept", "body": "over the night"}')["id"]
    assert curl(f"{cache}/write", "-d", '{"key": "kept", "value": [1, 2]}')["status"] == "ok"
    stopped = real.run("stop.sh")
    assert stopped.returncode == 0, said(stopped)
    assert "killing" not in stopped.stdout
    again = real.run("start.sh")
    assert again.returncode == 0, said(again)
    assert curl(f"{queue}/consume?queue=kept")["id"] == kept
    assert curl(f"{cache}/read?key=kept")["value"] == [1, 2]


def test_a_wrong_answer_ends_the_demo_with_what_was_expected(real: Copy) -> None:
    """The demo must be able to fail: here its copy expects another answer."""
    script = real.root / "scripts" / "demo.sh"
    right = script.read_text()
    try:
        script.write_text(right.replace('"status": "created"', '"status": "stored"'))
        done = real.run("demo.sh", "queue")
    finally:
        script.write_text(right)
    assert done.returncode == 1, said(done)
    assert 'expected 201 {"queue": "nama-antrean", "status": "stored"}, got 201' in done.stderr
