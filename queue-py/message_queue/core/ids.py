"""Message ids: readable, and never mistaken for one another.

`3f-1c2-7-9ad1` is partition 0x3f, epoch 0x1c2, sequence number 7 and a check. The id names its
partition, so any node knows whom to ask; the check tells an id that was issued from one that
somebody made up or mistyped: the causal context also covers records that are no messages.
"""

from __future__ import annotations

from functools import lru_cache
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


@lru_cache(maxsize=1024)
def _head(partition: int, epoch: int) -> tuple[bytes, int]:
    """What the ids of a partition and an epoch begin with, and its CRC."""
    head = b"%x-%x-" % (partition, epoch)
    return head, crc32(head)


@lru_cache(maxsize=1024)
def _known_head(head: str) -> tuple[int, int, int] | None:
    """(partition, epoch, CRC) of what an id begins with; None: no id does."""
    parts = head.split("-")
    if len(parts) != 3:
        return None
    try:
        partition, epoch = int(parts[0], 16), int(parts[1], 16)
    except ValueError:
        return None
    if not (0 <= partition < 4096 and 0 < epoch <= MAX_EPOCH):
        return None
    canonical, seed = _head(partition, epoch)
    return (partition, epoch, seed) if canonical.decode() == head else None


def message_id(partition: int, dot: int) -> str:
    """The id that clients see."""
    return id_bytes(partition, dot).decode()


def id_bytes(partition: int, dot: int) -> bytes:
    """`message_id` as it stands in JSON."""
    head, seed = _head(partition, dot >> SEQ_BITS)
    seq = b"%x" % (dot & _SEQ_MASK)
    return b"%b%b-%04x" % (head, seq, crc32(seq, seed) & 0xFFFF)


def parse_id(text: str) -> MessageName | None:
    """What `message_id` gave, or None: such an id was never issued."""
    if len(text) > 64:
        return None
    cut = text.rfind("-", 0, -5) + 1
    known = _known_head(text[:cut])
    if known is None:
        return None
    partition, epoch, seed = known
    try:
        seq = int(text[cut:-5], 16)
    except ValueError:
        return None
    if not 0 < seq <= _SEQ_MASK:
        return None
    digits = b"%x" % seq
    # Only one text names it: the canonical one, with its check.
    if text[cut:] != f"{digits.decode()}-{crc32(digits, seed) & 0xFFFF:04x}":
        return None
    return MessageName(partition, epoch << SEQ_BITS | seq)
