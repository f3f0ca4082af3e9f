"""Sets of dots (epoch, seq), small in memory and O(1) to change.

``DotSet`` keeps, per epoch, chunks of 1,024 seqs as one int each. A run of consecutive seqs costs
a bit a dot, an empty chunk nothing; adding or removing one dot copies 128 bytes. Intervals alone
would be smaller while consumers ack in order, and would fragment (and cost a search) when they
don't; a Python set would cost 60 bytes a dot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from message_queue.core.ids import unpack_dot
from message_queue.core.messages import Chunk, Chunks, Span, Spans

CHUNK = 1024
FULL = (1 << CHUNK) - 1


def mask(low: int, high: int) -> int:
    """The bits low..high of a chunk, both included."""
    return ((1 << (high - low + 1)) - 1) << low


class DotSet:
    """A mutable set of dots. ``len`` is kept; iteration is sorted."""

    __slots__ = ("_count", "_epochs")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._epochs: dict[int, dict[int, int]] = {}
        self._count = 0
        for epoch, first, last in spans:
            self.add_range(epoch, first, last)

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DotSet) and self._epochs == other._epochs

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"DotSet({self.spans()!r})"

    def has(self, epoch: int, seq: int) -> bool:
        chunks = self._epochs.get(epoch)
        if chunks is None:
            return False
        return bool(chunks.get(seq >> 10, 0) >> (seq & 1023) & 1)

    def covers(self, epoch: int, first: int, last: int) -> bool:
        """Whether all of first..last are here. O(chunks)."""
        chunks = self._epochs.get(epoch)
        if chunks is None:
            return False
        for number in range(first >> 10, (last >> 10) + 1):
            base = number << 10
            wanted = mask(max(first - base, 0), min(last - base, CHUNK - 1))
            if chunks.get(number, 0) & wanted != wanted:
                return False
        return True

    def add(self, epoch: int, seq: int) -> bool:
        """True if it was not there."""
        chunks = self._epochs.get(epoch)
        if chunks is None:
            chunks = self._epochs[epoch] = {}
        number = seq >> 10
        bits = chunks.get(number, 0)
        bit = 1 << (seq & 1023)
        if bits & bit:
            return False
        chunks[number] = bits | bit
        self._count += 1
        return True

    def discard(self, epoch: int, seq: int) -> bool:
        """True if it was there."""
        chunks = self._epochs.get(epoch)
        if chunks is None:
            return False
        number = seq >> 10
        bits = chunks.get(number, 0)
        bit = 1 << (seq & 1023)
        if not bits & bit:
            return False
        self._count -= 1
        self._store(epoch, chunks, number, bits ^ bit)
        return True

    def _store(self, epoch: int, chunks: dict[int, int], number: int, bits: int) -> None:
        if bits:
            chunks[number] = bits
            return
        chunks.pop(number, None)
        if not chunks:
            self._epochs.pop(epoch, None)

    def add_range(self, epoch: int, first: int, last: int) -> None:
        chunks = self._epochs.setdefault(epoch, {})
        for number in range(first >> 10, (last >> 10) + 1):
            base = number << 10
            wanted = mask(max(first - base, 0), min(last - base, CHUNK - 1))
            bits = chunks.get(number, 0)
            self._count += (wanted & ~bits).bit_count()
            chunks[number] = bits | wanted

    def remove_range(self, epoch: int, first: int, last: int) -> Spans:
        """What was there and is no longer."""
        chunks = self._epochs.get(epoch)
        if chunks is None:
            return ()
        gone: list[Span] = []
        for number in self._numbers(chunks, first, last):
            bits = chunks.get(number, 0)
            base = number << 10
            hit = bits & mask(max(first - base, 0), min(last - base, CHUNK - 1))
            if hit:
                gone.extend(runs_in(epoch, base, hit))
                self._count -= hit.bit_count()
                self._store(epoch, chunks, number, bits ^ hit)
        return joined(gone)

    @staticmethod
    def _numbers(chunks: dict[int, int], first: int, last: int) -> Iterable[int]:
        """The chunks that first..last may touch. A hostile span may be astronomically wide: never
        walk more chunks than there are."""
        low, high = first >> 10, last >> 10
        if high - low < len(chunks):
            return range(low, high + 1)
        return sorted(number for number in chunks if low <= number <= high)

    def within(self, span: Span) -> Spans:
        """The parts of a span that are here."""
        epoch, first, last = span
        chunks = self._epochs.get(epoch)
        if chunks is None:
            return ()
        out: list[Span] = []
        for number in self._numbers(chunks, first, last):
            base = number << 10
            hit = chunks.get(number, 0) & mask(max(first - base, 0), min(last - base, CHUNK - 1))
            out.extend(runs_in(epoch, base, hit))
        return joined(out)

    def outside(self, spans: Spans) -> Spans:
        """The parts of some spans that are not here."""
        return tuple(gap for span in spans for gap in gaps(span, self.within(span)))

    def runs(self) -> Iterator[Span]:
        """The spans of consecutive dots, one by one: sorted, disjoint, not touching."""
        held: Span | None = None
        for epoch in sorted(self._epochs):
            chunks = self._epochs[epoch]
            for number in sorted(chunks):
                for run in runs_in(epoch, number << 10, chunks[number]):
                    if held is not None and held[0] == epoch and held[2] + 1 == run[1]:
                        held = (epoch, held[1], run[2])
                        continue
                    if held is not None:
                        yield held
                    held = run
        if held is not None:
            yield held

    def spans(self) -> Spans:
        """All of ``runs``."""
        return tuple(self.runs())

    def first(self, most: int) -> list[tuple[int, int]]:
        """Up to ``most`` of the smallest dots. O(chunks + most)."""
        found: list[tuple[int, int]] = []
        for epoch in sorted(self._epochs):
            chunks = self._epochs[epoch]
            for number in sorted(chunks):
                found += islice(_dots_in(epoch, number << 10, chunks[number]), most - len(found))
                if len(found) >= most:
                    return found
        return found

    def after(self, epoch: int, seq: int, most: int) -> list[Span]:
        """Up to ``most`` of the smallest dots behind one: as spans, in order. O(chunks)."""
        found: list[Span] = []
        for e in sorted(at for at in self._epochs if at >= epoch):
            low = seq + 1 if e == epoch else 0
            chunks = self._epochs[e]
            for number in sorted(number for number in chunks if number >= low >> 10):
                base = number << 10
                bits = chunks[number] & ~((1 << max(0, low - base)) - 1)
                for _, first, last in runs_in(e, base, bits):
                    last = min(last, first + most - 1)
                    found.append((e, first, last))
                    most -= last - first + 1
                    if not most:
                        return found
        return found

    def take_first(self, most: int, below: tuple[int, int] | None = None) -> list[Span]:
        """Take out up to ``most`` of the smallest dots, only those smaller than ``below``: as
        spans, in order."""
        taken: list[Span] = []
        while most and self._epochs:
            epoch = min(self._epochs)
            chunks = self._epochs[epoch]
            number = min(chunks)
            bits = chunks[number]
            _, first, last = next(runs_in(epoch, number << 10, bits))
            last = min(last, first + most - 1)
            if below is not None:
                if (epoch, first) >= below:
                    break
                if epoch == below[0]:
                    last = min(last, below[1] - 1)
            gone = mask(first & 1023, last & 1023)
            self._store(epoch, chunks, number, bits ^ gone)
            most -= last - first + 1
            self._count -= last - first + 1
            taken.append((epoch, first, last))
        return taken

    def add_chunk(self, dot: int, bits: int) -> None:
        """The chunk that begins at a packed dot, as ``chunk`` gives it."""
        epoch, seq = unpack_dot(dot)
        chunks = self._epochs.setdefault(epoch, {})
        old = chunks.get(seq >> 10, 0)
        self._count += (bits & ~old).bit_count()
        chunks[seq >> 10] = old | bits

    def chunk(self, dot: int) -> int:
        """The bits of the chunk that begins at a packed dot."""
        epoch, seq = unpack_dot(dot)
        return self._epochs.get(epoch, {}).get(seq >> 10, 0)

    def numbered(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, number, bits) of every chunk, in order."""
        for epoch in sorted(self._epochs):
            for number, bits in sorted(self._epochs[epoch].items()):
                yield epoch, number, bits

    def chunks(self) -> Chunks:
        """The wire form that stays small whatever was removed."""
        return tuple(
            (epoch, number, bits.to_bytes((bits.bit_length() + 7) >> 3, "little"))
            for epoch in sorted(self._epochs)
            for number, bits in sorted(self._epochs[epoch].items())
        )

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> DotSet:
        """The set that ``chunks`` gave."""
        dots = cls()
        for epoch, number, raw in chunks:
            bits = int.from_bytes(raw, "little")
            dots._epochs.setdefault(epoch, {})[number] = bits
            dots._count += bits.bit_count()
        return dots

    def dots(self) -> Iterator[tuple[int, int]]:
        for epoch, first, last in self.runs():
            for seq in range(first, last + 1):
                yield epoch, seq

    def copy(self) -> DotSet:
        twin = DotSet()
        twin._epochs = {epoch: dict(chunks) for epoch, chunks in self._epochs.items()}
        twin._count = self._count
        return twin

    def update(self, other: DotSet) -> None:
        for epoch, chunks in other._epochs.items():
            mine = self._epochs.setdefault(epoch, {})
            for number, bits in chunks.items():
                old = mine.get(number, 0)
                self._count += (bits & ~old).bit_count()
                mine[number] = old | bits

    def minus(self, other: DotSet) -> DotSet:
        """A new set: what is here and not in the other."""
        out = DotSet()
        for epoch, chunks in self._epochs.items():
            theirs = other._epochs.get(epoch, {})
            kept = {
                number: left
                for number, bits in chunks.items()
                if (left := bits & ~theirs.get(number, 0))
            }
            if kept:
                out._epochs[epoch] = kept
                out._count += sum(bits.bit_count() for bits in kept.values())
        return out

    def common(self, other: DotSet) -> DotSet:
        """A new set: what is in both."""
        return self.minus(self.minus(other))


def _dots_in(epoch: int, base: int, bits: int) -> Iterator[tuple[int, int]]:
    for _, first, last in runs_in(epoch, base, bits):
        for seq in range(first, last + 1):
            yield epoch, seq


def runs_in(epoch: int, base: int, bits: int) -> Iterator[Span]:
    """The runs of ones in a chunk, lowest first."""
    while bits:
        low = (bits & -bits).bit_length() - 1
        rest = bits >> low
        length = (~rest & (rest + 1)).bit_length() - 1
        yield epoch, base + low, base + low + length - 1
        bits = (rest >> length) << (low + length)


def joined(spans: Iterable[Span]) -> Spans:
    """Sorted spans with touching neighbours made one."""
    out: list[Span] = []
    for epoch, first, last in spans:
        if out and out[-1][0] == epoch and out[-1][2] + 1 == first:
            out[-1] = (epoch, out[-1][1], last)
        else:
            out.append((epoch, first, last))
    return tuple(out)


def gaps(span: Span, inside: Spans) -> Iterator[Span]:
    """The parts of a span that are not among these spans, which lie inside it and are sorted."""
    epoch, at, last = span
    for _, low, high in inside:
        if low > at:
            yield epoch, at, low - 1
        at = high + 1
    if at <= last:
        yield epoch, at, last


def well_formed(spans: Spans) -> bool:
    """Sorted, disjoint, first <= last, seqs from 1: what a peer or a file must send."""
    epoch, last = 0, 0
    for e, f, t in spans:
        if f < 1 or t < f or e < epoch or (e == epoch and f <= last):
            return False
        epoch, last = e, t
    return True


def well_formed_chunks(chunks: Chunks) -> bool:
    """Sorted, no chunk twice, none empty, seqs from 1."""
    before = (0, -1)
    for epoch, number, raw in chunks:
        if (epoch, number) <= before or not raw[-1] or (number == 0 and raw[0] & 1):
            return False
        before = (epoch, number)
    return True
