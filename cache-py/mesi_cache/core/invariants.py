"""What must be true of a cluster at every instant, executable. A sentence above each.

State checks look at one machine (`check_machine`) or at all machines at the same instant
(`check_cluster`); step checks compare with what was true before (`Ledger`). The simulation and the
model checker run all of them after every step.
"""

from collections.abc import Iterable, Sequence

from mesi_cache.core.cache.line import Line
from mesi_cache.core.cache.table import ASKING, OWNING, READABLE
from mesi_cache.core.cache.table import State as LineState
from mesi_cache.core.directory.entry import Entry
from mesi_cache.core.directory.table import BUSY
from mesi_cache.core.directory.table import State as EntryState
from mesi_cache.core.machine import Machine
from mesi_cache.core.numbers import epoch_of
from mesi_cache.core.records import Record

View = tuple[Machine, float]  # a running machine and its own clock's time, in milliseconds


def check_machine(machine: Machine) -> None:
    """Everything that one node can tell by itself."""
    cache = machine.cache
    # The cache never holds more lines than it has slots.
    assert len(cache.lines) <= machine.settings.capacity, "more lines than slots"
    # A line holds a slot exactly while its copy can be read.
    for key, line in cache.table.items():
        holds = cache.lines.get(key) is line
        assert holds == (line.state in READABLE), f"{key}: {line.state}, slot {holds}"
        _check_line(line)
    assert all(key in cache.table for key in cache.lines), "a slot without its line"
    # A home's session counts exactly the slots that it keeps alive.
    for home, session in cache.sessions.items():
        lines = [line for line in cache.lines.values() if line.session is session]
        assert session.lines == len(lines), f"{home}: session counts {session.lines}"
    for entry in machine.directory.entries.values():
        _check_entry(entry)


def _check_line(line: Line) -> None:
    name = f"{line.key} in {line.state}"
    # A request is under way exactly in the states that wait for data.
    assert (line.request is not None) == (line.state in ASKING), f"{name}: request"
    # Changes wait for the home only where this node is the owner, in consecutive versions.
    assert not line.changes or line.state in OWNING, f"{name}: changes"
    for place, change in enumerate(line.changes, 1):
        assert change.record.version == line.record.version + place, f"{name}: versions"
    # A slot never holds an absent value; a line without slot holds no value.
    assert (line.record.value is not None) == (line.state in READABLE), f"{name}: value"
    # Nobody waits on a line that does nothing for him.
    idle = line.state is LineState.I
    assert not (idle and any(not call.done for call in line.waiting)), f"{name}: forgotten"


def _check_entry(entry: Entry) -> None:
    name = f"{entry.key} in {entry.state} at home"
    copies = len(entry.copies)
    match entry.state:
        case EntryState.U | EntryState.N | EntryState.BUSY_LOAD:
            assert copies == 0, f"{name}: {copies} copies"
        case EntryState.EM | EntryState.BUSY_FETCH:
            assert copies == 1, f"{name}: {copies} copies"
        case EntryState.S | EntryState.BUSY_INV:
            assert copies >= 1, f"{name}: no copy"
            assert all(c.state == "S" for c in entry.copies.values()), f"{name}: an owner"
    # Whoever is waited for is known to hold a copy; whoever is busy is so for a request.
    assert entry.waits.keys() <= entry.copies.keys(), f"{name}: waits for nobody"
    waiting = entry.state in (EntryState.BUSY_INV, EntryState.BUSY_FETCH)
    assert bool(entry.waits) == waiting, f"{name}: waits"
    assert (entry.current is not None) == (entry.state in BUSY), f"{name}: current request"
    # Shared copies are of a value that exists.
    if copies and entry.state in (EntryState.S, EntryState.BUSY_INV):
        assert entry.record.value is not None, f"{name}: copies of nothing"
    # Requests wait only behind a transaction.
    assert not entry.queue or entry.state in BUSY, f"{name}: an idle queue"


def check_cluster(views: Sequence[View]) -> None:
    """Everything that only an observer of all nodes at one instant can tell."""
    machines = {machine.settings.me: (machine, now_ms) for machine, now_ms in views}
    live: dict[str, list[tuple[Machine, Line]]] = {}
    for machine, now_ms in views:
        for line in machine.cache.lines.values():
            if line.alive(now_ms):
                live.setdefault(line.key, []).append((machine, line))
    for key, copies in live.items():
        # Single writer or many readers: beside an owner's copy nobody has any.
        owners = [machine for machine, line in copies if line.state in OWNING]
        assert not owners or len(copies) == 1, (
            f"{key}: {[(m.settings.me, str(line.state), line.number) for m, line in copies]}"
        )
        # All copies that can be read hold the same version of the same value.
        records = {(line.record.version, line.record.value) for _, line in copies}
        assert len(records) == 1, f"{key}: copies differ: {records}"
        home = machines.get(copies[0][1].home)
        if home is not None:
            for machine, line in copies:
                _check_covered(*home, machine, line)


def _check_covered(home: Machine, home_ms: float, machine: Machine, line: Line) -> None:
    name = f"{line.key} on {machine.settings.me} ({line.state}, {line.number})"
    if epoch_of(line.number) != home.epoch:
        # Copies of an earlier epoch live only while the home does not grant yet.
        assert home_ms < home.directory.grants_from_ms, f"{name}: outlived its home's epoch"
        return
    # The directory covers every copy that can be read.
    entry = home.directory.entries.get(line.key)
    copy = entry.copies.get(machine.settings.me) if entry is not None else None
    assert entry is not None, f"{name}: unknown at home"
    assert copy is not None, f"{name}: no such copy at home"
    assert copy.incarnation == machine.epoch, f"{name}: of another incarnation"
    # (A fetch that left a shared copy has renumbered it before its acknowledgement is there.)
    known = max(copy.number, entry.number) if entry.waits else copy.number
    assert known >= line.number, f"{name}: home knows only {known}"
    # A shared copy shows what the home's log says; an owner's may lag while a change is logged and
    # the acknowledgement is on its way (nobody else can read the key meanwhile).
    if line.state in OWNING or copy.state != "S":
        assert line.record.version <= entry.record.version, f"{name}: ahead of its home"
    else:
        assert line.record.version == entry.record.version, f"{name}: not what its home has"


class Ledger:
    """Step checks: what was once logged or acknowledged stays."""

    def __init__(self) -> None:
        self._logged: dict[str, Record] = {}
        self._acknowledged: dict[str, int] = {}

    def logged(self, key: str, record: Record) -> None:
        """Versions grow by one with every change that a home logs."""
        before = self._logged.get(key)
        expected = before.version + 1 if before else 1
        assert record.version == expected, f"{key}: {record.version} logged, not {expected}"
        self._logged[key] = record

    def acknowledged(self, key: str, version: int) -> None:
        """A client was told that `version` exists, so it is in the home's log."""
        before = self._logged.get(key)
        assert before is not None, f"{key}: acknowledged, but never logged"
        assert version <= before.version, f"{key}: {version} acknowledged"
        self._acknowledged[key] = max(version, self._acknowledged.get(key, 0))

    def recovered(self, records: Iterable[tuple[str, Record]]) -> None:
        """A home restarts with at least what was acknowledged; the unacknowledged rest may be gone,
        and then its versions are free again."""
        for key, record in records:
            floor = self._acknowledged.get(key, 0)
            assert record.version >= floor, f"{key}: {floor} acknowledged, {record.version} kept"
            self._logged[key] = record
