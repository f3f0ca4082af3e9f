"""docs/asvs.md names a test for each item; each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

SERVICE = Path(__file__).resolve().parents[2]


def test_every_test_that_the_asvs_table_names_exists() -> None:
    table = [
        line
        for line in (SERVICE / "docs" / "asvs.md").read_text().splitlines()
        if re.match(r"\| \d", line)
    ]
    assert len(table) > 30
    defined = set()
    for path in (SERVICE / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    for row in table:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"no test for {row[:40]}"
        assert set(named) <= defined, set(named) - defined
