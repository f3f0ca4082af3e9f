"""Mutual exclusion and fencing judged by time: who certainly held what, when.

Kinds: `acquire` (key: the lock; argument {"type", "permits", "limit", "ttl_ms"}, all optional;
result: the fencing token; several locks granted by one token are one operation each, with the same
"together" in their arguments), `release`, `release_all`, `keepalive` (argument {"ttl_ms"},
optional), `force_release` (by anybody) and `downgrade`. The client is the process.

A hold is certain from the completion of its acquire to the invocation of its release, or to the end
of its lease counted from the *invocation* of the acquire (that is how a careful client counts), or
to an invocation of anything else by which the client gave it up. Two certain holds that exclude
each other and overlap are a violation whatever the clocks and delays were. Linear in the history.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from testkit.checkers.verdict import Verdict
from testkit.history import History, Operation

FOREVER: Final = 1 << 62
GIVING_UP: Final = ("release", "release_all", "force_release", "downgrade")


@dataclass(slots=True)
class Hold:
    """One certain hold: [start_us, end_us) of `lock` by `client`."""

    lock: str
    client: str
    kind: str
    permits: int
    limit: int
    token: int
    start_us: int
    end_us: int
    acquire: Operation
    since_us: int  # granted no earlier: an acquire or a release of unknown fate may have left it


def check(history: History | Iterable[Operation], *, slack_ms: float = 0) -> Verdict:
    """No two excluding holds overlap; tokens are unique and grow with real time, cluster-wide.

    `slack_ms` shortens leases on both sides' behalf (clock drift of real machines).
    """
    operations = sorted(history, key=lambda operation: operation.invoked_us)
    holds = _holds(operations, slack_ms)
    for problem in (_tokens(holds), _overlaps(holds)):
        if problem is not None:
            return problem
    return Verdict(True, "", (), {"holds": len(holds), "operations": len(operations)})


def _holds(operations: list[Operation], slack_ms: float) -> list[Hold]:
    holds: list[Hold] = []
    current: dict[tuple[str, str], Hold] = {}
    unknown_since: dict[tuple[str, str], int] = {}
    for operation in operations:
        key = (operation.key, operation.process)
        if operation.kind in GIVING_UP and operation.status != "fail":
            for given_up in [k for k in current if _concerns(operation, k)]:
                gone = current.pop(given_up)
                gone.end_us = min(gone.end_us, operation.invoked_us)
                unknown_since.setdefault(given_up, gone.since_us)
        if operation.kind in GIVING_UP and operation.status == "ok":
            for ended in [k for k in unknown_since if _concerns(operation, k)]:
                del unknown_since[ended]
        if operation.kind == "keepalive" and operation.status == "ok":
            _renewed(operation, [hold for k, hold in current.items() if k[1] == key[1]], slack_ms)
        if operation.kind != "acquire":
            continue
        held = current.get(key)
        if operation.status == "unknown":
            unknown_since.setdefault(key, operation.invoked_us)
        if operation.status == "unknown" and held is not None:
            # A conversion that may or may not have happened: the old hold is no longer certain.
            held.end_us = min(held.end_us, operation.invoked_us)
            del current[key]
        if operation.status != "ok" or operation.completed_us is None:
            continue
        hold = _hold(operation, slack_ms)
        hold.since_us = unknown_since.pop(key, hold.since_us)
        if held is not None and (held.kind, held.token) == (hold.kind, hold.token):
            held.end_us = max(held.end_us, hold.end_us)  # acquired again: one hold, a later lease
            continue
        if held is not None:
            held.end_us = min(held.end_us, operation.invoked_us)
        current[key] = hold
        holds.append(hold)
    return holds


def _concerns(operation: Operation, hold_key: tuple[str, str]) -> bool:
    lock, client = hold_key
    if operation.kind == "force_release":  # by an operator, of everybody's hold
        return lock == operation.key
    return client == operation.process and operation.key in ("", lock)


def _renewed(operation: Operation, held: list[Hold], slack_ms: float) -> None:
    """A keepalive that was answered renews what the client certainly still held when it asked."""
    ttl_ms = (operation.argument or {}).get("ttl_ms")
    for hold in held:
        if hold.end_us == FOREVER or hold.end_us <= operation.invoked_us:
            continue
        own_ms = ttl_ms if ttl_ms is not None else hold.acquire.argument["ttl_ms"]
        end_us = operation.invoked_us + round((own_ms - slack_ms) * 1000)
        hold.end_us = max(hold.end_us, end_us)


def _hold(operation: Operation, slack_ms: float) -> Hold:
    argument: dict[str, Any] = operation.argument or {}
    ttl_ms = argument.get("ttl_ms")
    lease_us = FOREVER if ttl_ms is None else round((ttl_ms - slack_ms) * 1000)
    assert operation.completed_us is not None
    return Hold(
        lock=operation.key,
        client=operation.process,
        kind=argument.get("type", "exclusive"),
        permits=argument.get("permits", 1),
        limit=argument.get("limit", 1),
        token=operation.result,
        start_us=operation.completed_us,
        end_us=min(operation.invoked_us + lease_us, FOREVER),
        acquire=operation,
        since_us=operation.invoked_us,
    )


def _tokens(holds: list[Hold]) -> Verdict | None:
    """A grant that began after another was answered has the greater token."""
    owners: dict[int, Hold] = {}
    for hold in holds:
        other = owners.setdefault(hold.token, hold)
        if other is not hold and not _one_grant(other, hold):
            return Verdict(
                False, f"fencing token {hold.token} given twice", (other.acquire, hold.acquire)
            )
    answered = sorted(holds, key=lambda hold: hold.start_us)
    greatest: Hold | None = None
    at = 0
    for hold in sorted(holds, key=lambda hold: hold.since_us):
        while at < len(answered) and answered[at].start_us < hold.since_us:
            if greatest is None or answered[at].token > greatest.token:
                greatest = answered[at]
            at += 1
        if greatest is not None and hold.token < greatest.token:
            return Verdict(
                False,
                f"fencing token {hold.token} after {greatest.token} was answered",
                (greatest.acquire, hold.acquire),
            )
    return None


def _one_grant(one: Hold, other: Hold) -> bool:
    if one.client != other.client:
        return False
    together = (one.acquire.argument or {}).get("together")
    return one.lock == other.lock or (
        together is not None and together == (other.acquire.argument or {}).get("together")
    )


def _overlaps(holds: list[Hold]) -> Verdict | None:
    active: dict[str, list[Hold]] = {}
    for hold in sorted(holds, key=lambda hold: hold.start_us):
        if hold.end_us <= hold.start_us:
            continue
        present = [other for other in active.get(hold.lock, ()) if other.end_us > hold.start_us]
        present = [other for other in present if other.client != hold.client]
        conflict = [other for other in present if _exclude(hold, other)]
        if conflict:
            return Verdict(
                False,
                f"lock {hold.lock!r} held by {conflict[0].client} ({conflict[0].kind}) and "
                f"{hold.client} ({hold.kind}) at once",
                (conflict[0].acquire, hold.acquire),
            )
        if hold.kind == "semaphore":
            used = hold.permits + sum(other.permits for other in present)
            if used > hold.limit:
                window = (*(other.acquire for other in present), hold.acquire)
                return Verdict(
                    False, f"semaphore {hold.lock!r}: {used} permits of {hold.limit} held", window
                )
        active[hold.lock] = [*present, hold]
    return None


def _exclude(one: Hold, other: Hold) -> bool:
    return "exclusive" in (one.kind, other.kind) or one.kind != other.kind
