"""What may come of a request instead of a lock, and which answers of a node mean it."""

from __future__ import annotations

from typing import Any, Never


class LockError(Exception):
    """Base of all errors of this client."""


class LockHeld(LockError):
    """A try (`wait_ms=0`) found the lock taken; `holders` as in the HTTP answer."""

    def __init__(self, holders: list[dict[str, Any]]) -> None:
        super().__init__("the lock is held")
        self.holders = holders


class LockTimeout(LockError):
    """`wait_ms` passed."""


class DeadlockDetected(LockError):
    """Waiting would never have ended; `cycle` names the clients, this one first."""

    def __init__(self, cycle: list[str]) -> None:
        super().__init__(f"deadlock: {' -> '.join(cycle)}")
        self.cycle = cycle


class LeaseLost(LockError):
    """The lock is not this client's any more, though it did not release it."""


class Refused(LockError):
    """The request itself is wrong, or not possible; `status` and `body` of the HTTP answer."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status}: {body.get('error', 'refused')}")
        self.status = status
        self.body = body


class Unavailable(LockError):
    """No answer in time. If not `definite`, the request may still take effect."""

    def __init__(self, message: str, *, definite: bool) -> None:
        super().__init__(message)
        self.definite = definite


def refuse(status: int, body: dict[str, Any]) -> Never:
    """Raise what an answer that is not a success means."""
    match body.get("status"):
        case "held":
            raise LockHeld(body.get("holders", []))
        case "timeout":
            raise LockTimeout("timed out waiting for the lock")
        case "deadlock":
            raise DeadlockDetected(body.get("cycle", []))
        case "lost" if "locks" not in body:  # not keepalive's, which renewed the others
            raise LeaseLost(f"lost: {', '.join(body.get('lost', ()))}")
        case _:
            raise Refused(status, body)
