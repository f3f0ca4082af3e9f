"""The scenario runner: every script in this folder passes, and a wrong one is told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNNER, RACES = HERE / "run.py", HERE / "races.json"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_every_race_that_has_broken_caches_ends_well() -> None:
    done = run(RACES)
    count = len(json.loads(RACES.read_text(encoding="utf-8")))
    assert done.stdout.splitlines()[-1] == f"{count} passed, 0 failed", done.stdout + done.stderr
    assert done.returncode == 0


def test_a_step_that_does_not_come_true_is_named(tmp_path: Path) -> None:
    steps = [["write", "b", "x", 1, "w"], ["flow"], ["expect", {"b": {"x": "S"}}]]
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps([{"id": "wrong", "steps": steps}]), encoding="utf-8")
    done = run(path)
    assert done.returncode == 1
    assert done.stdout.startswith("wrong FAILED at step 3: x is M on b, not S")
    assert done.stdout.splitlines()[-1] == "0 passed, 1 failed"


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"id":"x","steps":[["dance"]]}]'])
def test_what_holds_no_scenarios_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    done = run(path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
