"""The queue and set checkers, against histories that must pass and must fail."""

from typing import Any

import pytest

from testkit.checkers import sets, total_queue
from testkit.checkers.verdict import Verdict
from testkit.history import Operation

Row = tuple[str, str, Any, int, int | None, Any]


def history(*rows: Row) -> list[Operation]:
    """process, kind, argument, from ms, to ms (None: unknown, -1: failed), result."""
    operations = []
    for number, (process, kind, argument, invoked, completed, result) in enumerate(rows):
        failed = completed == -1
        operations.append(
            Operation(
                number=number,
                process=process,
                kind=kind,
                key="q",
                argument=argument,
                invoked_us=invoked * 1000,
                completed_us=None if completed is None else max(completed, invoked) * 1000,
                status="fail" if failed else "unknown" if completed is None else "ok",
                result=result,
                info={"batch": True} if kind == "produce" and isinstance(argument, list) else None,
            )
        )
    return operations


def got(message_id: str, body: Any) -> list[dict[str, Any]]:
    return [{"id": message_id, "body": body}]


PRODUCED: Row = ("p", "produce", "A", 0, 1, "1")
GOOD = {
    "once through": history(
        PRODUCED, ("c", "consume", None, 2, 3, got("1", "A")), ("c", "ack", "1", 4, 5, None)
    ),
    "redelivered because nobody acked": history(
        PRODUCED,
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("c", "consume", None, 40_000, 40_001, got("1", "A")),
        ("c", "ack", "1", 40_002, 40_003, None),
    ),
    "redelivered after a nack": history(
        PRODUCED,
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("c", "nack", "1", 4, 5, None),
        ("d", "consume", None, 6, 7, got("1", "A")),
        ("d", "ack", "1", 8, 9, None),
    ),
    "an unknown produce that arrived": history(
        ("p", "produce", "A", 0, None, None),
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("c", "ack", "1", 4, 5, None),
    ),
    "an unknown produce that never arrived": history(("p", "produce", "A", 0, None, None)),
    "a delivery that was on its way when the ack completed": history(
        PRODUCED,
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("d", "consume", None, 4, 99_000, got("1", "A")),
        ("c", "ack", "1", 5, 6, None),
    ),
    "a batch": history(
        ("p", "produce", ["A", "B"], 0, 1, ["1", "2"]),
        ("c", "consume", None, 2, 3, got("1", "A") + got("2", "B")),
        ("c", "ack", ["1", "2"], 4, 5, None),
    ),
    "an ack of unknown outcome, and nothing left": history(
        PRODUCED, ("c", "consume", None, 2, 3, got("1", "A")), ("c", "ack", "1", 4, None, None)
    ),
}
BAD = {
    "lost": history(PRODUCED),
    "lost after a delivery that nobody acked": history(
        PRODUCED, ("c", "consume", None, 2, 3, got("1", "A"))
    ),
    "lost out of a batch": history(
        ("p", "produce", ["A", "B"], 0, 1, ["1", "2"]),
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("c", "ack", "1", 4, 5, None),
    ),
    "from nowhere": history(("c", "consume", None, 2, 3, got("1", "A"))),
    "refused and delivered": history(
        ("p", "produce", "A", 0, -1, None), ("c", "consume", None, 2, 3, got("1", "A"))
    ),
    "delivered before it was produced": history(
        ("c", "consume", None, 2, 3, got("1", "A")), ("p", "produce", "A", 5, 6, "1")
    ),
    "risen from the dead": history(
        PRODUCED,
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("c", "ack", "1", 4, 5, None),
        ("d", "consume", None, 90_000, 90_001, got("1", "A")),
    ),
    "stored twice": history(
        PRODUCED,
        ("c", "consume", None, 2, 3, got("1", "A")),
        ("c", "consume", None, 4, 5, got("2", "A")),
        ("c", "ack", ["1", "2"], 6, 7, None),
    ),
    "one id for two messages": history(
        PRODUCED,
        ("p", "produce", "B", 0, 1, "2"),
        ("c", "consume", None, 2, 3, got("1", "B")),
        ("c", "ack", ["1", "2"], 6, 7, None),
    ),
    "another body": history(PRODUCED, ("c", "consume", None, 2, 3, got("1", "A, but changed"))),
}


@pytest.mark.parametrize("name", GOOD)
def test_it_accepts(name: str) -> None:
    total_queue.check(GOOD[name], exclusive=True).require()


@pytest.mark.parametrize("name", BAD)
def test_it_refuses(name: str) -> None:
    assert total_queue.check(BAD[name]).valid is False


def test_two_consumers_within_a_lease_are_told_when_leases_must_hold() -> None:
    twice = history(
        PRODUCED,
        ("c", "consume", {"visibility_ms": 1000}, 2, 3, got("1", "A")),
        ("d", "consume", {"visibility_ms": 1000}, 500, 600, got("1", "A")),
        ("d", "ack", "1", 700, 701, None),
    )
    verdict = total_queue.check(twice).require()
    assert verdict.counts["duplicates"] == 1
    assert "two consumers" in total_queue.check(twice, exclusive=True).reason


def leased(message_id: str, body: Any, receipt: str) -> list[dict[str, Any]]:
    return [{"id": message_id, "body": body, "receipt": receipt}]


SECOND = {"visibility_ms": 1000}
ACKED: Row = ("d", "ack", "1", 70_000, 70_001, None)
EXPLAINED = {
    total_queue.LEASE: history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("d", "consume", SECOND, 900, 1_100, leased("1", "A", "64.2")),
        ACKED,
    ),
    total_queue.NACK: history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("c", "nack", "1", 4, None, None),
        ("d", "consume", SECOND, 6, 7, leased("1", "A", "64.2")),
        ACKED,
    ),
    total_queue.OWNER: history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("d", "consume", SECOND, 6, 7, leased("1", "A", "1025.1")),
        ACKED,
    ),
    total_queue.TWICE: history(
        ("p", "produce", "A", 0, None, None),
        ("p", "produce", "A", 2, 3, "1"),
        ("c", "consume", SECOND, 4, 5, leased("1", "A", "64.1") + leased("2", "A", "64.1")),
        ("d", "ack", ["1", "2"], 70_000, 70_001, None),
    ),
}
EXPLAINED[total_queue.TWICE][1].info = {"retry": True}
UNEXPLAINED = {
    "within the lease of one owner": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("d", "consume", SECOND, 6, 7, leased("1", "A", "64.2")),
        ACKED,
    ),
    "within the lease, after an ack in doubt": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("c", "ack", "1", 4, None, None),
        ("d", "consume", SECOND, 6, 7, leased("1", "A", "64.2")),
    ),
    "after a nack that was refused": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("c", "nack", "1", 4, -1, None),
        ("d", "consume", SECOND, 6, 7, leased("1", "A", "64.2")),
        ACKED,
    ),
    "given back before it was delivered": history(
        PRODUCED,
        ("c", "nack", "1", 2, 3, None),
        ("c", "consume", SECOND, 4, 5, leased("1", "A", "64.1")),
        ("d", "consume", SECOND, 6, 7, leased("1", "A", "64.2")),
        ACKED,
    ),
    "the third of three": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("d", "consume", SECOND, 1_100, 1_101, leased("1", "A", "64.2")),
        ("c", "consume", SECOND, 1_200, 1_201, leased("1", "A", "64.3")),
        ACKED,
    ),
    "without receipts": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, got("1", "A")),
        ("d", "consume", SECOND, 6, 7, got("1", "A")),
        ACKED,
    ),
}
CONTRADICTIONS = {
    "one receipt for two": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.1")),
        ("d", "consume", SECOND, 5_000, 5_001, leased("1", "A", "64.1")),
        ACKED,
    ),
    "attempts that go back": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "64.2")),
        ("d", "consume", SECOND, 5_000, 5_001, leased("1", "A", "64.1")),
        ACKED,
    ),
    "a deposed owner that delivers": history(
        PRODUCED,
        ("c", "consume", SECOND, 2, 3, leased("1", "A", "1025.1")),
        ("d", "consume", SECOND, 5_000, 5_001, leased("1", "A", "64.1")),
        ACKED,
    ),
}


@pytest.mark.parametrize("why", EXPLAINED)
def test_a_duplicate_is_counted_by_its_cause(why: str) -> None:
    verdict = total_queue.check(EXPLAINED[why], causes=total_queue.CAUSES).require()
    assert verdict.counts[why] == 1
    others = total_queue.CAUSES - {why}
    assert why in total_queue.check(EXPLAINED[why], causes=others).reason


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_a_duplicate_without_a_cause_is_a_failure(name: str) -> None:
    verdict = total_queue.check(UNEXPLAINED[name], causes=total_queue.CAUSES)
    assert not verdict.valid
    assert "unexplained" in verdict.reason
    total_queue.check(UNEXPLAINED[name]).require()  # counted only


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_receipts_that_contradict_each_other_are_a_failure(name: str) -> None:
    assert total_queue.check(CONTRADICTIONS[name]).valid is False


def test_a_produce_in_doubt_that_was_sent_again_with_its_dedupe_id_is_one_message() -> None:
    twice = history(
        ("p", "produce", "A", 0, None, None),
        ("p", "produce", "A", 2, 3, "1"),
        ("c", "consume", None, 4, 5, got("1", "A") + got("2", "A")),
        ("c", "ack", ["1", "2"], 6, 7, None),
    )
    twice[0].info, twice[1].info = {"dedupe": True}, {"dedupe": True, "retry": True}
    assert "several ids" in total_queue.check(twice).reason
    twice[0].info = None
    assert total_queue.check(twice).require().counts[total_queue.TWICE] == 1


def test_an_ack_of_one_copy_says_nothing_about_the_other() -> None:
    one, other = leased("1", "A", "64.1"), leased("2", "A", "64.1")
    rows: list[Row] = [
        ("p", "produce", "A", 0, None, None),
        ("p", "produce", "A", 2, 3, "1"),
        ("c", "consume", None, 4, 5, one),
        ("c", "ack", "1", 6, 7, None),
        ("c", "consume", None, 8, 9, other),
        ("c", "ack", "2", 10, 11, None),
    ]
    twice = history(*rows)
    twice[1].info = {"retry": True}
    total_queue.check(twice, causes=total_queue.CAUSES).require()
    again = history(*rows, ("c", "consume", None, 12, 13, leased("2", "A", "1025.1")))
    again[1].info = {"retry": True}
    assert "after its ack" in total_queue.check(again).reason


def test_what_is_still_stored_is_not_lost_unless_it_was_acked() -> None:
    total_queue.check(history(PRODUCED), leftovers={"1"}).require()
    total_queue.check(history(PRODUCED), leftovers=None).require()
    assert total_queue.check(GOOD["once through"], leftovers={"1"}).valid is False


def test_fifo_follows_each_producer() -> None:
    def order(*bodies: str) -> Verdict:
        rows: list[Row] = [
            ("p", "produce", "A", 0, 1, "1"),
            ("p", "produce", ["B", "C"], 2, 3, ["2", "3"]),
            ("o", "produce", "X", 0, 1, "4"),
        ]
        rows += [
            ("c", "consume", None, 10 + at, 11 + at, got(body, body))
            for at, body in enumerate(bodies)
        ]
        return total_queue.fifo(history(*rows))

    order("A", "X", "B", "C").require()
    order("X", "A", "B", "A", "C").require()
    assert order("A", "C", "B").valid is False
    assert order("B", "A", "C").valid is False


def test_sets_keep_what_was_added_and_invent_nothing() -> None:
    adds = history(("a", "add", 1, 0, 1, None), ("a", "add", 2, 2, None, None))
    sets.check(adds, [1]).require()
    assert sets.check(adds, [1, 2]).counts["recovered"] == 1
    assert sets.check(adds, [2]).valid is False
    assert sets.check(adds, [1, 3]).valid is False
