"""A grow-only set read at the end: what was added and acknowledged is there, nothing else is.

`add` (argument: the element); the final contents are given to `check`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from testkit.checkers.models import freeze
from testkit.checkers.verdict import Verdict
from testkit.history import History, Operation


def check(history: History | Iterable[Operation], final: Iterable[Any]) -> Verdict:
    """Judge `final` against the adds of the history."""
    present = {freeze(element) for element in final}
    attempted = {}
    for operation in history:
        if operation.kind != "add":
            continue
        element = freeze(operation.argument)
        if operation.status == "ok" and element not in present:
            return Verdict(False, f"{operation.argument!r} was added and is lost", (operation,))
        if operation.status != "fail":
            attempted[element] = operation
    unexpected = [element for element in present if element not in attempted]
    if unexpected:
        return Verdict(False, f"{len(unexpected)} elements from nowhere, e.g. {unexpected[0]!r}")
    recovered = sum(attempted[element].status == "unknown" for element in present)
    return Verdict(True, "", (), {"present": len(present), "recovered": recovered})
