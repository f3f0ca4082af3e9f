"""Bodies for a peer that copies a partition."""

from __future__ import annotations

from message_queue.core.messages import Copy, Spans
from message_queue.core.replication.effects import Read
from message_queue.storage.store import Store

DOTS_AT_ONCE = 64


async def read_page(store: Store, read: Read) -> tuple[tuple[Copy, ...], Spans]:
    """From the start of what is wanted as many puts as fit, in order, and those on the way that are
    unreadable. Raises OSError."""
    found: list[Copy] = []
    unreadable: list[tuple[int, int, int]] = []
    size = 0
    for epoch, first, last in read.wanted:
        for start in range(first, last + 1, DOTS_AT_ONCE):
            dots = [(epoch, seq) for seq in range(start, min(start + DOTS_AT_ONCE, last + 1))]
            bodies, damaged = await store.read(read.partition, dots)
            found += [Copy(*body) for body in bodies]
            unreadable += [(e, s, s) for e, s in damaged]
            size += sum(len(meta) + len(body) for _, _, meta, body in bodies)
            if size >= read.max_bytes:
                break
        if size >= read.max_bytes:
            break
    found.sort(key=lambda copy: (copy.epoch, copy.seq))
    return tuple(found), tuple(sorted(unreadable))
