"""Which requests were already answered, and how: what makes a retry harmless (guarantee 5).

Only requests with a `request_id` are here. The answer is kept for RETAIN_MS of cluster time after
it was given; a request that still waits is kept for as long as it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from lock_manager.core.locks.replies import Reply

RETAIN_MS = 600_000
# About 200 bytes each. Beyond that new ids are refused: forgetting an old one early would let a
# retry take effect twice.
MOST = 4_000_000


class Remembered(msgspec.Struct, frozen=True, array_like=True, gc=False):
    fingerprint: bytes
    ticket: int = 0  # it waits on this ticket, and there is no reply yet
    reply: Reply | None = None


def request_key(client_id: str, request_id: str) -> str:
    """One string instead of a pair (half the memory); empty if the request has no id."""
    return f"{len(client_id)}:{client_id}{request_id}" if request_id else ""


class Requests:
    __slots__ = ("_answered", "_by_key")

    def __init__(self) -> None:
        self._by_key: dict[str, Remembered] = {}
        self._answered: deque[tuple[int, str]] = deque()  # (forget at, key), oldest first

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def full(self) -> bool:
        return len(self._by_key) >= MOST

    def get(self, key: str) -> Remembered | None:
        return self._by_key.get(key)

    def waits(self, key: str, fingerprint: bytes, ticket: int) -> None:
        self._by_key[key] = Remembered(fingerprint, ticket)

    def answered(self, key: str, fingerprint: bytes, reply: Reply, now_ms: int) -> None:
        self._by_key[key] = Remembered(fingerprint, 0, reply)
        self._answered.append((now_ms + RETAIN_MS, key))

    def resolved(self, key: str, reply: Reply, now_ms: int) -> None:
        """What waited under `key` is answered."""
        waiting = self._by_key[key]
        self.answered(key, waiting.fingerprint, reply, now_ms)

    def withdrawn(self, key: str) -> None:
        """What waited under `key` was cancelled: as if it had never been asked."""
        del self._by_key[key]

    def forget_until(self, now_ms: int, most: int) -> None:
        """Forgets what is due by then, `most` of it at a time: after a quiet hour it may be
        much."""
        answered = self._answered
        while answered and answered[0][0] <= now_ms and most:
            del self._by_key[answered.popleft()[1]]
            most -= 1

    # ---- for snapshots: rows of (forget at, key, remembered), in order; waiting ones have 0

    def waiting(self, keys: Iterable[str]) -> list[Row]:
        return [(0, key, self._by_key[key]) for key in keys]

    def freeze(self) -> tuple[list[tuple[int, str]], dict[str, Remembered]]:
        """Those that were answered, as they are now. Two shallow copies: some 50 ns each."""
        return list(self._answered), self._by_key.copy()

    def load(self, rows: Iterable[Row]) -> None:
        for until, key, remembered in rows:
            self._by_key[key] = remembered
            if remembered.reply is not None:
                self._answered.append((until, key))


Row = tuple[int, str, Remembered]
