"""Runs: consecutive puts that share a meta, as one entry of three fields.

Messages that were sent together differ in nothing but their bodies. Stored one by one they cost a
struct, a loop and a look-up each on every node that they pass; as a run, a thousand cost about as
much as one. What is stored means the same in both forms, seq by seq: a `Puts` is short for its
`Put`s, and whatever ends one of them splits nothing, because nobody keeps the run as such.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

from message_queue.core.messages import Entry, Put, Puts

SIZE_BYTES: Final = 4
_SIZES: Final = "I"


def put_entry(seq: int, meta: bytes, bodies: Sequence[bytes]) -> Put | Puts:
    """Stamps the puts of `bodies`, from `seq` on."""
    if len(bodies) == 1:
        return Put(seq, meta, bodies[0])
    sizes = array(_SIZES, map(len, bodies))
    return Puts(seq, meta, _swapped(sizes).tobytes(), b"".join(bodies))


def count(entry: Entry) -> int:
    """How many seqs an entry takes."""
    return len(entry.sizes) // SIZE_BYTES if isinstance(entry, Puts) else 1


def last_seq(entry: Entry) -> int:
    """The seq of an entry's last record."""
    if isinstance(entry, Puts):
        return entry.seq + len(entry.sizes) // SIZE_BYTES - 1
    return entry.seq


def sizes_of(puts: Puts) -> array[int]:
    """Bytes of each body."""
    sizes = array(_SIZES)
    sizes.frombytes(puts.sizes)
    return _swapped(sizes)


def bodies_of(puts: Puts) -> list[bytes]:
    """Each body."""
    sizes, bodies = sizes_of(puts), puts.bodies
    return [bodies[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]


def one_by_one(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The long form: entries of one seq each."""
    for entry in entries:
        if isinstance(entry, Puts):
            for offset, body in enumerate(bodies_of(entry)):
                yield Put(entry.seq + offset, entry.meta, body)
        else:
            yield entry


def well_formed_run(puts: Puts) -> bool:
    """What a peer or a file must send: at least one body, and sizes that add up."""
    sizes = puts.sizes
    return (
        len(sizes) >= SIZE_BYTES
        and len(sizes) % SIZE_BYTES == 0
        and sum(sizes_of(puts)) == len(puts.bodies)
    )


def _swapped(sizes: array[int]) -> array[int]:
    """Little-endian on every machine, as the log and the wire have it."""
    if sys.byteorder == "big":
        sizes.byteswap()
    return sizes
