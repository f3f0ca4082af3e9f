"""A whole older copy of the database that was put back is told by the audit log beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from secure_store.core.audit import Told
from secure_store.core.changes import Audited, PutValue, encode_changes
from secure_store.core.effects import Durable
from secure_store.core.records import ORIGIN, Position, extend
from secure_store.ledger import Ledger
from secure_store.storage.audit_log import AuditLog
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring
from secure_store.storage.rollback import told_beyond


class Node:
    """One node's files, used as a node uses them: a record is durable, then its line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keyring = Keyring.open_or_make(folder / "keyring.json", b"m" * 32)
        self.path, self.log = folder / "store.db", folder / "audit.log"
        self.last: Position = ORIGIN
        self.epoch = 1
        Database(self.path, self.keyring, writable=True).close()

    def write(self, count: int, *, told: bool = True) -> None:
        database = Database(self.path, self.keyring, writable=True)
        audit = AuditLog("nodeA", "log", self.keyring, (self.log,), on_state=lambda _: None)
        audit.start()
        ledger = Ledger("nodeA", audit)
        ledger.recover(database.load_told(), (), self.last.seq)
        for _ in range(count):
            number = self.last.seq + 1
            changes = (
                PutValue(f"k{number}", 1, b"1", 1, 0),
                Audited("nodeA", "set_value", "", f"k{number}", f"r{number}", 1, "me"),
            )
            record = extend("c", self.last, self.epoch, encode_changes(changes))
            with database.transaction():
                database.append((record,))
            ledger.shown(changes, record.seq, record.epoch)
            self.last = record.position
        audit.stop()
        if told:
            with database.transaction():
                database.save_told(Told(self.last.seq, audit.noted_seq))
        database.close()

    def copy(self) -> Path:
        kept = self.folder / "kept.db"
        database = Database(self.path, self.keyring, writable=True)
        kept.unlink(missing_ok=True)
        database.copy_to(kept)
        database.close()
        return kept

    def put_back(self, kept: Path) -> None:
        for each in self.folder.glob("store.db*"):
            each.unlink()
        shutil.copy(kept, self.path)

    def verdict(self) -> str:
        database = Database(self.path, self.keyring)
        try:
            return told_beyond(database, (self.log,), self.keyring.audit_mac_key)
        finally:
            database.close()


@pytest.fixture
async def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize("told", [True, False])
async def test_an_older_database_is_told_by_the_lines_after_it(node: Node, told: bool) -> None:
    node.write(3, told=told)
    kept = node.copy()
    assert node.verdict() == ""
    node.write(1, told=told)
    assert node.verdict() == ""
    node.put_back(kept)
    assert "ends at record 3 of epoch 1" in node.verdict()
    assert "tells of record 4 of epoch 1" in node.verdict()


async def test_a_history_that_was_replaced_by_one_of_a_higher_epoch_is_no_rollback(
    node: Node,
) -> None:
    """An old primary had records 1 to 5 alone; the other node's history ends at 3, in epoch 2."""
    node.write(5, told=False)  # (killed before it could note how far its lines are)
    database = Database(node.path, node.keyring, writable=True)
    with database.transaction():
        database.install(Position(2, 3, b"h" * 32), Durable(epoch=2, cluster_id="c"))
    database.close()
    assert node.verdict() == ""
    node.last, node.epoch = Position(2, 3, b"h" * 32), 2
    node.write(1)
    assert node.verdict() == ""


async def test_lines_of_another_log_are_no_evidence(node: Node, tmp_path: Path) -> None:
    """A restored store with the old log beside it; or lines that somebody has made up."""
    other = tmp_path / "other"
    other.mkdir()
    older = Node(other)
    older.write(9)
    node.write(2)
    shutil.copy(older.log, node.log)
    assert node.verdict() == ""
