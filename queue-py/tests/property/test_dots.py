"""Sets of dots and the union of record sets, against naive models."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from message_queue.core.messages import Ack, Entry, Put, Set
from message_queue.core.replication.dots import DotSet, joined, well_formed, well_formed_chunks
from message_queue.core.replication.intervals import Intervals
from message_queue.core.replication.records import RecordSet, merged

EPOCHS = st.sampled_from([65, 130])
SPANS = st.lists(
    st.tuples(EPOCHS, st.integers(1, 3000), st.integers(0, 1500)).map(
        lambda t: (t[0], t[1], t[1] + t[2])
    ),
    max_size=8,
)


def flat(spans: object) -> set[tuple[int, int]]:
    return {(e, s) for e, first, last in spans for s in range(first, last + 1)}


@settings(deadline=None)
@given(SPANS, SPANS, SPANS)
def test_a_dot_set_is_a_set_of_dots(added: list, removed: list, other: list) -> None:
    dots = DotSet(added)
    model = flat(added)
    for span in removed:
        assert flat(dots.remove_range(*span)) == model & flat([span])
        model -= flat([span])
    assert len(dots) == len(model)
    assert set(dots.dots()) == model
    assert well_formed(dots.spans())
    assert flat(dots.minus(DotSet(other)).spans()) == model - flat(other)
    for span in other:
        assert flat(dots.within(span)) == model & flat([span])
        assert flat(dots.outside((span,))) == flat([span]) - model
    assert set(dots.common(DotSet(other)).dots()) == model & flat(other)
    assert well_formed_chunks(dots.chunks())
    assert DotSet.of(dots.chunks()) == dots
    assert len(DotSet.of(dots.chunks())) == len(dots)
    union = dots.copy()
    union.update(DotSet(other))
    assert set(union.dots()) == model | flat(other)
    assert len(union) == len(model | flat(other))


@settings(deadline=None)
@given(SPANS, SPANS)
def test_intervals_are_a_set_of_dots(added: list, removed: list) -> None:
    intervals = Intervals(added)
    model = flat(added)
    for span in removed:
        intervals.remove(*span)
        model -= flat([span])
    assert flat(intervals.spans()) == model
    assert joined(intervals.spans()) == intervals.spans(), "neighbours that touch are one"
    for epoch in (65, 130):
        run = 0
        while (epoch, run + 1) in model:
            run += 1
        assert intervals.contiguous(epoch) == run
    for span in added:
        assert flat(intervals.within(span)) == model & flat([span])


def test_a_hostile_span_costs_no_more_than_what_is_there() -> None:
    dots = DotSet([(65, 1, 10)])
    assert dots.remove_range(65, 1, 2**53) == ((65, 1, 10),)
    assert dots.within((65, 1, 2**53)) == ()


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """One owner's records: acks name earlier puts, settings overwrite and remove each other."""
    entries: list[Entry] = []
    for seq in range(1, draw(st.integers(1, 30)) + 1):
        puts = [e.seq for e in entries if isinstance(e, Put)]
        kind = draw(st.sampled_from(["put", "put", "ack", "set"]))
        if kind == "ack" and puts:
            target = draw(st.sampled_from(puts))
            entries.append(Ack(seq, ((65, target, target),)))
        elif kind == "set":
            entries.append(
                Set(seq, draw(st.sampled_from("ab")), draw(st.sampled_from([b"", b"x"])))
            )
        else:
            entries.append(Put(seq, b"", b""))
    return entries


def fold(entries: list[Entry]) -> RecordSet:
    records = RecordSet()
    for entry in entries:
        records.apply(65, entry)
    return records


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_union_is_what_somebody_who_saw_everything_holds(data: st.DataObject) -> None:
    """Whatever part of a history each replica has, in whatever order and however often it came, the
    merge equals the fold of all that any of them has."""
    history = data.draw(histories())
    parts, seen = [], set()
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.lists(st.sampled_from(history), max_size=40))
        seen |= {entry.seq for entry in part}
        parts.append(fold(part))
    union = merged(parts)
    whole = fold([entry for entry in history if entry.seq in seen])
    assert union.held == whole.held
    assert union.context == whole.context
    assert union.settings == whole.settings


def test_an_ack_that_overtakes_its_put_voids_it() -> None:
    records = RecordSet()
    records.apply(65, Ack(2, ((65, 1, 1),)))
    records.apply(65, Put(1, b"", b""))
    assert not records.held
    assert records.context.contiguous(65) == 2


def test_a_withdrawn_put_is_neither_held_nor_acked() -> None:
    lost, whole = fold([Put(1, b"", b""), Put(2, b"", b"")]), fold([Put(1, b"", b"")])
    lost.withdraw(((65, 1, 1),))
    assert merged([lost, whole]).held.spans() == ((65, 1, 2),)
