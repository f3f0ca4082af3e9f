"""Where every needed body lies, and what a takeover must know of it: (partition, dot) -> place.

Only puts that the replication still needs are in here (held, staged or copied). A million of them
must fit beside everything else, so there is no object per put: blocks of at most 1,024 consecutive
seqs keep columns (`array`), 30 bytes a put. Whatever a plain message does not need (group, delay,
ttl, a dedupe mark) is an `extra`, a few bytes in a dict; headers and bodies are read from the
segment when somebody asks for them.

How many live bytes a segment holds decides when it can be rewritten or deleted.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from message_queue.core.delivery.stored import PRIORITY_BITS, Plain, digest
from message_queue.core.ids import SEQ_BITS
from message_queue.core.messages import Spans

BLOCK_BITS: Final = 10
BLOCK: Final = 1 << BLOCK_BITS
_LOW: Final = BLOCK - 1
_PRIORITY: Final = (1 << PRIORITY_BITS) - 1
_TRIM_ABOVE: Final = 16
FRAME_BYTES: Final = 64
"""Counted for a put besides its body: its share of the frame, and its meta."""


class Place(NamedTuple):
    """Where a put lies, and what is known of it without reading it."""

    locator: int
    body_bytes: int
    plain: Plain | None
    """A message that waits for nothing: its queue, priority and time. None: see `meta`."""
    meta: bytes
    """Of anything else: its meta without headers and past."""


class Names:
    """Queue names as small numbers, counted: a name that no put uses is forgotten."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names: list[str] = [""]
        self._uses: list[int] = [1]
        self._free: list[int] = []

    def take(self, name: str, times: int = 1) -> int:
        """The number of a name, used once (or several times) more. Never 0."""
        number = self._numbers.get(name)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._names[number] = name
            else:
                number = len(self._names)
                self._names.append(name)
                self._uses.append(0)
            self._numbers[name] = number
        self._uses[number] += times
        return number

    def give_back(self, number: int, times: int = 1) -> None:
        """One use less, or several."""
        self._uses[number] -= times
        if not self._uses[number]:
            del self._numbers[self._names[number]]
            self._names[number] = ""
            self._free.append(number)

    def __getitem__(self, number: int) -> str:
        return self._names[number]

    def __len__(self) -> int:
        return len(self._numbers)


class Block:
    """The puts of up to 1,024 consecutive seqs, as columns sorted by seq. A row whose frame length
    is 0 is dead; rows are moved together when half of them are.

    Invariant: all columns are equally long; `live` rows have a length above 0.
    """

    __slots__ = ("extras", "frames", "kinds", "lengths", "live", "rows", "sizes", "times")

    def __init__(self) -> None:
        self.rows = array("H")
        """Seq within the block."""
        self.frames = array("Q")
        """Segment and offset of the frame."""
        self.lengths = array("I")
        """Of the frame."""
        self.sizes = array("I")
        """Of the body."""
        self.kinds = array("I")
        """Number of the queue's name and priority; 0: the row has an extra."""
        self.times = array("Q")
        """When it was enqueued, in cluster time."""
        self.extras: dict[int, bytes] | None = None
        self.live = 0

    def columns(self) -> tuple[array[int], ...]:
        """All of them, in the order in which a snapshot stores them."""
        return self.rows, self.frames, self.lengths, self.sizes, self.kinds, self.times

    def find(self, row: int) -> int:
        """The position of a row, or -1 (dead rows are found too)."""
        rows = self.rows
        at = bisect_left(rows, row)
        return at if at < len(rows) and rows[at] == row else -1

    def bits(self) -> int:
        """The live rows as bits, lowest first."""
        rows = self.rows
        if self.live == len(rows) == rows[-1] - rows[0] + 1:
            return ((1 << self.live) - 1) << rows[0]
        found = bytearray(BLOCK >> 3)
        for row, length in zip(rows, self.lengths, strict=True):
            if length:
                found[row >> 3] |= 1 << (row & 7)
        return int.from_bytes(found, "little")

    def extend(
        self, row: int, count: int, locator: int, sizes: array[int], kind: int, time: int
    ) -> None:
        """Rows `row`, `row` + 1, ... of one frame, all later than those that are here."""
        self.rows.extend(range(row, row + count))
        self.frames.extend(array("Q", (locator >> 32,)) * count)
        self.lengths.extend(array("I", (locator & 0xFFFFFFFF,)) * count)
        self.sizes.extend(sizes)
        self.kinds.extend(array("I", (kind,)) * count)
        self.times.extend(array("Q", (time,)) * count)
        self.live += count

    def trim(self) -> None:
        """Drop the dead rows. Acks come in order, mostly: then what died lies in front."""
        raw = self.lengths.tobytes()
        dead = (len(raw) - len(raw.lstrip(b"\0"))) // self.lengths.itemsize
        if len(self.lengths) - dead == self.live:
            for column in self.columns():
                del column[:dead]
            return
        kept = [at for at, length in enumerate(self.lengths) if length]
        self.rows = array("H", [self.rows[at] for at in kept])
        self.frames = array("Q", [self.frames[at] for at in kept])
        self.sizes = array("I", [self.sizes[at] for at in kept])
        self.kinds = array("I", [self.kinds[at] for at in kept])
        self.times = array("Q", [self.times[at] for at in kept])
        self.lengths = array("I", [self.lengths[at] for at in kept])


class Live(Struct, gc=False):
    """What a segment holds that is needed."""

    puts: int = 0
    bytes: int = 0


class Index:
    """Invariant: `live[s]` counts the places in segment s; a segment without any has no entry."""

    def __init__(self) -> None:
        self._partitions: dict[int, dict[int, Block]] = {}
        self.names = Names()
        self.live: dict[int, Live] = {}
        self._count = 0
        self.extra_bytes = 0
        """Bytes of all extras."""

    # ── one put ─────────────────────────────────────────────────────────────────────────────────

    def put(self, partition: int, dot: int, locator: int, meta: bytes, body_bytes: int) -> None:
        """A put lies at `locator`; an earlier place of the same dot is superseded. O(1) for one
        that is later than all others, as puts usually are."""
        blocks = self._partitions.get(partition)
        if blocks is None:
            blocks = self._partitions[partition] = {}
        block = blocks.get(dot >> BLOCK_BITS)
        if block is None:
            block = blocks[dot >> BLOCK_BITS] = Block()
        row = dot & _LOW
        card = digest(meta)
        if isinstance(card, Plain):
            kind = self.names.take(card.queue) << PRIORITY_BITS | card.priority
            enqueued_ms = card.enqueued_ms
        else:
            kind = enqueued_ms = 0
        frame, length = locator >> 32, locator & 0xFFFFFFFF
        rows = block.rows
        if not rows or rows[-1] < row:
            rows.append(row)
            block.frames.append(frame)
            block.lengths.append(length)
            block.sizes.append(body_bytes)
            block.kinds.append(kind)
            block.times.append(enqueued_ms)
        else:
            at = bisect_left(rows, row)
            if rows[at] == row:
                self._clear(block, at, row)
                block.frames[at] = frame
                block.lengths[at] = length
                block.sizes[at] = body_bytes
                block.kinds[at] = kind
                block.times[at] = enqueued_ms
            else:
                rows.insert(at, row)
                block.frames.insert(at, frame)
                block.lengths.insert(at, length)
                block.sizes.insert(at, body_bytes)
                block.kinds.insert(at, kind)
                block.times.insert(at, enqueued_ms)
        if not isinstance(card, Plain):
            if block.extras is None:
                block.extras = {}
            block.extras[row] = card
            self.extra_bytes += len(card)
        block.live += 1
        self._count += 1
        live = self.live.get(locator >> 64)
        if live is None:
            live = self.live[locator >> 64] = Live()
        live.puts += 1
        live.bytes += body_bytes + FRAME_BYTES

    def put_run(
        self, partition: int, first: int, locator: int, meta: bytes, sizes: array[int]
    ) -> None:
        """`put` for consecutive dots of one frame that share a meta. Costs little more than one
        when they are plain and later than all others."""
        card = digest(meta) if len(sizes) > 1 else b""
        if not isinstance(card, Plain):
            for offset, size in enumerate(sizes):
                self.put(partition, first + offset, locator, meta, size)
            return
        blocks = self._partitions.setdefault(partition, {})
        at, end = first, first + len(sizes)
        while at < end:
            key, row = at >> BLOCK_BITS, at & _LOW
            count = min(end - at, BLOCK - row)
            part = sizes[at - first : at - first + count]
            block = blocks.get(key)
            if block is None:
                block = blocks[key] = Block()
            if block.rows and block.rows[-1] >= row:
                for offset, size in enumerate(part):
                    self.put(partition, at + offset, locator, meta, size)
            else:
                kind = self.names.take(card.queue, count) << PRIORITY_BITS | card.priority
                block.extend(row, count, locator, part, kind, card.enqueued_ms)
                self._count += count
                live = self.live.setdefault(locator >> 64, Live())
                live.puts += count
                live.bytes += sum(part) + count * FRAME_BYTES
            at += count

    def get(self, partition: int, dot: int) -> Place | None:
        """The place of a put, None when it is not known (or not needed) here."""
        found = self.row(partition, dot)
        if found is None:
            return None
        block, at = found
        return self._place(block, at)

    def locator(self, partition: int, dot: int) -> int | None:
        """Where a put lies, or None."""
        found = self.row(partition, dot)
        if found is None:
            return None
        block, at = found
        return block.frames[at] << 32 | block.lengths[at]

    def locators(self, partition: int, dots: Sequence[int]) -> list[int]:
        """`locator` of many; 0: none."""
        blocks = self._partitions.get(partition, {})
        found: list[int] = []
        key, block = -1, None
        for dot in dots:
            if dot >> BLOCK_BITS != key:
                key = dot >> BLOCK_BITS
                block = blocks.get(key)
            at = block.find(dot & _LOW) if block is not None else -1
            if block is None or at < 0 or not block.lengths[at]:
                found.append(0)
            else:
                found.append(block.frames[at] << 32 | block.lengths[at])
        return found

    def drop(self, partition: int, dot: int) -> None:
        """The put is needed no more."""
        blocks = self._partitions.get(partition)
        block = blocks.get(dot >> BLOCK_BITS) if blocks else None
        if blocks is None or block is None:
            return
        at = block.find(dot & _LOW)
        if at >= 0 and block.lengths[at]:
            self._clear(block, at, dot & _LOW)
            self._tidy(partition, blocks, dot >> BLOCK_BITS, block)

    # ── many puts ───────────────────────────────────────────────────────────────────────────────

    def drop_spans(self, partition: int, spans: Spans) -> None:
        """`drop` for all dots of the spans, however wide a span is."""
        for epoch, first, last in spans:
            blocks = self._partitions.get(partition)
            if not blocks:
                return
            low, high = epoch << SEQ_BITS | first, epoch << SEQ_BITS | last
            if high - low < 4:
                for dot in range(low, high + 1):
                    self.drop(partition, dot)
                continue
            first_key, last_key = low >> BLOCK_BITS, high >> BLOCK_BITS
            if last_key - first_key < len(blocks):
                keys: Sequence[int] = range(first_key, last_key + 1)
            else:
                keys = [key for key in blocks if first_key <= key <= last_key]
            for key in keys:
                block = blocks.get(key)
                if block is None:
                    continue
                base = key << BLOCK_BITS
                start = bisect_left(block.rows, max(low - base, 0))
                end = bisect_right(block.rows, min(high - base, _LOW))
                self._clear_range(block, start, end)
                self._tidy(partition, blocks, key, block)

    def dots(self, partition: int) -> Iterator[int]:
        """The dots that have a place, in order."""
        blocks = self._partitions.get(partition, {})
        for key in sorted(blocks):
            block = blocks[key]
            for row, length in zip(block.rows, block.lengths, strict=True):
                if length:
                    yield key << BLOCK_BITS | row

    def blocks(self, partition: int) -> dict[int, Block]:
        """The blocks of a partition by dot >> BLOCK_BITS. Read only."""
        return self._partitions.get(partition, {})

    def partitions(self) -> list[int]:
        """Partitions that have places."""
        return list(self._partitions)

    def adopt(self, partition: int, key: int, block: Block, names: Mapping[int, str]) -> None:
        """Take over a block of a snapshot, whose kinds refer to its `names`. KeyError when they
        name nothing."""
        renamed = {0: 0}
        for kind, times in _counted(block.kinds):
            if kind:
                number = self.names.take(names[kind >> PRIORITY_BITS], times)
                renamed[kind] = number << PRIORITY_BITS | kind & _PRIORITY
        if any(old != new for old, new in renamed.items()):
            block.kinds = array("I", [renamed[kind] for kind in block.kinds])
        self._partitions.setdefault(partition, {})[key] = block
        self._count += block.live
        self.extra_bytes += sum(map(len, block.extras.values())) if block.extras else 0
        segments = {frame >> 32 for frame in set(block.frames)}
        if len(segments) == 1:
            live = self.live.setdefault(segments.pop(), Live())
            live.puts += block.live
            live.bytes += sum(block.sizes) + block.live * FRAME_BYTES
            return
        for frame, size in zip(block.frames, block.sizes, strict=True):
            live = self.live.setdefault(frame >> 32, Live())
            live.puts += 1
            live.bytes += size + FRAME_BYTES

    def names_in(self, block: Block) -> dict[int, str]:
        """The names that a block's kinds refer to."""
        numbers = {kind >> PRIORITY_BITS for kind in set(block.kinds) if kind}
        return {number: self.names[number] for number in numbers}

    def count(self) -> int:
        """All places."""
        return self._count

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def row(self, partition: int, dot: int) -> tuple[Block, int] | None:
        """The block and position of a put that has a place."""
        blocks = self._partitions.get(partition)
        block = blocks.get(dot >> BLOCK_BITS) if blocks else None
        if block is None:
            return None
        at = block.find(dot & _LOW)
        return (block, at) if at >= 0 and block.lengths[at] else None

    def _place(self, block: Block, at: int) -> Place:
        locator = block.frames[at] << 32 | block.lengths[at]
        kind = block.kinds[at]
        if not kind:
            return Place(locator, block.sizes[at], None, (block.extras or {})[block.rows[at]])
        plain = Plain(self.names[kind >> PRIORITY_BITS], kind & _PRIORITY, block.times[at])
        return Place(locator, block.sizes[at], plain, b"")

    def _clear(self, block: Block, at: int, row: int) -> None:
        """Make a row dead, if it is not."""
        if not block.lengths[at]:
            return
        block.lengths[at] = 0
        block.live -= 1
        self._count -= 1
        kind = block.kinds[at]
        if kind:
            self.names.give_back(kind >> PRIORITY_BITS)
        elif block.extras is not None:
            self.extra_bytes -= len(block.extras.pop(row))
        segment = block.frames[at] >> 32
        live = self.live[segment]
        live.puts -= 1
        live.bytes -= block.sizes[at] + FRAME_BYTES
        block.sizes[at] = 0
        if not live.puts:
            del self.live[segment]

    def _clear_range(self, block: Block, start: int, end: int) -> None:
        """Make all rows at start..end-1 dead; at once when they are plain, of one queue and in one
        segment, as those of a run are."""
        count = end - start
        if count <= 0:
            return
        kinds, lengths = block.kinds[start:end], block.lengths[start:end]
        kind = kinds[0]
        segments = {frame >> 32 for frame in set(block.frames[start:end])}
        if not kind or len(segments) > 1 or kinds.count(kind) < count or lengths.count(0):
            for at in range(start, end):
                self._clear(block, at, block.rows[at])
            return
        segment = segments.pop()
        live = self.live[segment]
        live.puts -= count
        live.bytes -= sum(block.sizes[start:end]) + count * FRAME_BYTES
        if not live.puts:
            del self.live[segment]
        self.names.give_back(kind >> PRIORITY_BITS, count)
        block.lengths[start:end] = block.sizes[start:end] = array("I", bytes(4 * count))
        block.live -= count
        self._count -= count

    def _tidy(self, partition: int, blocks: dict[int, Block], key: int, block: Block) -> None:
        """A block shrank: amortised O(1) for each row that died."""
        if not block.live:
            del blocks[key]
            if not blocks:
                del self._partitions[partition]
        elif len(block.rows) > 2 * block.live + _TRIM_ABOVE:
            block.trim()


def _counted(column: array[int]) -> Iterable[tuple[int, int]]:
    """How often which value is there. Quick when it is one, as in blocks of batches."""
    first = column[0]
    if column.count(first) == len(column):
        return ((first, len(column)),)
    return Counter(column).items()
