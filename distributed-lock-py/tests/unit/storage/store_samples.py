"""Who owns the stores under test, and what is written to them."""

from __future__ import annotations

from lock_manager.core.raft import Configuration, Entry, EntryKind, Member
from lock_manager.storage import Owner

OWNER = Owner("node1", 1, "127.0.0.1:7000", "127.0.0.1:8000")
MEMBERS = Configuration((Member(node_id=1), Member(node_id=2)))


def entry(index: int, term: int, size: int = 40) -> Entry:
    return Entry(index, term, EntryKind.COMMAND, bytes([index % 251]) * size)
