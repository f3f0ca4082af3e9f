"""Runs of puts against the puts that they are short for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from message_queue.core.messages import Ack, Append, AppendRecord, Entry, Put, Puts
from message_queue.core.replication.records import RecordSet
from message_queue.core.replication.validation import plausible
from message_queue.core.runs import count, last_seq, one_by_one, put_entry, well_formed_run
from message_queue.storage.records import Bodies, UnreadableRecord, decode, encode

EPOCH = 65


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Consecutive entries: runs, and acks of anything before (or after: it may overtake)."""
    entries: list[Entry] = []
    seq = draw(st.sampled_from([1, 1020]))
    first = seq
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.booleans()):
            bodies = draw(st.lists(st.binary(max_size=9), min_size=1, max_size=12))
            entries.append(put_entry(seq, draw(st.sampled_from([b"m", b""])), bodies))
        else:
            low = draw(st.integers(first, seq + 9))
            entries.append(Ack(seq, ((EPOCH, low, draw(st.integers(low, low + 9))),)))
        seq = last_seq(entries[-1]) + 1
    return entries


def fold(entries: list[Entry]) -> RecordSet:
    records = RecordSet()
    for entry in entries:
        records.apply(EPOCH, entry)
    return records


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_run_means_what_its_puts_mean_in_any_order_and_twice(data: st.DataObject) -> None:
    history = data.draw(histories())
    seen = data.draw(st.lists(st.sampled_from(history), max_size=20))
    short, long = fold(seen), fold(list(one_by_one(seen)))
    assert short.held == long.held
    assert short.context == long.context
    assert sum(map(count, history)) == len(list(one_by_one(history)))


@settings(max_examples=100, deadline=None)
@given(histories())
def test_every_body_of_a_record_is_found_by_its_dot(history: list[Entry]) -> None:
    record = decode(encode(AppendRecord(3, EPOCH, tuple(history))))
    bodies = Bodies(record)
    wanted = {EPOCH << 40 | e.seq: (e.meta, e.body) for e in one_by_one(history)
              if isinstance(e, Put)}  # fmt: skip
    for dot in range((EPOCH << 40) + history[0].seq - 1, (EPOCH << 40) + last_seq(history[-1]) + 2):
        try:
            assert bodies.find(dot) == wanted.pop(dot)
        except KeyError:
            assert dot not in wanted
    assert not wanted


def test_sizes_that_do_not_add_up_are_refused_from_peers_and_files() -> None:
    good = put_entry(1, b"", [b"ab", b"c"])
    assert isinstance(good, Puts)
    assert well_formed_run(good)
    owner = EPOCH  # epoch % 1024: the node that the epoch belongs to
    assert plausible(owner, Append(1, EPOCH, (good, Ack(3, ((EPOCH, 1, 2),)))))
    assert not plausible(owner, Append(1, EPOCH, (good, Ack(2, ((EPOCH, 1, 1),)))))
    for bad in (
        Puts(1, b"", b"", b""),
        Puts(1, b"", b"\x02\0\0", b"ab"),
        Puts(1, b"", b"\x02\0\0\0", b"a"),
        Puts(1, b"", b"\xff\xff\xff\xff", b"a"),
    ):
        assert not plausible(owner, Append(1, EPOCH, (bad,)))
        try:
            decode(encode(AppendRecord(1, EPOCH, (bad,))))
        except UnreadableRecord:
            continue
        raise AssertionError("a file's run was not looked at")
