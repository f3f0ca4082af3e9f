"""The litmus runner: forbidden outcomes are never seen, allowed ones are (or it sees nothing)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNNER, CLASSIC = HERE / "litmus.py", HERE / "classic.json"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_no_forbidden_outcome_is_seen_in_the_simulation() -> None:
    done = run(CLASSIC, "--runs", 100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "22 passed, 0 failed"


def test_outcomes_that_are_allowed_are_seen(tmp_path: Path) -> None:
    """Else the verdicts above say nothing."""
    tests = json.loads(CLASSIC.read_text(encoding="utf-8"))
    threads = {test["name"]: test["threads"] for test in tests}
    allowed = [
        ("SB", {"r0": 1, "r1": 1}),
        ("SB", {"r0": 0, "r1": 1}),
        ("MP", {"r0": 0, "r1": 1}),
        ("MP", {"r0": 1, "r1": 1}),
        ("2+2W", {"x": 1, "y": 2}),
        ("IRIW", {"r0": 1, "r1": 0, "r2": 1, "r3": 1}),
        ("WRC", {"r0": 1, "r1": 1, "r2": 1}),
        ("CoRR", {"r0": 0, "r1": 1}),
    ]
    named = [
        {"name": f"{name} {number}", "threads": threads[name], "forbidden": outcome}
        for number, (name, outcome) in enumerate(allowed)
    ]
    path = tmp_path / "allowed.json"
    path.write_text(json.dumps(named), encoding="utf-8")
    done = run(path, "--runs", 1_000)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"0 passed, {len(allowed)} failed", done.stdout
    first = done.stdout.splitlines()[0]
    seed = first.split("seed ")[1].split(":")[0]
    again = run(path, "--seed", seed)  # a seed replays
    assert first in again.stdout.splitlines()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '[{"name":"x"}]',
        '[{"name":"x","threads":[[["w","x"]]],"forbidden":{"x":1}}]',
        '[{"name":"x","threads":[[["w","x",1]]],"forbidden":{"y":1}}]',
        '[{"name":"x","threads":[[["w","x",1]]],"forbidden":{}}]',
    ],
)
def test_what_is_no_litmus_file_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    done = run(path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.cluster
def test_no_forbidden_outcome_is_seen_on_real_processes() -> None:
    done = run(CLASSIC, "--cluster", "--runs", 6)
    assert done.returncode == 0, done.stdout + done.stderr
