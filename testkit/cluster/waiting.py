"""Waiting for a condition with a deadline, and turning an HTTP outcome into a history's verdict."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Container
from typing import Any, Final, TypeVar, overload

from testkit.cluster.http import Outcome, Reply
from testkit.history import History, Operation

T = TypeVar("T")
DEADLINE_S: Final = 20.0
SUCCESS: Final = range(200, 300)


@overload
async def until(
    condition: Callable[[], Awaitable[T | None]],
    what: str = "",
    *,
    timeout_s: float = DEADLINE_S,
    poll_s: float = 0.02,
) -> T: ...
@overload
async def until(
    condition: Callable[[], T | None],
    what: str = "",
    *,
    timeout_s: float = DEADLINE_S,
    poll_s: float = 0.02,
) -> T: ...
async def until(
    condition: Callable[[], Any],
    what: str = "",
    *,
    timeout_s: float = DEADLINE_S,
    poll_s: float = 0.02,
) -> Any:
    """Poll `condition` (plain or async) until it gives something true, and return that.

    AssertionError naming `what` after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        await asyncio.sleep(poll_s)


def settle(
    history: History,
    operation: Operation,
    outcome: Outcome,
    result: Callable[[Reply], Any] = lambda reply: None,
    *,
    success: Container[int] = SUCCESS,
) -> bool:
    """Complete `operation` as `outcome` says; True if it succeeded.

    ok with `result(reply)` if the status is in `success`; fail if the answer is definite or the
    request never left; else unknown: it may happen at any later time.
    """
    if isinstance(outcome, Reply) and outcome.status in success:
        history.ok(operation, result(outcome), outcome.status)
        return True
    shown = f"{outcome}"[:200]
    if outcome.definite:
        history.fail(operation, info=shown)
    else:
        history.unknown(operation, info=shown)
    return False
