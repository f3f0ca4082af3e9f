"""bandit over everything that ships: each finding must be answered where it is, or this fails.

An answer is a `# noqa: S<number> - reason` on one of the finding's lines: ruff's S rules have
bandit's numbers, so one comment answers both tools. What ruff's per-file-ignores say in
pyproject.toml counts too.
Which tests are left out altogether, and why, stands in pyproject.toml under [tool.bandit].
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "distributed-lock-py/src", "queue-py/main.py", "queue-py/message_queue", "cache-py/main.py",
    "cache-py/mesi_cache", "secure-app-py/main.py", "secure-app-py/secure_store", "testkit",
    "scripts", ".ci",
)  # fmt: skip


def findings() -> list[dict[str, Any]]:
    """What bandit says; raises if it could not read something."""
    command = [
        sys.executable,
        "-m",
        "bandit",
        "-q",
        "-r",
        "-f",
        "json",
        "-c",
        "pyproject.toml",
        *SHIPPED,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    report = json.loads(done.stdout)
    if report["errors"]:
        raise SystemExit(f"bandit could not read: {report['errors']}")
    found: list[dict[str, Any]] = report["results"]
    return found


def ignored_by_ruff() -> dict[str, set[str]]:
    """Codes that whole folders are excused from, by glob."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    return {glob: set(codes) for glob, codes in ruff["per-file-ignores"].items()}


def is_answered(finding: dict[str, Any], excused: dict[str, set[str]]) -> bool:
    code = "S" + finding["test_id"].removeprefix("B")
    path = finding["filename"]
    for glob, codes in excused.items():  # (fnmatch's stars cross slashes)
        if code in codes and fnmatch(path, glob.replace("**/", "*")):
            return True
    lines = (ROOT / path).read_text().splitlines()
    span = [finding["line_number"], *finding["line_range"]]
    text = lines[min(span) - 1 : max(span)]
    return any(
        re.search(rf"# noqa: [A-Z0-9, ]*\b{code}\b[A-Z0-9, ]*\s+[-#]\s*\S", line) for line in text
    )


def main() -> int:
    excused = ignored_by_ruff()
    found = findings()
    open_ones = [f for f in found if not is_answered(f, excused)]
    for f in open_ones:
        print(f"{f['filename']}:{f['line_number']}: {f['test_id']} {f['issue_text']}")
    print(f"bandit: {len(found)} findings, {len(found) - len(open_ones)} answered where they are")
    return 1 if open_ones else 0


if __name__ == "__main__":
    raise SystemExit(main())
