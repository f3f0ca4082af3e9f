"""The litmus runner: forbidden outcomes are never seen, allowed ones are (or it sees nothing)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
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
        '[{"name":"x","threads":[[["w","x",1]]],"forbidden":{"x":"1"}}]',
        '[{"name":"x","threads":[[["w","x",true]]],"forbidden":{"x":1}}]',
        '[{"name":"x","threads":[[["r","x","x"]]],"forbidden":{"x":1}}]',
        '[{"name":"x","threads":[[["cas","x",1]]],"forbidden":{"x":1}}]',
        '[{"name":"x","threads":{"a":1},"forbidden":{"x":1}}]',
        '[{"name":"x","threads":[7],"forbidden":{"x":1}}]',
        '[{"name":7,"threads":[[["w","x",1]]],"forbidden":{"x":2}}]',
    ],
)
def test_what_is_no_litmus_file_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    done = run(path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


ODD = [
    {"name": "one thread", "threads": [[["w", "x", 1], ["r", "x", "a"]]], "forbidden": {"a": 0}},
    {
        "name": "six threads",
        "threads": [[["w", "x", n], ["r", "y", f"r{n}"], ["w", "y", n]] for n in range(1, 7)],
        "forbidden": {f"r{n}": 7 for n in range(1, 7)},
    },
    {
        "name": "one register twice",
        "threads": [[["w", "x", 1], ["r", "x", "a"], ["r", "x", "a"]], [["r", "x", "b"]]],
        "forbidden": {"a": 0},
    },
    {"name": "keys only", "threads": [[["w", "k 1/ü", -5]], []], "forbidden": {"k 1/ü": 0}},
    {"name": "nothing", "threads": [[["w", "x", 1]], [["r", "x", "a"]]], "forbidden": {}},
    {"name": "nobody", "threads": [], "forbidden": {}},
]


def test_files_that_are_odd_but_right_are_played(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([*ODD, *ODD]), encoding="utf-8")
    done = run(path, "--runs", 60)
    assert done.stdout.splitlines()[-1] == f"{2 * len(ODD)} passed, 0 failed", done.stderr
    assert done.returncode == 0


def test_the_seeds_lead_to_other_orders_losses_evictions_and_leases_that_run_out() -> None:
    done = run(CLASSIC, "--coverage", "--runs", 60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 22
    met: Counter[str] = Counter()
    for line in lines:
        of_test = {name: int(n) for name, n in (part.split("=") for part in line.split()[1:])}
        assert of_test["orders"] >= 0.75 * of_test["runs"], line
        met.update(of_test)
    for happening in ("reordered", "evictions", "use_once", "upgrades", "lease_waits", "refetches"):
        assert met[happening] >= 22, f"{happening}: {met}"


@pytest.mark.cluster
def test_odd_files_are_played_on_real_processes_too(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([*ODD, *ODD]), encoding="utf-8")
    done = run(path, "--cluster", "--runs", 4)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.cluster
def test_no_forbidden_outcome_is_seen_on_real_processes() -> None:
    done = run(CLASSIC, "--cluster", "--runs", 6)
    assert done.returncode == 0, done.stdout + done.stderr
