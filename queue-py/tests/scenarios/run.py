"""Replays scenario files against the replication core: ``python tests/scenarios/run.py PATH…``.

The format is in README.md beside this file. Prints ``ID ok`` or ``ID FAILED at step N: why``, then
``N passed, M failed``; exits 0 only if all passed. The invariants run after every step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from scenario_steps import STEPS, ScenarioError, Steps  # noqa: E402 - the path comes first


def play(scenario: dict[str, Any]) -> str | None:
    """None if it passed, else ``at step N: why`` (steps count from 1)."""
    cluster = Steps(scenario.get("config", {}))
    for number, step in enumerate(scenario["steps"], 1):
        name, *arguments = step
        if name not in STEPS:
            return f"at step {number}: unknown step {name!r}"
        try:
            getattr(cluster, name)(*arguments)
            cluster.check()
        except (ScenarioError, AssertionError) as error:
            return f"at step {number} {json.dumps(step)}: {error}"
    return None


def files(paths: Sequence[str]) -> list[Path]:
    """The scenario files under these paths, in order of name."""
    found: list[Path] = []
    for path in map(Path, paths):
        found.extend(sorted(path.rglob("*.json")) if path.is_dir() else [path])
    return found


def main(argv: Sequence[str]) -> int:
    passed = failed = 0
    for path in files(argv or [str(Path(__file__).parent)]):
        document = json.loads(path.read_text("utf-8"))
        for scenario in document if isinstance(document, list) else [document]:
            problem = play(scenario)
            print(f"{scenario['id']} " + ("ok" if problem is None else f"FAILED {problem}"))
            passed += problem is None
            failed += problem is not None
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
