"""Message ids: readable, and never mistaken for one another.

`3f-1c2-7-9ad1` is partition 0x3f, epoch 0x1c2, sequence number 7 and a check. The id names its
partition, so any node knows whom to ask; the check tells an id that was issued from one that
somebody made up or mistyped: the causal context also covers records that are no messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

SEQ_BITS = 40
_SEQ_MASK = (1 << SEQ_BITS) - 1
MAX_EPOCH = 1 << 53


class MessageName(NamedTuple):
    """What an id says."""

    partition: int
    dot: int


def pack_dot(epoch: int, seq: int) -> int:
    """A dot as one integer that sorts like (epoch, seq). An epoch has fewer than 2**40 records."""
    return epoch << SEQ_BITS | seq


def unpack_dot(dot: int) -> tuple[int, int]:
    """(epoch, seq) of a packed dot."""
    return dot >> SEQ_BITS, dot & _SEQ_MASK


def message_id(partition: int, dot: int) -> str:
    """The id that clients see."""
    name = f"{partition:x}-{dot >> SEQ_BITS:x}-{dot & _SEQ_MASK:x}"
    return f"{name}-{crc32(name.encode()) & 0xFFFF:04x}"


def message_ids(partition: int, dots: Iterable[int]) -> list[str]:
    """`message_id` of many; what their names begin with is made once an epoch."""
    ids: list[str] = []
    epoch, head, seed = -1, "", 0
    for dot in dots:
        if dot >> SEQ_BITS != epoch:
            epoch = dot >> SEQ_BITS
            head = f"{partition:x}-{epoch:x}-"
            seed = crc32(head.encode())
        seq = b"%x" % (dot & _SEQ_MASK)
        ids.append(f"{head}{seq.decode()}-{crc32(seq, seed) & 0xFFFF:04x}")
    return ids


def parse_id(text: str) -> MessageName | None:
    """What `message_id` gave, or None: such an id was never issued."""
    if len(text) > 64:
        return None
    parts = text.split("-")
    if len(parts) != 4:
        return None
    try:
        partition, epoch, seq = int(parts[0], 16), int(parts[1], 16), int(parts[2], 16)
    except ValueError:
        return None
    if not (0 <= partition < 4096 and 0 < epoch <= MAX_EPOCH and 0 < seq <= _SEQ_MASK):
        return None
    dot = epoch << SEQ_BITS | seq
    # Only one text names it: the canonical one, with its check.
    return MessageName(partition, dot) if message_id(partition, dot) == text else None
