"""Requests on their way: who is answered, and what the machine must be told of those who left."""

from __future__ import annotations

import asyncio

import pytest

from lock_manager.api.errors import ApiError, NotLeader
from lock_manager.api.pending import MAX_BATCH_COMMANDS, Desk, Pending, Proposed
from lock_manager.core.locks.commands import Acquire, Ask, Batch, Cancel, Undelivered
from lock_manager.core.locks.machine import LockMachine

LOCK = (Ask("a"),)


class Bench:
    """A desk and a machine, without Raft in between."""

    def __init__(self) -> None:
        self.desk = Desk()
        self.machine = LockMachine()
        self.index = 0

    def ask(self, client: str, request_id: str = "") -> Pending:
        future = asyncio.get_running_loop().create_future()
        command = Acquire(client, LOCK, 10_000, 0, request_id)
        return self.desk.submit(command, future)

    def propose(self) -> None:
        mail = self.desk.take_mail()
        self.index += 1
        batch = Batch(0, [pending.command for pending in mail])
        self.desk.proposed(self.index, Proposed(1, batch, mail, 0.0))

    def commit(self, term: int = 1) -> list[object]:
        """Apply the last proposed batch; what must follow it is submitted, and returned."""
        own = self.desk.take_proposed(self.index, term)
        if own is None:
            return []
        outcomes = self.machine.apply(self.index, own.batch)
        follow_up = self.desk.answer(own.pendings, outcomes)
        follow_up += self.desk.resolve(outcomes.resolutions)
        for command in follow_up:
            self.desk.submit(command, None)
        return list(follow_up)

    def round(self) -> list[object]:
        self.propose()
        return self.commit()

    def free(self, client: str) -> list[object]:
        from lock_manager.core.locks.commands import Release

        self.desk.submit(Release(client, "a"), None)
        return self.round()


def answer(pending: Pending) -> object:
    assert pending.listener is not None
    return type(pending.listener.result()).__name__ if pending.listener.done() else None


async def test_everything_that_gathered_goes_into_one_batch_and_each_is_answered() -> None:
    bench = Bench()
    asked = [bench.ask("ann"), bench.ask("ann"), bench.ask("bob")]
    assert bench.round() == []
    assert [answer(pending) for pending in asked] == ["Acquired", "Acquired", None]
    bench.free("ann")
    assert answer(asked[2]) == "Acquired"


async def test_who_left_before_its_batch_never_reaches_the_log() -> None:
    bench = Bench()
    gone = bench.ask("ann")
    assert bench.desk.abandon(gone) == []
    assert bench.desk.take_mail() == []


async def test_who_left_while_waiting_is_cancelled() -> None:
    bench = Bench()
    bench.ask("ann")
    waiting = bench.ask("bob")
    bench.round()
    follow_up = bench.desk.abandon(waiting)
    assert follow_up == [Cancel(waiting.ticket)]
    bench.desk.submit(follow_up[0], None)
    bench.round()
    assert not bench.machine.table.waiters
    assert bench.desk.unanswered == 0


async def test_who_left_while_its_batch_was_under_way_is_cancelled_when_it_queues() -> None:
    bench = Bench()
    bench.ask("ann")
    bench.round()
    waiting = bench.ask("bob")
    bench.propose()
    assert bench.desk.abandon(waiting) == []
    assert bench.commit() == [Cancel(waiting.ticket)]
    bench.round()
    assert not bench.machine.table.waiters


@pytest.mark.parametrize("when", ["before the answer", "after the answer"])
async def test_a_grant_that_nobody_heard_of_is_reported_once(when: str) -> None:
    bench = Bench()
    gone = bench.ask("ann")
    bench.propose()
    if when == "before the answer":
        assert bench.desk.abandon(gone) == []
        follow_up = bench.commit()
    else:
        bench.commit()
        follow_up = list(bench.desk.abandon(gone))
        for command in follow_up:
            bench.desk.submit(command, None)
    assert follow_up == [Undelivered("ann", {"a": 1})]
    assert bench.desk.abandon(gone) == []
    bench.round()
    assert bench.machine.table.locks["a"].hold_of("ann").told == 0


async def test_a_grant_is_told_if_one_of_two_connections_hears_of_it() -> None:
    bench = Bench()
    bench.ask("ann")
    first, second = bench.ask("bob", "r1"), bench.ask("bob", "r1")
    bench.round()
    assert first.ticket == second.ticket
    assert bench.desk.abandon(first) == []  # the other one still waits on the same ticket
    assert bench.free("ann") == []
    assert (answer(first), answer(second)) == (None, "Acquired")


async def test_a_retry_that_crosses_the_cancel_of_its_request_asks_anew() -> None:
    bench = Bench()
    bench.ask("ann")
    first = bench.ask("bob", "r1")
    bench.round()
    retry = bench.ask("bob", "r1")  # already in the inbox when the first connection closes
    for command in bench.desk.abandon(first):
        bench.desk.submit(command, None)
    bench.round()
    assert bench.desk.has_mail
    bench.round()
    bench.free("ann")
    assert answer(retry) == "Acquired"


async def test_a_displaced_batch_is_definitely_lost_and_an_open_one_may_still_happen() -> None:
    bench = Bench()
    displaced = bench.ask("ann")
    bench.propose()
    bench.commit(term=2)
    under_way = bench.ask("bob")
    bench.propose()
    in_inbox = bench.ask("cyd")
    bench.desk.leadership_lost()
    bench.desk.refuse_mail(NotLeader("node2", "http://127.0.0.1:1"))
    for pending, definite in ((displaced, True), (under_way, False)):
        error = pending.listener.exception()
        assert isinstance(error, ApiError)
        assert (error.status, error.details) == (503, {"definite": definite})
    assert isinstance(in_inbox.listener.exception(), NotLeader)
    assert bench.desk.unanswered == 0


async def test_batches_and_the_inbox_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lock_manager.api.pending.MAX_INBOX", MAX_BATCH_COMMANDS + 1)
    bench = Bench()
    asked = [bench.ask(f"c{i}") for i in range(MAX_BATCH_COMMANDS + 1)]
    with pytest.raises(ApiError) as refused:
        bench.ask("one too many")
    assert refused.value.status == 503
    bench.desk.submit(Cancel(1), None)  # what the node itself must say is never refused
    assert bench.desk.take_mail() == asked[:-1]
    assert len(bench.desk.take_mail()) == 2
