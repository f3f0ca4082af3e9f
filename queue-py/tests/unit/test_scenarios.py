"""The scenario files (``tests/scenarios``) as tests, and the runner's own verdicts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "scenarios"
_spec = importlib.util.spec_from_file_location("queue_scenarios", FOLDER / "run.py")
assert _spec is not None
assert _spec.loader is not None
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

SCENARIOS: list[dict[str, Any]] = [
    scenario for path in sorted(FOLDER.glob("*.json")) for scenario in json.loads(path.read_text())
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["id"])
def test_the_scenario_plays_as_written(scenario: dict[str, Any]) -> None:
    assert runner.play(scenario) is None


def test_a_wrong_expectation_fails_with_its_step() -> None:
    problem = runner.play({"id": "x", "steps": [["wait", 500], ["expect", {"owner": 2}]]})
    assert problem == 'at step 2 ["expect", {"owner": 2}]: owner is 0, expected 2'


def test_an_unknown_step_fails() -> None:
    assert runner.play({"id": "x", "steps": [["explode"]]}) == "at step 1: unknown step 'explode'"


def test_the_exit_code_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"id": "good", "steps": []}')
    assert runner.main([str(tmp_path)]) == 0
    (tmp_path / "b.json").write_text('[{"id": "bad", "steps": [["expect", {"owner": 1}]]}]')
    assert runner.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed"
