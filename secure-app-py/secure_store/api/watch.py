"""GET /watch: decided changes under a prefix, as server-sent events, each checked for permission.

The last event of a record carries the record's `id`. A client that comes back with it
(`Last-Event-ID`) gets what came since, from the log, at either node; if that is no longer kept, or
another history has replaced it, it gets an event `lost` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from secure_store.api.streams import Hub, Listener
from secure_store.core.changes import Change, Destroy, MarkDeleted, PutValue
from secure_store.core.records import Position

MAX_WATCHERS = 256
LOST = b"event: lost\ndata: {}\n\n"


class Watcher(Listener):
    """One open stream. `may_read(key)` is asked for every event."""

    def __init__(
        self,
        prefix: str,
        may_read: Callable[[str], bool],
        is_valid: Callable[[], bool],
        expires_ms: int,
    ) -> None:
        super().__init__(is_valid, expires_ms)
        self.prefix = prefix
        self.may_read = may_read

    def visible(self, changes: Iterable[Change], position: Position) -> bytes:
        """One record's events, as this watcher may see them."""
        lines = [
            line
            for change in changes
            if isinstance(change, PutValue | MarkDeleted | Destroy)
            and change.key.startswith(self.prefix)
            and self.may_read(change.key)
            and (line := _event(change))
        ]
        if not lines:
            return b""
        lines[-1] = b"id: %s\n%s" % (event_id(position), lines[-1])
        return b"".join(lines)


def event_id(position: Position) -> bytes:
    """Names a record of one history: 16 digits of its hash go with its number."""
    return b"%d-%s" % (position.seq, position.hash.hex()[:16].encode())


def parse_event_id(text: str) -> tuple[int, str] | None:
    """(seq, the hash's digits); None if it is not one of ours."""
    number, dash, digits = text.partition("-")
    ok = dash and number.isascii() and number.isdigit() and len(number) <= 18 and len(digits) == 16
    return (int(number), digits) if ok else None


def _event(change: PutValue | MarkDeleted | Destroy) -> bytes:
    data: dict[str, object] = {"key": change.key, "version": change.version}
    match change:
        case PutValue():
            kind, data["value"] = b"set", msgspec.Raw(change.value)
        case MarkDeleted():
            kind = b"delete" if change.deleted_ms else b"undelete"
        case Destroy():
            kind = b"destroy"
    return b"event: %s\ndata: %s\n\n" % (kind, msgspec.json.encode(data))


class WatchHub(Hub[Watcher]):
    """Fan-out of decided changes; free when nobody watches."""

    def __init__(self) -> None:
        super().__init__(MAX_WATCHERS)

    def publish(self, changes: tuple[Change, ...], position: Position) -> None:
        for watcher in self.listeners:
            if not watcher.ended and (lines := watcher.visible(changes, position)):
                watcher.put(lines)

    def lost(self) -> None:
        """A snapshot has replaced what was here: nobody knows what changed."""
        for watcher in self.listeners:
            watcher.put(LOST)
