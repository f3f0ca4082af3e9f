"""What travels on a link: the core's messages, and a question that only people ask."""

from __future__ import annotations

import msgspec

from mesi_cache.core.messages import Message


class AskEntry(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """GET /directory, passed on to the key's home."""

    key: str
    request: int


class TellEntry(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The home's entry as JSON."""

    request: int
    entry: bytes


Wire = Message | AskEntry | TellEntry
