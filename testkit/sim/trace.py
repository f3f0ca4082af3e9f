"""The last events of a run, kept unformatted (a run that passes never pays for their text)."""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

Event = tuple[int, str, tuple[Any, ...]]


def render(event: Event) -> str:
    """One line: time in ms, kind, details."""
    at_us, kind, details = event
    text = " ".join(detail if isinstance(detail, str) else repr(detail) for detail in details)
    return f"{at_us / 1000:12.3f} {kind:<10} {text}"


class Trace:
    """A ring of events; `verbose` prints each at once, `fingerprint` sums up all of them."""

    __slots__ = ("_ring", "_sum", "fingerprinting", "verbose")

    def __init__(
        self, capacity: int = 120, *, verbose: bool = False, fingerprint: bool = False
    ) -> None:
        self._ring: deque[Event] = deque(maxlen=capacity)
        self._sum = 0
        self.verbose = verbose
        self.fingerprinting = fingerprint

    def add(self, at_us: int, kind: str, *details: Any) -> None:
        event = (at_us, kind, details)
        self._ring.append(event)
        if self.verbose or self.fingerprinting:
            line = render(event)
            if self.verbose:
                print(line, flush=True)
            if self.fingerprinting:
                self._sum = zlib.crc32(line.encode(), self._sum)

    @property
    def fingerprint(self) -> int:
        """A checksum of every line so far (0 unless fingerprinting)."""
        return self._sum

    def tail(self) -> str:
        """The remembered events as text."""
        return "\n".join(render(event) for event in self._ring)
