"""pip-audit over every requirements file: known vulnerabilities fail, and what could not be looked
up is said aloud.

pip-audit says "no known vulnerabilities" also of pins that its service does not know. Here that is
never clean: the last line names what was not looked up, and why. Exit code 0, or 1: vulnerable, or
3: not looked up, if CI_AUDIT=required.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ("distributed-lock-py", "queue-py", "cache-py", "secure-app-py", "testkit", ".ci")


def pins() -> list[str]:
    """Every pinned requirement once, without markers (a pin is judged on every platform)."""
    lines = [
        line
        for folder in PINS
        for line in (ROOT / folder / "requirements.txt").read_text().splitlines()
    ]
    return sorted(
        {
            line.partition(";")[0].strip()
            for line in lines
            if line.strip() and not line.startswith("#")
        }
    )


def audit(requirements: list[str]) -> tuple[list[str], list[str], str]:
    """(vulnerable, not looked up, what went wrong)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text("\n".join(requirements) + "\n")
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--timeout=15"]
        command = [sys.executable, "-m", "pip_audit", *options, "-f", "json", "-r", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        trouble = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return [], requirements, trouble
    vulnerable = [
        f"{d['name']} {d['version']}: {v['id']}, mended in {v['fix_versions'] or 'no version'}"
        for d in dependencies
        for v in d.get("vulns", ())
    ]
    skipped = [d["name"] for d in dependencies if "skip_reason" in d]
    return vulnerable, skipped, "the service does not know these versions, or is not reached"


def main() -> int:
    requirements = pins()
    vulnerable, skipped, why = audit(requirements)
    for line in vulnerable:
        print(f"VULNERABLE: {line}")
    if skipped:
        print(f"NOT AUDITED, so not known to be clean: {len(skipped)} of {len(requirements)} pins")
        print(f"  {' '.join(skipped)}: {why}")
    else:
        print(f"pip-audit: {len(requirements)} pins looked up, {len(vulnerable)} vulnerabilities")
    if vulnerable:
        return 1
    return 3 if skipped and os.environ.get("CI_AUDIT") == "required" else 0


if __name__ == "__main__":
    raise SystemExit(main())
