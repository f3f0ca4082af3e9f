"""The store's tables: rows in, rows out, and a checksum on each.

SQLite's WAL frames are checksummed, its pages are not: a flipped bit in a page is read as if it
had been written. So every row carries a CRC-32 over all of its values, and one row, `state`, says
where the log begins and ends, for rows that vanish with a damaged page. An entry that comes alone
(nearly every commit) is one statement and leaves that row as it is: such entries follow each other,
and each carries the number of its commit.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from lock_manager.core.peer_book import PeerIdentity
from lock_manager.core.raft import (
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Persist,
    Restored,
    Snapshot,
)
from lock_manager.storage.errors import CorruptStore

SNAPSHOT_CHUNK_BYTES = 1 << 20

SCHEMA = """
CREATE TABLE identity (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE peers (
    position INTEGER PRIMARY KEY, node_id TEXT NOT NULL, store_id TEXT NOT NULL,
    crc INTEGER NOT NULL);
CREATE TABLE state (
    id INTEGER PRIMARY KEY CHECK (id = 0), term INTEGER NOT NULL, voted_for INTEGER,
    first_index INTEGER NOT NULL, last_index INTEGER NOT NULL, commits INTEGER NOT NULL,
    crc INTEGER NOT NULL);
CREATE TABLE entries (
    log_index INTEGER PRIMARY KEY, term INTEGER NOT NULL, kind INTEGER NOT NULL,
    payload BLOB NOT NULL, commits INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE snapshot (
    id INTEGER PRIMARY KEY CHECK (id = 0), log_index INTEGER NOT NULL, term INTEGER NOT NULL,
    configuration BLOB NOT NULL, chunks INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE snapshot_chunks (
    log_index INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (log_index, number));
"""


def checksum(*values: int | str | bytes | None) -> int:
    """CRC-32 of a row's values. Lengths are included, so that no byte can move between columns."""
    crc = 0
    for value in values:
        raw = value if isinstance(value, bytes) else repr(value).encode()
        crc = zlib.crc32(raw, zlib.crc32(b"%d:" % len(raw), crc))
    return crc


def entry_checksum(index: int, term: int, kind: int, payload: bytes, commits: int) -> int:
    """As `checksum`, for the one row that is written often."""
    return zlib.crc32(payload, zlib.crc32(b"%d %d %d %d" % (index, term, kind, commits)))


class Extent:
    """Where the stored log begins and ends, the hard state, and how many commits there were: the
    row `state` with what was appended since, kept in memory."""

    __slots__ = ("commits", "first_index", "hard_state", "last_index")

    def __init__(
        self, hard_state: HardState, first_index: int, last_index: int, commits: int
    ) -> None:
        self.commits = commits
        self.hard_state = hard_state
        self.first_index = first_index
        self.last_index = last_index  # first_index - 1: no entries

    def save(self, connection: sqlite3.Connection) -> None:
        """Writes the row, inside the caller's transaction, which is thereby one commit more."""
        self.commits += 1
        row = (
            self.hard_state.term,
            self.hard_state.voted_for,
            self.first_index,
            self.last_index,
            self.commits,
        )
        connection.execute(
            "INSERT OR REPLACE INTO state VALUES (0, ?, ?, ?, ?, ?, ?)", (*row, checksum(*row))
        )


def create(connection: sqlite3.Connection, store_id: str) -> None:
    """Makes an empty store, inside the caller's transaction."""
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute(
        "INSERT INTO identity VALUES ('store_id', ?, ?)",
        (store_id, checksum("store_id", store_id)),
    )
    Extent(HardState(), 1, 0, 0).save(connection)


def apply(connection: sqlite3.Connection, extent: Extent, write: Persist) -> None:
    """Carries out one write, inside the caller's transaction; the caller saves `extent` at its
    end."""
    if write.hard_state is not None:
        extent.hard_state = write.hard_state
    if write.snapshot is not None:
        for _ in snapshot_steps(connection, write.snapshot):
            pass
    if write.truncate_from is not None and write.truncate_from <= extent.last_index:
        connection.execute("DELETE FROM entries WHERE log_index >= ?", (write.truncate_from,))
        extent.last_index = write.truncate_from - 1
    if write.compact_to is not None:
        compact(connection, extent, write.compact_to)
    if write.entries:
        if write.entries[0].index != extent.last_index + 1:
            raise ValueError(f"entry {write.entries[0].index} does not follow {extent.last_index}")
        commits = extent.commits + 1
        connection.executemany(APPEND, [_row(entry, commits) for entry in write.entries])
        extent.last_index = write.entries[-1].index


APPEND = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)"


def append(connection: sqlite3.Connection, extent: Extent, entry: Entry) -> None:
    """Writes one entry behind the last, as a transaction of its own; must be called outside of
    any."""
    if entry.index != extent.last_index + 1:
        raise ValueError(f"entry {entry.index} does not follow {extent.last_index}")
    connection.execute(APPEND, _row(entry, extent.commits + 1))
    extent.commits += 1
    extent.last_index = entry.index


def _row(entry: Entry, commits: int) -> tuple[int, int, int, bytes, int, int]:
    index, term, kind, payload = entry.index, entry.term, entry.kind, entry.payload
    return index, term, kind, payload, commits, entry_checksum(index, term, kind, payload, commits)


def compact(connection: sqlite3.Connection, extent: Extent, index: int) -> None:
    """Deletes the entries up to `index`."""
    if index >= extent.first_index:
        connection.execute("DELETE FROM entries WHERE log_index <= ?", (index,))
        extent.first_index = index + 1
        extent.last_index = max(extent.last_index, index)


def snapshot_steps(connection: sqlite3.Connection, snapshot: Snapshot) -> Iterator[None]:
    """Replaces the stored snapshot in steps of about SNAPSHOT_CHUNK_BYTES, each inside whatever
    transaction the caller has open. The old one counts until the step that brings the new row;
    steps after it free what is left of the old. Given up in between, it leaves parts that nobody
    reads."""
    index = snapshot.index
    connection.execute("DELETE FROM snapshot_chunks WHERE log_index = ?", (index,))
    view = memoryview(snapshot.data)
    starts = range(0, len(view), SNAPSHOT_CHUNK_BYTES)
    for number, start in enumerate(starts):
        data = bytes(view[start : start + SNAPSHOT_CHUNK_BYTES])
        connection.execute(
            "INSERT INTO snapshot_chunks VALUES (?, ?, ?, ?)",
            (index, number, data, checksum(index, number, data)),
        )
        yield
    row = (index, snapshot.term, msgspec.msgpack.encode(snapshot.configuration), len(starts))
    connection.execute(
        "INSERT OR REPLACE INTO snapshot VALUES (0, ?, ?, ?, ?, ?)", (*row, checksum(*row))
    )
    leftovers = connection.execute(
        "SELECT log_index, number FROM snapshot_chunks WHERE log_index != ?", (index,)
    ).fetchall()
    for leftover in leftovers:
        yield
        connection.execute(
            "DELETE FROM snapshot_chunks WHERE log_index = ? AND number = ?", leftover
        )


def bind_peer(connection: sqlite3.Connection, peer: PeerIdentity) -> None:
    row = (peer.position, peer.node_id, peer.store_id)
    connection.execute("INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?)", (*row, checksum(*row)))


# ------------------------------------------------------------------------------------ reading back


def load(connection: sqlite3.Connection) -> tuple[Restored, Extent]:
    """Everything that Raft stored, each row checked; raises CorruptStore."""
    states = connection.execute(
        "SELECT term, voted_for, first_index, last_index, commits, crc FROM state"
    ).fetchall()
    if len(states) != 1:
        raise CorruptStore("the row of term and vote is missing")
    _check(states[0], "the row of term and vote")
    term, voted_for, first_index, last_index, commits, _ = states[0]
    extent = Extent(HardState(term, voted_for), first_index, last_index, commits)
    snapshot = _load_snapshot(connection)
    entries = _load_entries(connection, extent)
    if first_index > snapshot.index + 1:
        raise CorruptStore(
            f"the log begins at {first_index}, the snapshot ends at {snapshot.index}"
        )
    restored = Restored(hard_state=extent.hard_state, snapshot=snapshot, entries=tuple(entries))
    return restored, extent


def load_store_id(connection: sqlite3.Connection) -> str:
    rows = connection.execute("SELECT key, value, crc FROM identity").fetchall()
    for row in rows:
        _check(row, "the identity row")
        if row[0] == "store_id":
            return str(row[1])
    raise CorruptStore("the identity row is missing")


def load_peers(connection: sqlite3.Connection) -> list[PeerIdentity]:
    rows = connection.execute("SELECT position, node_id, store_id, crc FROM peers").fetchall()
    for row in rows:
        _check(row, "a peer's row")
    return [PeerIdentity(*row[:-1]) for row in rows]


def _check(row: tuple[int | str | bytes | None, ...], what: str) -> None:
    if row[-1] != checksum(*row[:-1]):
        raise CorruptStore(f"{what} does not match its checksum")


def _load_snapshot(connection: sqlite3.Connection) -> Snapshot:
    rows = connection.execute(
        "SELECT log_index, term, configuration, chunks, crc FROM snapshot"
    ).fetchall()
    if not rows:
        return Snapshot()
    _check(rows[0], "the snapshot's row")
    index, term, raw_configuration, count, _ = rows[0]
    chunks = connection.execute(
        "SELECT log_index, number, data, crc FROM snapshot_chunks WHERE log_index = ?"
        " ORDER BY number",
        (index,),
    ).fetchall()
    if [chunk[1] for chunk in chunks] != list(range(count)):
        raise CorruptStore("a part of the snapshot is missing")
    for chunk in chunks:
        _check(chunk, f"part {chunk[1]} of the snapshot")
    try:
        configuration = msgspec.msgpack.decode(raw_configuration, type=Configuration)
    except msgspec.DecodeError as error:
        raise CorruptStore(f"the snapshot's configuration is not readable: {error}") from error
    return Snapshot(index, term, configuration, b"".join(chunk[2] for chunk in chunks))


def _load_entries(connection: sqlite3.Connection, extent: Extent) -> list[Entry]:
    """The log; `extent` is brought up to its end."""
    rows: Iterable[tuple[Any, ...]] = connection.execute(
        "SELECT log_index, term, kind, payload, commits, crc FROM entries ORDER BY log_index"
    )
    entries: list[Entry] = []
    expected, last_term = extent.first_index, 0
    for index, term, kind, payload, commits, crc in rows:
        if index != expected:
            raise CorruptStore(f"entry {expected} is missing")
        blob = isinstance(payload, bytes)
        if not blob or crc != entry_checksum(index, term, kind, payload, commits):
            raise CorruptStore(f"entry {index} does not match its checksum")
        if term < last_term:
            raise CorruptStore(f"entry {index} has a lower term than the one before it")
        if index > extent.last_index:  # came alone, after the row `state` was written
            extent.commits += 1
            extent.last_index = index
            if commits != extent.commits:
                raise CorruptStore(
                    f"entry {index} came with commit {commits}, not {extent.commits}"
                )
        entries.append(Entry(index, term, EntryKind(kind), payload))
        expected, last_term = index + 1, term
    if expected != extent.last_index + 1:
        raise CorruptStore(f"entry {expected} is missing")
    return entries
