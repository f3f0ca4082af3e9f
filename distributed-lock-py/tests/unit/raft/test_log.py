"""The log against a plain list: terms, hints, writes, and what of it a power cut would keep."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lock_manager.core.invariants import DiskImage
from lock_manager.core.raft import Configuration, Entry, EntryKind, Snapshot
from lock_manager.core.raft.log import RaftLog

steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4), st.integers(0, 2)),
        st.tuples(st.just("truncate"), st.integers(0, 12), st.just(0)),
        st.tuples(st.just("compact"), st.integers(0, 12), st.integers(0, 3)),
        st.tuples(st.just("install"), st.integers(0, 14), st.integers(0, 1)),
        st.tuples(st.just("write"), st.just(0), st.just(0)),
        st.tuples(st.just("synced"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


class Model:
    """What RaftLog must look like from outside, as plainly as possible."""

    def __init__(self) -> None:
        self.terms: dict[int, int] = {}  # of every retained entry
        self.base = (0, 0)

    @property
    def last(self) -> int:
        return max(self.terms, default=self.base[0])

    def term(self, index: int) -> int | None:
        return self.base[1] if index == self.base[0] else self.terms.get(index)


def entry(index: int, term: int) -> Entry:
    return Entry(index, term, EntryKind.COMMAND, b"%d" % index)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_the_log_agrees_with_a_plain_list(steps: list[tuple[str, int, int]]) -> None:
    log, model = RaftLog(Snapshot(), ()), Model()
    disk, writes = DiskImage(), []
    term = 1
    for name, number, extra in steps:
        match name:
            case "append":
                term += extra
                fresh = [entry(model.last + 1 + i, term) for i in range(number)]
                log.append(fresh)
                model.terms.update({one.index: one.term for one in fresh})
            case "truncate":
                index = max(number, log.snapshot.index + 1, model.base[0] + 1)
                log.truncate_from(index)
                model.terms = {at: t for at, t in model.terms.items() if at < index}
                term += 1
            case "compact":
                index = min(log.snapshot.index + number, model.last)
                at = model.term(index)
                if index <= log.snapshot.index or at is None:
                    continue
                log.compact(Snapshot(index, at, Configuration(), b""), keep_entries=extra)
                base = max(model.base[0], index - extra)
                model.base = (base, model.term(base) or 0)
                model.terms = {at: t for at, t in model.terms.items() if at > base}
            case "install":
                index = log.snapshot.index + number
                if index <= log.snapshot.index or index < model.base[0]:
                    continue
                known = model.term(index)
                at_term = known if known is not None and extra else term + 1
                term = max(term, at_term)
                log.install(Snapshot(index, at_term, Configuration(), b""))
                keep = known == at_term
                model.terms = {at: t for at, t in model.terms.items() if keep and at > index}
                model.base = (index, at_term)
            case "write":
                if (write := log.take_write(None)) is not None:
                    writes.append(write)
            case "synced" if writes:
                write = writes.pop(0)
                disk.apply(write)
                log.written(write.seq)
        check(log, model)
        # Whatever the log calls durable, a power cut keeps.
        durable = log.durable_index
        durable_term = log.term_at(durable)
        assert disk.last_index >= min(durable, model.last)
        if durable_term is not None:
            assert disk.holds(durable, durable_term), durable
    while (write := log.take_write(None)) is not None:
        writes.append(write)
    for write in writes:
        disk.apply(write)
        log.written(write.seq)
    assert log.durable_index == log.last_index
    again = RaftLog(disk.snapshot, disk.restored.entries)
    kept = {i: log.term_at(i) for i in range(log.snapshot.index, log.last_index + 1)}
    assert {i: again.term_at(i) for i in range(again.base_index, again.last_index + 1)} == kept


def check(log: RaftLog, model: Model) -> None:
    assert log.last_index == model.last
    assert (log.base_index, log.base_term) == model.base
    assert log.last_term == model.term(model.last)
    for index in range(model.last + 3):
        assert log.term_at(index) == model.term(index)
        for term in range(6):
            at_most = [
                at
                for at in range(model.base[0] + 1, min(index, model.last) + 1)
                if (model.term(at) or 0) <= term
            ]
            assert log.last_index_not_above(index, term) == max(at_most, default=model.base[0])


def test_a_batch_keeps_to_its_limits_but_carries_at_least_one_entry() -> None:
    log = RaftLog(Snapshot(), ())
    log.append([Entry(i, 1, EntryKind.COMMAND, b"x" * 100) for i in range(1, 11)])
    assert [e.index for e in log.batch(3, 4, 10_000)[0]] == [3, 4, 5, 6]
    assert [e.index for e in log.batch(3, 99, 350)[0]] == [3, 4, 5]
    assert [e.index for e in log.batch(9, 99, 1)[0]] == [9]


def test_a_write_under_way_does_not_vouch_for_entries_that_replaced_it() -> None:
    """The same entries come back after a conflict: on disk is still the conflict (the ABA
    problem)."""
    log = RaftLog(Snapshot(), ())
    log.append([entry(1, 1), entry(2, 2)])
    first = log.take_write(None)
    log.truncate_from(2)
    log.append([entry(2, 3)])
    second = log.take_write(None)
    log.truncate_from(2)
    log.append([entry(2, 2)])
    third = log.take_write(None)
    assert first is not None
    assert second is not None
    assert third is not None
    log.written(first.seq)
    assert log.durable_index == 1
    log.written(second.seq)
    assert log.durable_index == 1
    log.written(third.seq)
    assert log.durable_index == 2
