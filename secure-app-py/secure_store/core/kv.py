"""Keys and their versions. Pure: `plan_*` turn a request into changes, `apply` folds a change.

Version numbers of a key grow by one with each set and are never used twice. A delete is soft: it
marks the newest version, which can be undeleted; `destroy` forgets the value for good. The
*current* version is what a read gives now: the newest one, if it is neither deleted, destroyed nor
expired.
"""

from __future__ import annotations

import msgspec

from secure_store.core.changes import Destroy, MarkDeleted, PutValue

KEPT_VERSIONS = 20


class Version(msgspec.Struct, frozen=True, array_like=True):
    """One version's life. Times are UTC milliseconds; 0: never."""

    number: int
    created_ms: int
    expires_ms: int = 0
    deleted_ms: int = 0
    destroyed: bool = False

    def readable(self, now_ms: int) -> bool:
        """Whether a read may give this version's value."""
        expired = self.expires_ms != 0 and now_ms >= self.expires_ms
        return not (self.deleted_ms or self.destroyed or expired)

    def is_due(self, now_ms: int) -> bool:
        """Whether the value is to be destroyed because its time is over."""
        return self.expires_ms != 0 and not self.destroyed and now_ms >= self.expires_ms


class KeyState(msgspec.Struct, frozen=True, array_like=True):
    """The kept versions of one key, oldest first, at least one."""

    versions: tuple[Version, ...]

    @property
    def newest(self) -> Version:
        return self.versions[-1]

    def find(self, number: int) -> Version | None:
        return next((v for v in self.versions if v.number == number), None)

    @property
    def due_ms(self) -> int:
        """When the first kept value is to be destroyed; 0: none ever."""
        return min(
            (v.expires_ms for v in self.versions if v.expires_ms and not v.destroyed), default=0
        )

    def current(self, now_ms: int) -> int:
        """The version that a read gives now; 0 if it gives none."""
        return self.newest.number if self.newest.readable(now_ms) else 0


class Damaged(Exception):
    """Stored bytes do not open: flipped, swapped or foreign. Never wrong data, always this."""


class Conflict(Exception):
    """`expected_version` is not the current one. `current` says which is (0: none)."""

    def __init__(self, current: int) -> None:
        super().__init__("Version mismatch")
        self.current = current


class Missing(Exception):
    """There is no such key or version to work on."""


def check_version(state: KeyState | None, expected: int | None, now_ms: int) -> None:
    """Raise Conflict unless `expected` (None: anything) is what a read would give now (0:
    nothing)."""
    current = state.current(now_ms) if state is not None else 0
    if expected is not None and expected != current:
        raise Conflict(current)


def plan_set(
    state: KeyState | None,
    key: str,
    value: bytes,
    *,
    expected: int | None,
    ttl_ms: int | None,
    now_ms: int,
) -> PutValue:
    """The change that sets `key`; raises Conflict."""
    check_version(state, expected, now_ms)
    number = state.newest.number + 1 if state is not None else 1
    return PutValue(key, number, value, now_ms, now_ms + ttl_ms if ttl_ms else 0)


def plan_delete(
    state: KeyState | None, key: str, *, expected: int | None, now_ms: int
) -> MarkDeleted:
    """The change that deletes the current version; raises Missing, Conflict."""
    check_version(state, expected, now_ms)
    if state is None or not state.current(now_ms):
        raise Missing
    return MarkDeleted(key, state.newest.number, now_ms)


def plan_undelete(state: KeyState | None, key: str, version: int | None) -> MarkDeleted:
    """The change that brings a soft-deleted version back; raises Missing."""
    found = _find(state, version)
    if not found.deleted_ms or found.destroyed:
        raise Missing
    return MarkDeleted(key, found.number, 0)


def plan_destroy(state: KeyState | None, key: str, version: int | None) -> Destroy:
    """The change that forgets one version's value, or (no version) the whole key; raises
    Missing."""
    found = _find(state, version)
    if version is not None and found.destroyed:
        raise Missing
    return Destroy(key, found.number if version is not None else 0)


def plan_expiry(state: KeyState | None, key: str, version: int, now_ms: int) -> Destroy | None:
    """The change that forgets a version whose time is over; None if it is not (any more) one."""
    found = None if state is None else state.find(version)
    return Destroy(key, version) if found is not None and found.is_due(now_ms) else None


def _find(state: KeyState | None, version: int | None) -> Version:
    found = None if state is None else state.newest if version is None else state.find(version)
    if found is None:
        raise Missing
    return found


KeyChange = PutValue | MarkDeleted | Destroy


def apply(state: KeyState | None, change: KeyChange) -> KeyState | None:
    """The key's state after `change`; None: the key is gone. Versions beyond the kept ones fall
    off."""
    match change:
        case PutValue(_, number, _, created_ms, expires_ms):
            before = state.versions if state is not None else ()
            kept = before[max(0, len(before) + 1 - KEPT_VERSIONS) :]
            return KeyState((*kept, Version(number, created_ms, expires_ms)))
        case MarkDeleted(_, number, deleted_ms):
            return _replace(state, number, deleted_ms=deleted_ms)
        case Destroy(_, 0):
            return None
        case Destroy(_, number):
            return _replace(state, number, destroyed=True)


def _replace(state: KeyState | None, number: int, **fields: object) -> KeyState | None:
    if state is None:
        return None
    return KeyState(
        tuple(
            msgspec.structs.replace(v, **fields) if v.number == number else v
            for v in state.versions
        )
    )
