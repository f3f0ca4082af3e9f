"""Values whose time is over are destroyed, these and no others: tables, index and log of a primary
and a replica against a naive model, on a virtual clock, with crashes, from a seed.

SIM_SEEDS=2000 runs more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from secure_store.core import plan
from secure_store.core.changes import Genesis, decode_changes, encode_changes
from secure_store.core.kv import Damaged
from secure_store.core.records import ORIGIN, Position, Record, extend
from secure_store.core.tokens import TokenSet
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring
from secure_store.storage.view import View
from testkit.sim import seeds

KEYS = ("a", "a/b", "c", "d")


@dataclass
class Node:
    """One node's database; what was decided and not folded is lost in a crash, and comes again."""

    path: Path
    keyring: Keyring
    waiting: list[Record] = field(default_factory=list)

    def open(self) -> None:
        self.database = Database(self.path, self.keyring, writable=True)
        self.view = View(Database(self.path, self.keyring), None)
        for record in self.database.read_log(self.database.applied().seq, 1 << 30, 1 << 30) or ():
            self.see(record)

    def append(self, record: Record) -> None:
        with self.database.transaction():
            self.database.append((record,))
        self.see(record)

    def see(self, record: Record) -> None:
        changes = decode_changes(record.payload)
        self.view.append(changes, record.seq)
        self.view.show(changes, record.seq)
        self.waiting.append(record)

    def fold(self) -> None:
        if self.waiting:
            with self.database.transaction():
                self.database.apply(tuple(self.waiting), TokenSet(), 0)
            self.view.applied(self.waiting[-1].seq)
            self.waiting.clear()

    def crash(self) -> None:
        self.database.close()
        self.waiting.clear()
        self.open()


@dataclass
class Model:
    """Per key: versions as [value, expires_ms or 0, destroyed], numbered from 1."""

    keys: dict[str, list[list]] = field(default_factory=dict)


class Run:
    def __init__(self, seed: int, folder: Path, keyring: Keyring) -> None:
        self.rng = random.Random(seed)
        self.now_ms = 1_000
        self.last: Position = ORIGIN
        self.model = Model()
        self.nodes = [Node(folder / f"{seed}-{n}.db", keyring) for n in range(2)]
        for node in self.nodes:
            node.open()
        self.commit((Genesis(b"t" * 32),))

    def commit(self, changes: tuple) -> None:
        record = extend("c", self.last, 1, encode_changes(changes))
        self.last = record.position
        for node in self.nodes:
            node.append(record)

    def write(self, *ops: plan.Op) -> bool:
        try:
            planned = plan.plan(plan.Write(ops, lambda _: b""), self.nodes[0].view, self.now_ms)
        except plan.OpFailed:
            return False
        if planned.changes:
            self.commit(planned.changes)
        return True

    def step(self) -> None:
        rng, key = self.rng, self.rng.choice(KEYS)
        versions = self.model.keys.get(key, [])
        match rng.randrange(9):
            case 0 | 1 | 2:
                ttl_ms = rng.choice((None, None, 5, 20, 60))
                value = f"{self.last.seq}".encode()
                if len(versions) < 19:  # (older ones fall off after that: another test's matter)
                    assert self.write(plan.SetOp(key, value, None, ttl_ms))
                    end = self.now_ms + ttl_ms if ttl_ms else 0
                    self.model.keys.setdefault(key, versions).append([value, end, False])
            case 3 if versions:
                number = rng.randrange(len(versions)) + 1
                if self.write(plan.DestroyOp(key, number)):
                    versions[number - 1][2] = True
            case 4 if versions and rng.random() < 0.3:
                assert self.write(plan.DestroyOp(key, None))
                del self.model.keys[key]
            case 5:
                self.write(plan.DeleteOp(key))
            case 6:
                rng.choice(self.nodes).fold()
            case 7:
                rng.choice(self.nodes).crash()
            case _:
                self.now_ms += rng.choice((1, 4, 15))

    def sweep(self) -> None:
        """As sweeping.py, until nothing is left."""
        for node in self.nodes:
            node.fold()
        while found := self.nodes[0].view.due(self.now_ms, self.rng.choice((1, 3, 50))):
            assert self.write(*(plan.ExpireOp(key, version) for key, version in found))
            for node in self.nodes:
                node.fold()

    def judge(self) -> int:
        destroyed = 0
        for key, versions in self.model.keys.items():
            for each in versions:
                due = each[1] and self.now_ms >= each[1]
                destroyed += bool(due and not each[2])
                each[2] = each[2] or bool(due)
            for node in self.nodes:
                state = node.database.key_state(key)
                assert state is not None
                assert [v.destroyed for v in state.versions] == [v[2] for v in versions]
                stored = [node.database.value(key, n) for n in range(1, len(versions) + 1)]
                assert stored == [None if gone else value for value, _, gone in versions]
        for node in self.nodes:
            node.database.check_rows()
            states = node.database.keys_from("", 100)
            assert {key for key, _ in states} == set(self.model.keys)
            wanted = sorted((s.due_ms, key) for key, s in states if s.due_ms)
            assert node.database.db.execute("SELECT * FROM due").fetchall() == wanted
        return destroyed


def test_what_is_over_is_destroyed_on_both_nodes_and_nothing_else(tmp_path: Path) -> None:
    keyring = Keyring.open_or_make(tmp_path / "keyring.json", b"m" * 32)
    destroyed = 0
    for seed in seeds(6):
        run = Run(seed, tmp_path, keyring)
        for _ in range(4):
            for _ in range(run.rng.randrange(5, 40)):
                run.step()
            run.sweep()
            destroyed += run.judge()
        for node in run.nodes:
            node.database.close()
    assert destroyed > 5, "nothing expired: the test has seen nothing"


def test_what_a_replica_gets_by_snapshot_it_can_destroy_as_a_primary(tmp_path: Path) -> None:
    keyring = Keyring.open_or_make(tmp_path / "keyring.json", b"m" * 32)
    run = Run(1, tmp_path, keyring)
    assert run.write(plan.SetOp("k", b"1", None, 50))
    for node in run.nodes:
        node.fold()
    other = Node(tmp_path / "other.db", keyring)
    other.open()
    source = run.nodes[0].database
    with other.database.transaction():
        other.database.stage(tuple(source.snapshot_rows()), first=True)
        other.database.install(source.applied(), source.load_state())
    other.database.check_rows()
    assert other.database.due(run.now_ms + 49, 10) == []
    assert other.database.due(run.now_ms + 50, 10) == ["k"]


def test_an_index_row_that_was_taken_away_is_found(tmp_path: Path) -> None:
    keyring = Keyring.open_or_make(tmp_path / "keyring.json", b"m" * 32)
    run = Run(2, tmp_path, keyring)
    assert run.write(plan.SetOp("k", b"1", None, 50))
    node = run.nodes[0]
    node.fold()
    node.database.db.execute("DELETE FROM due")
    with pytest.raises(Damaged):
        node.database.check_rows()


def test_a_version_that_is_another_one_by_now_is_left_alone(tmp_path: Path) -> None:
    keyring = Keyring.open_or_make(tmp_path / "keyring.json", b"m" * 32)
    run = Run(3, tmp_path, keyring)
    assert run.write(plan.SetOp("k", b"1", None, 50))
    run.nodes[0].fold()
    run.now_ms += 60
    (found,) = run.nodes[0].view.due(run.now_ms, 10)
    assert run.write(plan.DestroyOp("k", None))
    assert run.write(plan.SetOp("k", b"anew"))
    before = run.last
    assert run.write(plan.ExpireOp(*found))
    assert run.last == before, "a value that has time left was destroyed"
