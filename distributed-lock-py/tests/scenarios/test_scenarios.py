"""Every scenario file here passes, and the runner says no when a scenario does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def play(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "run.py"), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_scenario_here_passes() -> None:
    run = play(HERE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith(" passed, 0 failed")


def test_a_scenario_that_does_not_hold_names_its_step(tmp_path: Path) -> None:
    wrong = {
        "id": "wrong",
        "config": {"nodes": [1, 2, 3]},
        "steps": [["campaign", 1], ["stabilize"], ["expect", {"1": {"role": "!leader"}}]],
    }
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(wrong))
    run = play(path)
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        "wrong FAILED at step 3: node 1: role is leader, expected !leader",
        "0 passed, 1 failed",
    ]


def test_a_broken_file_fails_without_hiding_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(
        json.dumps({"id": "b", "config": {"nodes": [1]}, "steps": [["campaign", 1], ["dance"]]})
    )
    (tmp_path / "c.json").write_text(
        json.dumps({"id": "c", "config": {"nodes": [1]}, "steps": [["campaign", 1]]})
    )
    run = play(tmp_path)
    assert run.returncode == 1
    assert 'b FAILED at step 2: unknown step ["dance"]' in run.stdout
    assert "c ok" in run.stdout
    assert run.stdout.splitlines()[-1] == "1 passed, 2 failed"
