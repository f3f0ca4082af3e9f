"""What `make security` concludes from what bandit and pip-audit say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CI = Path(__file__).resolve().parents[2] / ".ci"


def step(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", CI / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def audited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> tuple[int, str]:
    vulnerabilities = step("vulnerabilities")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, said, "no route\n")

    monkeypatch.setattr(vulnerabilities.subprocess, "run", run)
    return vulnerabilities.main(), capsys.readouterr().out


def report(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies})


CLEAN = {"name": "aiohttp", "version": "1", "vulns": []}
SKIPPED = {"name": "msgspec", "skip_reason": "Dependency not found on PyPI"}
BAD = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}


@pytest.mark.parametrize(
    ("said", "code", "word"),
    [
        (report(CLEAN), 0, "0 vulnerabilities"),
        (report(CLEAN, SKIPPED), 0, "NOT AUDITED"),
        (report(SKIPPED, BAD), 1, "VULNERABLE: x 1: CVE-1"),
        ("Traceback", 0, "no route"),
        ("", 0, "NOT AUDITED"),
    ],
)
def test_a_pin_that_was_not_looked_up_is_named_and_never_called_clean(
    monkeypatch, capsys, said: str, code: int, word: str
) -> None:
    monkeypatch.delenv("CI_AUDIT", raising=False)
    got, out = audited(monkeypatch, capsys, said)
    assert got == code
    assert word in out


def test_it_can_be_made_a_failure(monkeypatch, capsys) -> None:
    monkeypatch.setenv("CI_AUDIT", "required")
    assert audited(monkeypatch, capsys, report(SKIPPED))[0] == 3
    assert audited(monkeypatch, capsys, report(CLEAN))[0] == 0


def test_every_requirements_file_is_looked_at() -> None:
    pins = step("vulnerabilities").pins()
    assert any(pin.startswith("cryptography==") for pin in pins)
    assert any(pin.startswith("uvloop==") for pin in pins)
    assert all("==" in pin for pin in pins)


@pytest.mark.parametrize(
    ("line", "is_answered"),
    [
        ("x = f'SELECT {a}'  # noqa: S608 - constants", True),
        ("x = f'SELECT {a}'  # noqa: E501, S608 - constants", True),
        ("x = f'SELECT {a}'  # noqa: S608", False),
        ("x = f'SELECT {a}'  # noqa: S101 - another one", False),
        ("x = f'SELECT {a}'", False),
    ],
)
def test_an_answer_names_the_finding_and_a_reason(
    monkeypatch, tmp_path: Path, line: str, is_answered: bool
) -> None:
    findings = step("bandit_findings")
    monkeypatch.setattr(findings, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(f"a = 1\n{line}\n")
    found = {"test_id": "B608", "filename": "a.py", "line_number": 2, "line_range": [2]}
    assert findings.is_answered(found, {}) is is_answered
    assert findings.is_answered(found, {"**/a.py": {"S608"}})
    assert findings.is_answered(found, {"**/core/**/a.py": {"S608"}}) is is_answered
