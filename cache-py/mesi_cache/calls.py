"""What Python callers give and get: checks of keys, values and durations, and the exceptions."""

from __future__ import annotations

from typing import Any

import msgspec

from mesi_cache.core.step import Unavailable

MAX_KEY_BYTES = 256
MAX_TTL_S = 10 * 365 * 86_400

_encoder = msgspec.json.Encoder()


class CacheError(Exception):
    """Why a call of `CacheNode` has no result."""


class CacheUnavailable(CacheError):
    """No answer in time, rather than an old one. `definite`: nothing happened and nothing will."""

    def __init__(self, answer: Unavailable, key: str) -> None:
        super().__init__(f"{key!r}: {answer.reason}")
        self.definite = answer.definite
        self.key = key


class VersionMismatch(CacheError):
    """`cas` found another version: `version` (0: the key is absent)."""

    def __init__(self, key: str, version: int) -> None:
        super().__init__(f"{key!r} is at version {version}")
        self.key = key
        self.version = version


class NotAnInteger(CacheError):
    """`incr` found something else, or the sum is beyond 64 bits."""


class KeyReused(CacheError):
    """An idempotency key came with another change than before: nothing was done."""


def check_key(key: str) -> str:
    """`key` itself; raises TypeError or ValueError if it cannot be one."""
    if not isinstance(key, str):
        raise TypeError(f"key: expected text, got {type(key).__name__}")
    if not key or len(key.encode()) > MAX_KEY_BYTES or "\x00" in key:
        raise ValueError("key: expected 1 to 256 bytes without NUL")
    return key


def encode(value: Any, max_bytes: int) -> bytes:
    """`value` as JSON; TypeError for what JSON cannot carry, ValueError if it is too long."""
    encoded = _encoder.encode(value)
    if len(encoded) > max_bytes:
        raise ValueError(f"value of {len(encoded)} bytes: max_body_bytes={max_bytes} is the limit")
    return encoded


def milliseconds(ttl: float | None) -> int:
    """A time to live in seconds as the core counts it; 0 for None, which means for ever."""
    if ttl is None:
        return 0
    if not 0 < ttl <= MAX_TTL_S:
        raise ValueError(f"ttl: expected seconds above 0, at most {MAX_TTL_S}")
    return max(1, round(ttl * 1000))
