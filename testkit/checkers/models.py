"""Sequential specifications for the linearizability checker: one small state machine per key.

A model answers: from this state, may this operation happen (with the result it showed), and what
state follows? A completed operation is compared with what it returned; one of unknown outcome is
only applied. States are hashable; argument and result are plain JSON values.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from testkit.history import Operation


class _Illegal:
    def __repr__(self) -> str:
        return "ILLEGAL"


ILLEGAL: Final = _Illegal()


class Model(Protocol):
    """A sequential object."""

    def initial(self) -> Hashable:
        """The state of a key that nobody touched."""

    def step(self, state: Any, operation: Operation) -> Hashable | _Illegal:
        """The state after `operation`, or ILLEGAL if it cannot have shown what it did."""

    def is_read(self, operation: Operation) -> bool:
        """True if the operation never changes the state."""


def freeze(value: Any) -> Hashable:
    """A hashable stand-in for a JSON value, equal exactly when the values are (1 is not True)."""
    match value:
        case bool():
            return ("bool", value)
        case dict():
            return ("dict", tuple(sorted((key, freeze(item)) for key, item in value.items())))
        case list() | tuple():
            return ("list", *(freeze(item) for item in value))
        case _:
            return value  # type: ignore[no-any-return]  # str, int, float, None are hashable


@dataclass(frozen=True, slots=True)
class Register:
    """read -> value (None: absent), write v, delete, cas (expected, new) -> bool, incr by -> value.

    A `read`, `cas` or `incr` that completed must carry its result. A stored null counts as absent;
    use VersionedRegister where the difference matters.
    """

    default: Any = None

    def initial(self) -> Hashable:
        return freeze(self.default)

    def is_read(self, operation: Operation) -> bool:
        return operation.kind == "read" or (
            operation.kind == "cas" and operation.status == "ok" and operation.result is False
        )

    def step(self, state: Any, operation: Operation) -> Hashable | _Illegal:
        known = operation.status == "ok"
        match operation.kind:
            case "read":
                return ILLEGAL if known and freeze(operation.result) != state else state
            case "write":
                return freeze(operation.argument)
            case "delete":
                return None
            case "cas":
                expected, new = operation.argument
                swapped = freeze(expected) == state
                if known and operation.result is not swapped:
                    return ILLEGAL
                return freeze(new) if swapped else state
            case "incr":
                total = (state or 0) + operation.argument
                return ILLEGAL if known and operation.result != total else total
            case kind:
                raise ValueError(f"a register knows no {kind!r}")


@dataclass(frozen=True, slots=True)
class VersionedRegister:
    """A register whose every change gets a version, greater than all before it.

    read -> {"value", "version"} or None (absent); write v -> version; delete -> anything;
    cas {"expected_version", "value"} -> version, or False if it did not match (0 = absent);
    incr by -> {"value", "version"}. A result of None from write, cas or incr is compared loosely.
    The version that an unknown write got is learnt from whoever sees it first.
    """

    def initial(self) -> Hashable:
        return (None, 0, 0)  # value, its version (0: absent, -1: not learnt), greatest version

    def is_read(self, operation: Operation) -> bool:
        return operation.kind == "read" or (
            operation.kind == "cas" and operation.status == "ok" and operation.result is False
        )

    def step(self, state: Any, operation: Operation) -> Hashable | _Illegal:
        value, version, greatest = state
        known = operation.status == "ok"
        result = operation.result
        match operation.kind:
            case "read":
                if not known:
                    return state  # type: ignore[no-any-return]  # a tuple, by construction
                if result is None:
                    return state if version == 0 else ILLEGAL
                if freeze(result["value"]) != value or version == 0:
                    return ILLEGAL
                return _learn(state, result["version"])
            case "write":
                return _changed(freeze(operation.argument), greatest, result if known else None)
            case "delete":
                return (None, 0, greatest)
            case "cas":
                wanted = operation.argument["expected_version"]
                new = freeze(operation.argument["value"])
                if known and result is False:
                    return ILLEGAL if version == wanted else state
                # An unlearnt version may be the wanted one, if that is above all known ones.
                matches = version == wanted or (version == -1 and wanted > greatest)
                if matches:
                    return _changed(new, max(greatest, wanted), result if known else None)
                return ILLEGAL if known else state
            case "incr":
                total = (value or 0) + operation.argument
                if known and result is not None and result["value"] != total:
                    return ILLEGAL
                return _changed(total, greatest, result["version"] if known and result else None)
            case kind:
                raise ValueError(f"a versioned register knows no {kind!r}")


def _learn(state: tuple[Any, int, int], seen: int) -> Hashable | _Illegal:
    value, version, greatest = state
    if version == seen:
        return state
    if version == -1 and seen > greatest:
        return (value, seen, seen)
    return ILLEGAL


def _changed(value: Hashable, greatest: int, seen: int | None) -> Hashable | _Illegal:
    if seen is None:
        return (value, -1, greatest)
    return (value, seen, seen) if seen > greatest else ILLEGAL


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock with fencing tokens: exclusive, shared and semaphore holds of one name.

    acquire {"type": exclusive|shared|semaphore, "permits": n, "limit": m} -> token; release
    {"token"?} -> True, or False (not held); both by `operation.process`. read -> {holder: token}.
    Tokens of a lock grow with every grant; acquiring again what one holds keeps its token. For
    leases, waiting and tokens across locks use `checkers.locks`, which judges by time.
    """

    def initial(self) -> Hashable:
        return ((), 0)  # holds (client, type, permits, limit, token), greatest token

    def is_read(self, operation: Operation) -> bool:
        return operation.kind == "read" or (
            operation.kind == "release" and operation.status == "ok" and operation.result is False
        )

    def step(self, state: Any, operation: Operation) -> Hashable | _Illegal:
        holds, greatest = state
        client = operation.process
        mine = [hold for hold in holds if hold[0] == client]
        others = [hold for hold in holds if hold[0] != client]
        known = operation.status == "ok"
        match operation.kind:
            case "acquire":
                argument = operation.argument or {}
                wanted = (
                    argument.get("type", "exclusive"),
                    argument.get("permits", 1),
                    argument.get("limit", 1),
                )
                token = operation.result if known else None
                if mine and mine[0][1:4] == wanted:
                    if token is None or token == mine[0][4]:
                        return state  # type: ignore[no-any-return]  # a tuple, by construction
                    if mine[0][4] != -1:
                        return ILLEGAL
                    held = tuple(sorted([*others, (client, *wanted, token)]))  # learnt only now
                    return (held, max(token, greatest))
                if not _compatible(wanted, others):
                    return ILLEGAL if known else state
                if token is not None and token <= greatest:
                    return ILLEGAL
                held = tuple(sorted([*others, (client, *wanted, token or -1)]))
                return (held, token or greatest)
            case "release":
                if known and operation.result is False:
                    return ILLEGAL if mine else state
                if known and not mine:
                    return ILLEGAL
                return (tuple(others), greatest)
            case "read":
                return _seen(state, operation.result) if known else state
            case kind:
                raise ValueError(f"a lock knows no {kind!r}")


def _seen(state: Any, holders: dict[str, int]) -> Hashable | _Illegal:
    """The state after somebody saw exactly these holders; a token may be learnt only now."""
    holds, greatest = state
    if {hold[0] for hold in holds} != holders.keys():
        return ILLEGAL
    if any(hold[4] not in (-1, holders[hold[0]]) for hold in holds):
        return ILLEGAL
    learnt = tuple((*hold[:4], holders[hold[0]]) for hold in holds)
    return (learnt, max(greatest, *holders.values(), 0))


def _compatible(wanted: tuple[str, int, int], others: list[tuple[Any, ...]]) -> bool:
    kind, permits, limit = wanted
    if not others:
        return permits <= limit
    if kind == "exclusive" or any(hold[1] != kind for hold in others):
        return False
    if kind == "shared":
        return True
    return all(hold[3] == limit for hold in others) and (
        permits + sum(hold[2] for hold in others) <= limit
    )
