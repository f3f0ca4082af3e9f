"""What plans see is never older than what reads see."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from secure_store.core.changes import PutToken, PutValue, Remember
from secure_store.engine import Engine
from secure_store.storage.database import Database
from secure_store.storage.view import View
from testkit.sim.loading import load

stored = load(str(Path(__file__).with_name("stored.py")))


def nothing(*_: object) -> Any:
    return 0


async def test_records_that_are_decided_as_they_come_are_planned_on_all_the_same(
    tmp_path: Path,
) -> None:
    """A primary that was restarted takes over its replica's tail, and both have it: decided in the
    step that appends it, while older records of the same keys are not in the tables yet."""
    database, keyring = stored.filled(tmp_path)  # key "a" is there, applied
    before = database.last()
    view = View(Database(tmp_path / "store.db", keyring), None)
    # (Keeping and showing look at no other part than the view.)
    engine = Engine(
        None, view=view, reader=database, open_reader=nothing, replica_flag=None,
        on_shown=nothing, on_told=nothing, on_reset=nothing, on_note=nothing, on_head=nothing,
        next_head=nothing, next_told=nothing, on_failed=nothing,
    )  # fmt: skip
    engine._viewed_seq = before.seq
    own = stored.records(PutValue("tail", 1, b"1", 1, 0), start=before)
    engine._keep(own)
    engine._show(own[-1].seq)
    remember = Remember(b"s" * 32, b"r" * 32, 200, b"{}", 2, 2**53)
    token = PutToken("made", b"i" * 32, ("user",), "name", 1, 0, -1, "")
    taken = stored.records(PutValue("tail", 2, b"2", 1, 0), remember, token, start=own[-1].position)
    engine._keep(taken)
    engine._show(taken[-1].seq)
    state = view.head_state("tail")
    assert state is not None
    assert state.newest.number == 2
    assert view.head_remembered(b"s" * 32) is not None
    assert "made" in view.head_tokens
    await asyncio.sleep(0)
    database.close()
