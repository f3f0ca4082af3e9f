"""Segments by number: the names of their files, and places in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


def locate(segment: int, offset: int, length: int) -> int:
    """Segment, byte offset and frame length in one integer (three times smaller than a tuple)."""
    return segment << 64 | offset << 32 | length


def segment_of(locator: int) -> int:
    """The segment that a locator points into."""
    return locator >> 64


def span_of(locator: int) -> tuple[int, int]:
    """(offset, length) of the frame that a locator points at."""
    return locator >> 32 & 0xFFFFFFFF, locator & 0xFFFFFFFF


def segment_path(directory: Path, segment: int) -> Path:
    """The file of a segment."""
    return directory / f"segment-{segment:08d}.log"


def segments_in(directory: Path) -> list[int]:
    """Numbers of the segments in a directory, oldest first."""
    names = (path.stem.removeprefix("segment-") for path in directory.glob("segment-*.log"))
    return sorted(int(name) for name in names if name.isdecimal())


class Mark(NamedTuple):
    """A segment up to some byte: what a snapshot of the index rests on."""

    segment: int
    size: int
    crc: int
    """CRC-32 of the bytes before `size`."""
