"""Where every needed body lies: (partition, dot) -> the frame that holds it, and its meta.

Only puts that the replication still needs are in here (held, staged or copied); how many of them a
segment holds decides when it can be rewritten or deleted.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from message_queue.core.ids import pack_dot
from message_queue.core.messages import Spans
from message_queue.storage.log import segment_of


class Place(Struct, frozen=True, gc=False):
    """Where a put lies. `meta` is kept in memory, so that a takeover reads no bodies."""

    locator: int
    meta: bytes
    body_bytes: int


class Index:
    """Invariant: `live[s]` counts the places in segment s; a segment without any has no entry."""

    def __init__(self) -> None:
        self._partitions: dict[int, dict[int, Place]] = {}
        self.live: dict[int, int] = {}

    def put(self, partition: int, dot: int, place: Place) -> None:
        """A put lies at `place`; an earlier place of the same dot is superseded."""
        places = self._partitions.get(partition)
        if places is None:
            places = self._partitions[partition] = {}
        old = places.get(dot)
        if old is not None:
            self._less(segment_of(old.locator))
        places[dot] = place
        segment = segment_of(place.locator)
        self.live[segment] = self.live.get(segment, 0) + 1

    def get(self, partition: int, dot: int) -> Place | None:
        """The place of a put, None when it is not known (or not needed) here."""
        places = self._partitions.get(partition)
        return places.get(dot) if places else None

    def drop(self, partition: int, dot: int) -> None:
        """The put is needed no more."""
        places = self._partitions.get(partition)
        if places is not None and (place := places.pop(dot, None)) is not None:
            self._less(segment_of(place.locator))

    def drop_spans(self, partition: int, spans: Spans) -> None:
        """`drop` for all dots of the spans, however wide a span is."""
        places = self._partitions.get(partition)
        if not places:
            return
        for epoch, first, last in spans:
            if last - first < len(places):
                for seq in range(first, last + 1):
                    self.drop(partition, pack_dot(epoch, seq))
            else:
                low, high = pack_dot(epoch, first), pack_dot(epoch, last)
                for dot in [d for d in places if low <= d <= high]:
                    self.drop(partition, dot)

    def items(self, partition: int) -> Iterator[tuple[int, Place]]:
        """(dot, place) of a partition in no particular order."""
        return iter(self._partitions.get(partition, {}).items())

    def partitions(self) -> list[int]:
        """Partitions that have places."""
        return list(self._partitions)

    def count(self) -> int:
        """All places."""
        return sum(self.live.values())

    def _less(self, segment: int) -> None:
        left = self.live[segment] - 1
        if left:
            self.live[segment] = left
        else:
            del self.live[segment]
