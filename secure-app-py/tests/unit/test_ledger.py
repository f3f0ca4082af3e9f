"""A committed write without an audit line cannot be: what a crash lost is written at the start."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from secure_store.core.audit import Code, Told, verify
from secure_store.core.changes import Audited, PutValue, encode_changes
from secure_store.core.records import ORIGIN, Record, extend
from secure_store.ledger import Ledger
from secure_store.storage.audit_files import raw_lines
from secure_store.storage.audit_log import AuditLog
from secure_store.storage.keyring import Keyring

KEY = b"m" * 32


def history(count: int, *, node: str = "nodeA") -> list[tuple[tuple, Record]]:
    """Records as a primary makes them: a value, and whose request it was."""
    made = []
    last = ORIGIN
    for n in range(1, count + 1):
        changes = (
            PutValue(f"k{n}", 1, b"1", n, 0),
            Audited(node, "set_value", "127.0.0.1", f"k{n}", f"req-{n}", 1_000 + n, "me"),
        )
        record = extend("c", last, 1, encode_changes(changes))
        last = record.position
        made.append((changes, record))
    return made


class World:
    """One node's audit directory, opened and crashed at will."""

    def __init__(self, path: Path) -> None:
        self.path = path / "audit.log"
        self.keyring = Keyring.open_or_make(path / "keyring.json", KEY)

    def open(self) -> tuple[AuditLog, Ledger]:
        audit = AuditLog("nodeA", "log", self.keyring, (self.path,), on_state=lambda _: None)
        audit.start()
        return audit, Ledger("nodeA", audit)

    def lose_lines(self, count: int) -> None:
        lines = list(raw_lines(self.path))
        self.path.write_bytes(b"".join(lines[: len(lines) - count]))

    def records(self) -> list[int]:
        """The record numbers that the log tells of; the chain must be whole."""
        assert verify(raw_lines(self.path), self.keyring.audit_mac_key).code is Code.OK
        found = [msgspec.json.decode(raw).get("record", 0) for raw in raw_lines(self.path)]
        return [number for number in found if number]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def run(world: World, made: list[tuple[tuple, Record]]) -> Told:
    """Decide everything, and stop in order; what could have been saved."""
    audit, ledger = world.open()
    for changes, record in made:
        line = ledger.shown(changes, record.seq)
        assert line == audit.noted_seq
        if (filed := audit.written(line)) is not None:
            await filed
    audit.stop()
    return ledger.settled()


async def test_a_line_is_in_the_file_before_it_counts_as_written(world: World) -> None:
    made = history(3)
    audit, ledger = world.open()
    for changes, record in made:
        line = ledger.shown(changes, record.seq)
        if (filed := audit.written(line)) is not None:
            await filed
        assert world.records()[-1] == record.seq
    audit.stop()


async def test_lines_that_a_power_cut_lost_are_written_at_the_start_once(world: World) -> None:
    made = history(6)
    await run(world, made)
    world.lose_lines(2)
    for expected in (2, 0):  # the second start finds nothing to do
        audit, ledger = world.open()
        kept = [record for _, record in made]
        assert ledger.recover(Told(1, 1), kept, 6) == expected
        audit.stop()
        assert world.records() == [1, 2, 3, 4, 5, 6]


async def test_what_is_decided_after_the_start_gets_its_line_then_and_only_once(world) -> None:
    made = history(5)
    await run(world, made[:4])
    world.lose_lines(2)  # 3 and 4 are lost, 5 was never decided
    audit, ledger = world.open()
    assert ledger.recover(Told(), [record for _, record in made], 3) == 1
    for changes, record in made:
        ledger.shown(changes, record.seq)  # the engine shows what is not in the tables yet
    audit.stop()
    assert world.records() == [1, 2, 3, 4, 5]


async def test_a_line_that_is_there_is_not_written_again_when_its_record_is_decided_anew(
    world: World,
) -> None:
    made = history(3)
    await run(world, made)
    audit, ledger = world.open()
    assert ledger.recover(Told(), [record for _, record in made], 1) == 0
    for changes, record in made:
        assert ledger.shown(changes, record.seq) == 0
    audit.stop()
    assert world.records() == [1, 2, 3]


async def test_the_node_that_took_the_request_tells_of_it_and_no_other(world: World) -> None:
    made = history(3, node="nodeB")
    audit, ledger = world.open()
    for changes, record in made:
        assert ledger.shown(changes, record.seq) == 0
    assert ledger.recover(Told(), [record for _, record in made], 3) == 0
    assert ledger.settled() == Told(3, 0)
    audit.stop()
    assert world.records() == []


async def test_another_history_with_the_same_numbers_has_lines_of_its_own(world: World) -> None:
    await run(world, history(4))
    audit, ledger = world.open()
    old = [record for _, record in history(4)]
    ledger.recover(Told(1, 1), old, 1)
    ledger.replaced(2)  # a snapshot up to record 2: records 3 and 4 were quarantined
    assert (ledger.settled(), ledger.installs) == (Told(2, 1), 1)
    changes = (Audited("nodeA", "set_value", "", "other", "other-3", 9_000, "me"),)
    assert ledger.shown(changes, 3) > 0
    audit.stop()
    assert world.records() == [1, 2, 3, 4, 3]


async def test_only_what_is_durable_may_be_saved_as_told(world: World) -> None:
    made = history(2)
    audit, ledger = world.open()
    ledger.shown(*_of(made[0]))
    assert ledger.settled() == Told()
    durable = audit.note("x", addr="", outcome="denied", request_id="", status=403, who="",
                         urgent=True)  # fmt: skip
    assert durable is not None
    await durable
    assert ledger.settled() == Told(1, 1)
    audit.stop()


def _of(made: tuple[tuple, Record]) -> tuple[tuple, int]:
    return made[0], made[1].seq


async def test_lines_that_wait_for_their_records_decision_are_found_by_the_next_start_too(
    world: World,
) -> None:
    """Killed twice, the second time before all of the first run's records were decided anew."""
    made = history(6)
    told = await run(world, made[:2])
    await run(world, made[2:])  # (the first run: nothing after record 2 was saved)
    audit, ledger = world.open()
    assert ledger.recover(told, [record for _, record in made], 4) == 0
    saved = ledger.settled()  # records 5 and 6 have their lines, and are not decided again yet
    audit.stop()
    assert saved.record == 4
    audit, ledger = world.open()
    assert ledger.recover(saved, [record for _, record in made], 6) == 0
    assert ledger.settled() == Told(6, audit.noted_seq)
    audit.stop()
    assert world.records() == [1, 2, 3, 4, 5, 6]
