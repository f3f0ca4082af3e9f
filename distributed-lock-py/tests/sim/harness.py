"""`python -m testkit.sim lock[:NAME] --seed N` finds the service's scenarios here."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for path in (HERE, HERE.parent.parent / "src"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

from lock_harness import LOCK  # noqa: E402 - the paths come first
from register_harness import FIVE, MEMBERSHIP, RAFT  # noqa: E402 - the paths come first
from wipe_harness import WIPE  # noqa: E402 - the paths come first

__all__ = ["FIVE", "LOCK", "MEMBERSHIP", "RAFT", "WIPE"]
