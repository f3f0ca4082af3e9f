"""Message ids: readable, and never mistaken for one another.

`3f-1c2-7-9ad1` is partition 0x3f, epoch 0x1c2, sequence number 7 and a check. The id names its
partition, so any node knows whom to ask; the check tells an id that was issued from one that
somebody made up or mistyped: the causal context also covers records that are no messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple
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


_PAIRS: Final = [b"%02x" % low for low in range(256)]
RUN_AT_LEAST: Final = 16
"""So many ids in a row are made 256 at a time."""


@lru_cache(maxsize=64)
def _ids_in(partition: int, epoch: int, number: int) -> list[bytes]:
    """The ids of the 256 seqs from `number` * 256 on: they differ in two digits and the check."""
    if not number:
        return [id_bytes(partition, pack_dot(epoch, seq)) for seq in range(256)]
    head, seed = _head(partition, epoch)
    stem = b"%x" % number
    base = crc32(stem, seed)
    stem = head + stem
    return [b"%b%b-%04x" % (stem, pair, crc32(pair, base) & 0xFFFF) for pair in _PAIRS]


@lru_cache(maxsize=64)
def _names_in(partition: int, epoch: int, number: int) -> dict[str, MessageName]:
    """`_ids_in`, to be read back."""
    first = pack_dot(epoch, number << 8)
    ids = _ids_in(partition, epoch, number)
    return {
        name.decode(): MessageName(partition, first + low)
        for low, name in enumerate(ids)
        if number or low  # no record has the seq 0
    }


def ids_of(partition: int, first: int, count: int) -> list[bytes]:
    """`id_bytes` of consecutive dots of one epoch."""
    if count < RUN_AT_LEAST:
        return [id_bytes(partition, dot) for dot in range(first, first + count)]
    epoch, seq = unpack_dot(first)
    ids: list[bytes] = []
    while count > 0:
        part = _ids_in(partition, epoch, seq >> 8)[seq & 255 : (seq & 255) + count]
        ids += part
        seq += len(part)
        count -= len(part)
    return ids


def parse_ids(texts: Sequence[str]) -> list[MessageName | None]:
    """`parse_id` of many: mostly neighbours, of which only the first has to be taken apart."""
    if len(texts) < RUN_AT_LEAST:
        return [parse_id(text) for text in texts]
    names: list[MessageName | None] = []
    known: dict[str, MessageName] = {}
    for text in texts:
        name = known.get(text)
        if name is None:
            name = parse_id(text)
            if name is not None:
                epoch, seq = unpack_dot(name.dot)
                known = _names_in(name.partition, epoch, seq >> 8)
        names.append(name)
    return names


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


def delivery_text(partition: int, runs: Iterable[tuple[int, int, int, int]]) -> str:
    """Names a whole delivery, as (first dot, messages, epoch and attempt of the receipt): several
    runs, each of messages of one partition that follow each other."""
    return ".".join([_run_text(partition, *run) for run in runs])


def _run_text(partition: int, first: int, count: int, owner_epoch: int, attempt: int) -> str:
    epoch, seq = unpack_dot(first)
    text = b"%x-%x-%x-%x-%x-%x" % (partition, epoch, seq, count, owner_epoch, attempt)
    return f"{text.decode()}-{crc32(text) & 0xFFFF:04x}"


def parse_delivery(text: str) -> tuple[int, list[tuple[int, int, int, int]]] | None:
    """What `delivery_text` gave: (partition, runs); None: no delivery was ever named so."""
    runs: list[tuple[int, int, int, int]] = []
    partitions: set[int] = set()
    for part in text.split("."):
        fields = part.split("-")
        if len(fields) != 7 or len(part) > 96:
            return None
        try:
            partition, epoch, seq, count, owner_epoch, attempt = (int(f, 16) for f in fields[:6])
        except ValueError:
            return None
        if not (0 <= partition < 4096 and 0 < epoch <= MAX_EPOCH and 0 < owner_epoch <= MAX_EPOCH):
            return None
        if not (seq > 0 and count > 0 and seq + count - 1 <= _SEQ_MASK and attempt > 0):
            return None
        # Only one text names it: the canonical one, with its check.
        if part != _run_text(partition, pack_dot(epoch, seq), count, owner_epoch, attempt):
            return None
        partitions.add(partition)
        runs.append((pack_dot(epoch, seq), count, owner_epoch, attempt))
    return (partitions.pop(), runs) if len(partitions) == 1 else None
