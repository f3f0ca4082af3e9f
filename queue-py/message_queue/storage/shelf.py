"""The index as a partition's owner sees it: what is known of messages that are not in memory."""

from __future__ import annotations

from array import array

from message_queue.core.delivery.backlog import Card, ShelfPart
from message_queue.core.delivery.stored import PRIORITY_BITS
from message_queue.core.ids import pack_dot
from message_queue.storage.index import BLOCK_BITS, Block, Index

_PRIORITY = (1 << PRIORITY_BITS) - 1


class PartitionShelf:
    """See `core.delivery.backlog.Shelf`."""

    def __init__(self, index: Index, partition: int) -> None:
        self._index = index
        self._partition = partition

    def card(self, dot: int) -> Card | None:
        """Of a stored plain message; None for any other."""
        found = self._index.row(self._partition, dot)
        if found is None:
            return None
        block, at = found
        kind = block.kinds[at]
        if not kind:
            return None
        queue = self._index.names[kind >> PRIORITY_BITS]
        return Card(queue, kind & _PRIORITY, block.sizes[at], block.times[at])

    def sizes(self, first: int, count: int) -> array[int]:
        """Bytes of the bodies of consecutive messages within a chunk; 0 where nothing is known."""
        block = self._index.blocks(self._partition).get(first >> BLOCK_BITS)
        if block is None:
            return array("I", bytes(4 * count))
        row = first & (1 << BLOCK_BITS) - 1
        at = block.find(row)
        if at >= 0 and block.rows[at : at + count] == array("H", range(row, row + count)):
            return block.sizes[at : at + count]
        found = (block.find(low) for low in range(row, row + count))
        return array("I", [block.sizes[at] if at >= 0 else 0 for at in found])

    def part(self, epoch: int, number: int, bits: int) -> ShelfPart:
        """What is known of the messages of one chunk of dots; `bits`: those that are held. Takes
        less than a millisecond, a few microseconds when all are plain and of one queue."""
        base = pack_dot(epoch, number << BLOCK_BITS)
        block = self._index.blocks(self._partition).get(base >> BLOCK_BITS)
        if block is None:
            return ShelfPart(base, (), (), bits)
        kind = block.kinds[0]
        whole = block.live == len(block.rows) and block.bits() == bits
        if kind and whole and len(set(block.kinds)) == 1:
            queue, priority = self._index.names[kind >> PRIORITY_BITS], kind & _PRIORITY
            return ShelfPart(base, ((queue, priority, bits, sum(block.sizes)),), (), 0)
        return self._sorted_out(base, block, bits)

    def _sorted_out(self, base: int, block: Block, bits: int) -> ShelfPart:
        groups: dict[int, tuple[int, int]] = {}
        others: list[tuple[int, bytes, int]] = []
        seen = 0
        for row, kind, size, length in zip(
            block.rows, block.kinds, block.sizes, block.lengths, strict=True
        ):
            bit = 1 << row
            if not length or not bits & bit:
                continue
            seen |= bit
            if kind:
                group, total = groups.get(kind, (0, 0))
                groups[kind] = group | bit, total + size
            else:
                others.append((base + row, (block.extras or {})[row], size))
        names = self._index.names
        plain = tuple(
            (names[kind >> PRIORITY_BITS], kind & _PRIORITY, group, total)
            for kind, (group, total) in groups.items()
        )
        return ShelfPart(base, plain, tuple(others), bits & ~seen)
