"""The lock checker: certain holds never exclude each other, tokens grow with real time."""

from typing import Any

import pytest

from testkit.checkers import locks
from testkit.history import Operation

Row = tuple[str, str, str, Any, int, int | None, Any]


def history(*rows: Row) -> list[Operation]:
    """process, kind, lock, argument, from ms, to ms (None: unknown), token."""
    return [
        Operation(
            number=number,
            process=process,
            kind=kind,
            key=key,
            argument=argument,
            invoked_us=invoked * 1000,
            completed_us=None if completed is None else completed * 1000,
            status="unknown" if completed is None else "ok",
            result=result,
        )
        for number, (process, kind, key, argument, invoked, completed, result) in enumerate(rows)
    ]


SHARED = {"type": "shared"}
LEASE = {"ttl_ms": 100}
TOGETHER = {"together": "r1"}
TWO_OF_THREE = {"type": "semaphore", "permits": 2, "limit": 3}
ONE_OF_THREE = {"type": "semaphore", "permits": 1, "limit": 3}

GOOD = {
    "hand-over": history(
        ("a", "acquire", "l", None, 0, 1, 1),
        ("b", "acquire", "l", None, 0, 6, 2),
        ("a", "release", "l", None, 5, 7, None),
    ),
    "sharers": history(
        ("a", "acquire", "l", SHARED, 0, 1, 1), ("b", "acquire", "l", SHARED, 2, 3, 2)
    ),
    "a semaphore to its limit": history(
        ("a", "acquire", "l", TWO_OF_THREE, 0, 1, 1), ("b", "acquire", "l", ONE_OF_THREE, 2, 3, 2)
    ),
    "after the lease": history(
        ("a", "acquire", "l", LEASE, 0, 50, 1), ("b", "acquire", "l", None, 60, 101, 2)
    ),
    "an unknown release may have released": history(
        ("a", "acquire", "l", None, 0, 1, 1),
        ("a", "release", "l", None, 2, None, None),
        ("b", "acquire", "l", None, 3, 4, 2),
    ),
    "other locks": history(
        ("a", "acquire", "l", None, 0, 1, 1), ("b", "acquire", "m", None, 2, 3, 2)
    ),
    "acquired again": history(
        ("a", "acquire", "l", None, 0, 1, 1),
        ("a", "acquire", "l", None, 2, 3, 1),
        ("a", "release_all", "", None, 4, 5, None),
        ("b", "acquire", "l", None, 4, 5, 2),
    ),
    "freed by an operator": history(
        ("a", "acquire", "l", None, 0, 1, 1),
        ("root", "force_release", "l", None, 2, 3, None),
        ("b", "acquire", "l", None, 4, 5, 2),
    ),
    "an unknown acquire had got it before": history(
        ("a", "acquire", "l", None, 0, None, None),
        ("b", "acquire", "m", None, 1, 2, 8),
        ("a", "acquire", "l", None, 3, 4, 7),
    ),
    "an unknown release had not happened": history(
        ("a", "acquire", "l", None, 0, 1, 7),
        ("b", "acquire", "m", None, 2, 3, 8),
        ("a", "release", "l", None, 4, None, None),
        ("a", "acquire", "l", None, 5, 6, 7),
    ),
    "several locks by one grant": history(
        ("a", "acquire", "l", TOGETHER, 0, 1, 1), ("a", "acquire", "m", TOGETHER, 0, 2, 1)
    ),
    "concurrent grants may be numbered either way": history(
        ("a", "acquire", "l", None, 0, 10, 2), ("b", "acquire", "m", None, 0, 9, 1)
    ),
}
BAD = {
    "two holders": history(
        ("a", "acquire", "l", None, 0, 1, 1), ("b", "acquire", "l", None, 2, 3, 2)
    ),
    "shared beside exclusive": history(
        ("a", "acquire", "l", SHARED, 0, 1, 1), ("b", "acquire", "l", None, 2, 3, 2)
    ),
    "granted before the release was asked for": history(
        ("a", "acquire", "l", None, 0, 1, 1),
        ("b", "acquire", "l", None, 2, 3, 2),
        ("a", "release", "l", None, 4, 5, None),
    ),
    "during the lease": history(
        ("a", "acquire", "l", LEASE, 0, 50, 1), ("b", "acquire", "l", None, 60, 70, 2)
    ),
    "during a renewed lease": history(
        ("a", "acquire", "l", LEASE, 0, 1, 1),
        ("a", "keepalive", "", None, 90, 91, None),
        ("b", "acquire", "l", None, 110, 120, 2),
    ),
    "too many permits": history(
        ("a", "acquire", "l", TWO_OF_THREE, 0, 1, 1), ("b", "acquire", "l", TWO_OF_THREE, 2, 3, 2)
    ),
    "an older token later": history(
        ("a", "acquire", "l", None, 0, 1, 5), ("b", "acquire", "m", None, 2, 3, 4)
    ),
    "one token twice": history(
        ("a", "acquire", "l", None, 0, 10, 5), ("b", "acquire", "m", None, 0, 10, 5)
    ),
    "an older token later, though an unknown acquire was released": history(
        ("a", "acquire", "l", None, 0, None, None),
        ("b", "acquire", "m", None, 1, 2, 8),
        ("a", "release", "l", None, 3, 4, None),
        ("a", "acquire", "l", None, 5, 6, 7),
    ),
    "one token for two grants of one client": history(
        ("a", "acquire", "l", TOGETHER, 0, 10, 5), ("a", "acquire", "m", None, 0, 10, 5)
    ),
    "the old token after a new grant": history(
        ("a", "acquire", "l", None, 0, 1, 1),
        ("a", "release", "l", None, 2, 3, None),
        ("b", "acquire", "l", None, 4, 5, 2),
        ("b", "release", "l", None, 6, 7, None),
        ("a", "acquire", "l", None, 8, 9, 1),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_it_accepts(name: str) -> None:
    locks.check(GOOD[name]).require()


@pytest.mark.parametrize("name", BAD)
def test_it_refuses(name: str) -> None:
    verdict = locks.check(BAD[name])
    assert verdict.valid is False
    assert len(verdict.window) >= 2
