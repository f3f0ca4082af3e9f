"""Brute force: how many invalid tokens an address may send before it must wait."""

from __future__ import annotations

from collections import OrderedDict, deque

MAX_INVALID = 20
WINDOW_MS = 10_000
MAX_ADDRESSES = 10_000


class Limiter:
    """A sliding window per address. Bounded: the addresses seen longest ago are forgotten first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, deque[int]] = OrderedDict()

    def invalid(self, address: str, now_ms: int) -> int:
        """Count an invalid token; 0, or how many ms to wait if there were too many."""
        times = self._seen.setdefault(address, deque(maxlen=MAX_INVALID))
        self._seen.move_to_end(address)
        while len(self._seen) > MAX_ADDRESSES:
            self._seen.popitem(last=False)
        while times and now_ms - times[0] >= WINDOW_MS:
            times.popleft()
        if len(times) == MAX_INVALID:
            return max(1, WINDOW_MS - (now_ms - times[0]))
        times.append(now_ms)
        return 0
