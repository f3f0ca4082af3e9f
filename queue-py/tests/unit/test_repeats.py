"""A produce that repeats an earlier one is answered with the first id, whatever has happened to the
queue meanwhile: it stores nothing."""

from __future__ import annotations

from message_queue.core.delivery.intake import repeats
from message_queue.core.delivery.owner import PartitionOwner
from message_queue.core.ids import pack_dot
from message_queue.core.operations import Answer, Configure, NewMessage, Produce
from message_queue.core.replication.drafts import AckDraft, RunDraft

EPOCH = 130
NOW = 1_000
WALL = 1_700_000_000_000


class Bench:
    """An owner whose batches are stored when the test says so."""

    def __init__(self) -> None:
        self.issued = 0
        self.owner = PartitionOwner(5, EPOCH, lambda dot: dot <= pack_dot(EPOCH, self.issued))
        self.acked = 0

    def produce(self, token: int, *ids: str | None, batch: bool = False) -> Answer | None:
        messages = tuple(NewMessage(b"1", dedupe_id=name) for name in ids)
        op = Produce("q", messages, batch or len(ids) > 1)
        return self.owner.produce(token, op, NOW, WALL)

    def propose(self) -> None:
        drafts, gathered = self.owner.gather(1 << 20)
        first = self.issued + 1 if drafts else 0
        for draft in drafts:
            self.issued += len(draft.bodies) if isinstance(draft, RunDraft) else 1
            if isinstance(draft, AckDraft):
                self.acked += sum(last - low + 1 for _, low, last in draft.targets)
        self.owner.proposed(gathered, first, NOW)

    def store(self) -> dict[int, Answer | None]:
        self.propose()
        self.owner.committed(self.issued, NOW)
        finished, self.owner.finished = self.owner.finished, []
        return dict(finished)


def status(answer: Answer | None) -> int:
    assert answer is not None
    return answer.status


def full(bench: Bench, most: int) -> None:
    bench.owner.configure(90, Configure("q", b'{"max_length":%d}' % most))
    bench.store()


def test_a_full_queue_answers_a_repetition_with_the_first_id() -> None:
    bench = Bench()
    full(bench, 1)
    bench.produce(1, "k")
    first = bench.store()[1]
    assert status(bench.produce(2, None)) == 429
    assert status(bench.produce(3, "other")) == 429
    assert bench.produce(4, "k") is None
    again = bench.store()[4]
    assert (status(first), status(again)) == (201, 200)
    assert first is not None
    assert again is not None
    assert first.body[:-1] in again.body
    # As long as the first is not stored, nobody knows better.
    bench = Bench()
    full(bench, 1)
    assert bench.produce(1, "k") is bench.produce(2, "k") is None
    answers = bench.store()
    assert (status(answers[1]), status(answers[2])) == (201, 200)


def test_only_what_is_new_in_a_batch_needs_room() -> None:
    bench = Bench()
    full(bench, 2)
    bench.produce(1, "a")
    bench.store()
    assert status(bench.produce(2, "a", "b", "c")) == 429
    assert bench.produce(3, "a", "b", "b") is None
    assert status(bench.store()[3]) == 201
    assert status(bench.produce(4, "a", "b", None)) == 429


def test_what_repeats_is_known_without_storing() -> None:
    bench = Bench()
    op = Produce("q", (NewMessage(b"1", dedupe_id="k"),))
    assert not repeats(op, bench.owner.window, NOW)
    bench.produce(1, "k")
    assert repeats(op, bench.owner.window, NOW)
    assert not repeats(Produce("q", (*op.messages, NewMessage(b"2"))), bench.owner.window, NOW)
    assert not repeats(Produce("other", op.messages), bench.owner.window, NOW)


def test_a_purge_leaves_the_dedupe_id_of_a_message_that_it_did_not_reach() -> None:
    bench = Bench()
    bench.produce(1, "early")
    bench.store()
    bench.produce(2, "proposed")
    bench.propose()
    bench.produce(3, "gathered")
    bench.owner.purge(4, "q", delete=False)
    answers = bench.store()
    assert [status(answers[token]) for token in (2, 3, 4)] == [201, 201, 200]
    assert bench.acked == 2, "the first message and its mark"
    assert bench.owner.delivery.length("q") == 2
    for token, name in ((5, "proposed"), (6, "gathered"), (7, "early")):
        bench.produce(token, name)
    answers = bench.store()
    assert [status(answers[token]) for token in (5, 6, 7)] == [200, 200, 201]
