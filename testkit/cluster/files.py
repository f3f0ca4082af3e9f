"""What disks do to files between two lives of a node: cut tails, flipped bits, no room left."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Final

CAN_LIMIT: Final = sys.platform == "linux"


def cut_tail(path: Path, count: int) -> None:
    """Remove the last `count` bytes (all of them if there are fewer)."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(max(0, size - count))


def flip_bit(path: Path, seed: int, start: int = 0, end: int | None = None) -> int:
    """Flip one bit between the offsets `start` and `end`; the offset of its byte."""
    size = path.stat().st_size if end is None else end
    rng = Random(seed)
    at = rng.randrange(start, size)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return at


def limit_file_size(pid: int, limit_bytes: int | None) -> None:
    """Let a running process write no file beyond `limit_bytes` (None: lift it); Linux only.

    Its writes fail with EFBIG, which stands for a full disk without needing root or a tmpfs.
    """
    if sys.platform != "linux":
        raise NotImplementedError("prlimit is Linux's")
    import resource  # absent on Windows

    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    soft = hard if limit_bytes is None else limit_bytes
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
