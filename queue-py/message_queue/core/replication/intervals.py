"""Sets of dots that are nearly contiguous: what a node has verified, epoch by epoch.

One sorted list of [first, last] per epoch. Records come in order, so almost every addition extends
the last interval; holes come from lost frames and close again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter

from message_queue.core.messages import Span, Spans
from message_queue.core.replication.dots import gaps

_first = itemgetter(0)


class Intervals:
    """A mutable set of dots, kept as intervals. Nothing is ever removed but by ``remove``."""

    __slots__ = ("_epochs",)

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._epochs: dict[int, list[list[int]]] = {}
        for epoch, first, last in spans:
            self.add(epoch, first, last)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervals) and self.spans() == other.spans()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Intervals({self.spans()!r})"

    def has(self, epoch: int, seq: int) -> bool:
        runs = self._epochs.get(epoch)
        if not runs:
            return False
        at = bisect_right(runs, seq, key=_first) - 1
        return at >= 0 and seq <= runs[at][1]

    def add(self, epoch: int, first: int, last: int) -> None:
        """Covers first..last."""
        runs = self._epochs.get(epoch)
        if runs is None:
            self._epochs[epoch] = [[first, last]]
            return
        tail = runs[-1]
        if first == tail[1] + 1:
            tail[1] = last
            return
        low = bisect_right(runs, first, key=_first)
        if low and runs[low - 1][1] >= first - 1:
            low -= 1
        high = bisect_right(runs, last + 1, key=_first)
        if low < high:
            first = min(first, runs[low][0])
            last = max(last, runs[high - 1][1])
        runs[low:high] = [[first, last]]

    def remove(self, epoch: int, first: int, last: int) -> None:
        """Uncovers first..last: what was found unreadable is no longer known."""
        runs = self._epochs.get(epoch)
        if runs is None:
            return
        left: list[list[int]] = []
        for low, high in runs:
            if high < first or low > last:
                left.append([low, high])
                continue
            if low < first:
                left.append([low, first - 1])
            if high > last:
                left.append([last + 1, high])
        if left:
            self._epochs[epoch] = left
        else:
            del self._epochs[epoch]

    def within(self, span: Span) -> Spans:
        """The parts of a span that are covered."""
        epoch, first, last = span
        runs = self._epochs.get(epoch)
        if not runs:
            return ()
        out: list[Span] = []
        at = max(bisect_right(runs, first, key=_first) - 1, 0)
        while at < len(runs) and runs[at][0] <= last:
            low, high = runs[at]
            if high >= first:
                out.append((epoch, max(low, first), min(high, last)))
            at += 1
        return tuple(out)

    def without(self, span: Span) -> Spans:
        """The parts of a span that are not covered."""
        epoch, first, _ = span
        runs = self._epochs.get(epoch)
        if not runs or first > runs[-1][1]:
            return (span,)
        return tuple(gaps(span, self.within(span)))

    def update(self, other: Intervals) -> None:
        for epoch, runs in other._epochs.items():
            for first, last in runs:
                self.add(epoch, first, last)

    def spans(self) -> Spans:
        return tuple(
            (epoch, first, last)
            for epoch in sorted(self._epochs)
            for first, last in self._epochs[epoch]
        )

    def contiguous(self, epoch: int) -> int:
        """The largest n such that 1..n are all covered; 0 if none."""
        runs = self._epochs.get(epoch)
        return runs[0][1] if runs and runs[0][0] == 1 else 0

    def last(self, epoch: int) -> int:
        """The highest seq covered; 0 if none."""
        runs = self._epochs.get(epoch)
        return runs[-1][1] if runs else 0
