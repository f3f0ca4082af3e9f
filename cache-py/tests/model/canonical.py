"""When are two worlds the same? When they differ only in names that nobody can tell apart.

Numbers, request ids, operation ids and tokens are only ever compared within their own space (a
home's, a node's), so only their rank counts. Points in time count by their distance from now. Nodes
that play the same part may change places: the smallest of the permuted pictures stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from mesi_cache.core.cache.line import Call, Change, Line, Request, Session
from mesi_cache.core.cache.table import PUTTING, Event
from mesi_cache.core.directory.entry import Asked, Copy, Entry
from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import GetM, GetS, Renew, RenewAck

# Spaces of names: 4 bits of kind and 4 of node above everything that a name can be.
_SPACE, _NODE = 72, 68
_NUMBER, _REQUEST, _OPERATION, _TOKEN = 1, 2, 3, 4
_EPOCH = 40  # names of different lives are never equal in rank

Flat = list[Any]


class Picture:
    """One machine (or the letters) as a flat list, under one renaming of the nodes."""

    def __init__(self, names: list[str], renamed: dict[str, str], now_ms: float) -> None:
        self.out: Flat = []
        self._as = renamed
        self._place = {name: place for place, name in enumerate(names)}
        self._now_ms = now_ms

    # --- names ----------------------------------------------------------------------------------

    def _in(self, kind: int, node: str, name: float) -> Any:
        if not name or name == float("inf"):
            return name
        return kind << _SPACE | self._place[self._as[node]] << _NODE | int(name)

    def _ms(self, at_ms: float) -> float:
        """A point in time: how far ahead it is; one that is over is over."""
        return at_ms - self._now_ms if at_ms > self._now_ms else -1.0

    def _since(self, at_ms: float) -> float:
        return at_ms - self._now_ms

    def _rest(self, thing: Any, known: frozenset[str]) -> None:
        """Fields that came into being after this page was written: as they are."""
        for name in type(thing).__slots__:
            if name not in known:
                self.out.append(repr(getattr(thing, name)))

    # --- a machine --------------------------------------------------------------------------------

    def machine(self, machine: Machine) -> Flat:
        me, cache, home = machine.settings.me, machine.cache, machine.directory
        self.out += [self._as[me], machine.epoch]
        for name, life in sorted((self._as[n], life) for n, life in machine.incarnations.items()):
            self.out += [name, life]
        self.out += ["lines", *cache.lines, "table"]
        for key in sorted(cache.table):
            self._line(me, cache.table[key])
        self.out.append("sessions")
        for name in sorted(cache.sessions, key=self._as.__getitem__):
            self._session(me, name, cache.sessions[name])
        self.out.append("unresolved")
        for call in cache._unresolved.values():
            self._call(me, call)
        self.out.append("resends")
        for at_ms, key, event, ref in cache._resends:
            line = cache.table.get(key)
            if line is not None and _matters(line, event, ref):
                self.out += [self._ms(at_ms), key, event]
        self._home(me, home)
        return self.out

    _LINE = frozenset(Line.__slots__)

    def _line(self, me: str, line: Line) -> None:
        record = line.record
        self.out += [
            line.key, line.state, record.value, record.version, record.expires_ms,
            self._in(_NUMBER, line.home, line.number), self._ms(line.until_ms),
            self._ms(line.stop_ms), self._ms(line.put_until_ms), line.session.epoch,
        ]  # fmt: skip
        for change in line.changes:
            self._change(me, change)
        if line.request is not None:
            self._request(me, line.home, line.request)
        self.out.append("waiting")
        for call in line.waiting:
            self._call(me, call)

    def _change(self, me: str, change: Change) -> None:
        self.out += ["change", repr(change.outcome), repr(change.record), self._ms(change.stop_ms)]
        self._call(me, change.call)
        for call, outcome in change.followers:
            self._call(me, call)
            self.out.append(repr(outcome))

    def _request(self, me: str, home: str, request: Request) -> None:
        self.out += [
            "request", self._in(_REQUEST, me, request.id), self._since(request.first_ms),
            self._in(_TOKEN, me, request.first_token), self._in(_NUMBER, home, request.killed),
            self._in(_TOKEN, me, request.cutoff_token),
        ]  # fmt: skip
        if request.call is not None:
            self._call(me, request.call)

    _CALL = frozenset(Call.__slots__)

    def _call(self, me: str, call: Call) -> None:
        self.out += [
            self._in(_TOKEN, me, call.token), call.key, repr(call.operation),
            self._in(_OPERATION, me, call.operation_id), self._since(call.joined_ms), call.missed,
            call.sent, call.done, repr(call.once),
        ]  # fmt: skip

    def _session(self, me: str, home: str, session: Session) -> None:
        self.out += [self._as[home], session.epoch, session.lines, self._ms(session.until_ms)]
        self.out += [self._since(session.renew_sent), "renewing"]
        for request, sent_ms in session.renewing.items():
            self.out += [self._in(_REQUEST, me, request), self._since(sent_ms)]
        self.out += ["waiting", *session.waiting]

    # --- a home --------------------------------------------------------------------------------

    def _home(self, me: str, home: Any) -> None:
        self.out += ["home", self._ms(home.grants_from_ms)]
        for key in sorted(home.entries):
            self._entry(me, home.entries[key])
        for source in sorted(home._session_until, key=self._as.__getitem__):
            self.out += [self._as[source], self._ms(home._session_until[source])]
        self.out.append("unacked")
        for source in sorted(home.unacked, key=self._as.__getitem__):
            for key, message in sorted(home.unacked[source].items()):
                self.out += [self._as[source], key]
                self._message(me, source, message)
        self.out.append("held")
        for asked in home._held.values():
            self._asked(asked)
        self.out.append("timers")
        for at_ms, number, key in sorted(home._timers):
            entry = home.entries.get(key)
            if entry is not None and entry.number == number:
                self.out += [self._ms(at_ms), key]
        self._applied(home.applied)
        self.out.append("retries")
        for name, (_, until_ms, outcome) in home.retries._kept.items():
            self.out += [name, until_ms, repr(outcome)]

    def _entry(self, me: str, entry: Entry) -> None:
        record = entry.record
        self.out += [
            entry.key, entry.state, record.value, record.version, record.expires_ms,
            self._in(_NUMBER, me, entry.number), "copies",
        ]  # fmt: skip
        for source in sorted(entry.copies, key=self._as.__getitem__):
            self._copy(me, source, entry.copies[source])
        if entry.current is not None:
            self.out.append("current")
            self._asked(entry.current)
        self.out.append("queue")
        for asked in entry.queue.values():
            self._asked(asked)
        self.out.append("waits")
        for source in sorted(entry.waits, key=self._as.__getitem__):
            self.out += [self._as[source], self._ms(entry.waits[source])]
        self._rest(entry, _ENTRY)

    def _copy(self, me: str, source: str, copy: Copy) -> None:
        self.out += [
            self._as[source], self._in(_NUMBER, me, copy.number), self._ms(copy.until_ms),
            copy.incarnation, self._in(_REQUEST, source, copy.request), copy.state,
        ]  # fmt: skip
        self._rest(copy, _COPY)

    def _asked(self, asked: Asked) -> None:
        self.out += [self._as[asked.source], asked.incarnation, repr(asked.result)]
        self._message(asked.source, "", asked.message)
        self._rest(asked, _ASKED)

    def _applied(self, applied: Any) -> None:
        self.out.append("applied")
        for source in sorted(applied._floors, key=self._as.__getitem__):
            self.out += [self._as[source], self._in(_OPERATION, source, applied._floors[source])]
        for source in sorted(applied._outcomes, key=self._as.__getitem__):
            for operation_id, outcome in sorted(applied._outcomes[source].items()):
                self.out += [self._in(_OPERATION, source, operation_id), repr(outcome)]

    # --- messages ------------------------------------------------------------------------------

    def letter(self, home: str, source: str, target: str, life: int, message: Any) -> Flat:
        """`home` is that of the message's key."""
        self.out += [self._as[source], self._as[target], life]
        self._message(source, target, message, home)
        return self.out

    def _message(self, source: str, target: str, message: Any, home: str = "") -> None:
        """A field means the same in every message that has it."""
        home = home or source
        cache = target if home == source else source
        if isinstance(message, GetS | GetM | Renew):
            cache = source
        elif isinstance(message, RenewAck):
            cache = target
        self.out.append(type(message).__name__)
        for name in message.__struct_fields__:
            value = getattr(message, name)
            match name:
                case "number":
                    self.out.append(self._in(_NUMBER, home, value))
                case "request":
                    self.out.append(self._in(_REQUEST, cache, value))
                case "operation_id" | "floor":
                    self.out.append(self._in(_OPERATION, cache, value))
                case "origin":
                    pass  # only for people
                case "pending":
                    for pending in value:
                        self._message(home, cache, pending, home)
                case _:
                    plain = isinstance(value, msgspec.Struct)
                    self.out.append(repr(value) if plain else value)


_ENTRY = frozenset(Entry.__slots__)
_COPY = frozenset(Copy.__slots__)
_ASKED = frozenset(Asked.__slots__)


def _matters(line: Line, event: Event, ref: int) -> bool:
    """Would this timer still do something?"""
    match event:
        case Event.LOAD:
            return line.request is not None and line.request.id == ref
        case Event.EVICT:
            return line.state in PUTTING and line.number == ref
        case _:
            return bool(line.changes)


def ranked(machines: Iterable[Flat], letters: Iterable[Flat], more: Flat) -> int:
    """One world's mark: names by their rank in their space, letters as a set."""
    machines, letters = list(machines), list(letters)
    first = 1 << _SPACE
    names = {
        leaf for flat in (*machines, *letters, more) for leaf in flat
        if type(leaf) is int and leaf >= first
    }  # fmt: skip
    ranks: dict[int, int] = {}
    space, rank = -1, 0
    for name in sorted(names):
        rank = rank + 1 if name >> _EPOCH == space else 1
        space = name >> _EPOCH
        ranks[name] = (space << 8) + rank
    get = ranks.get

    def by_rank(flat: Flat) -> tuple[Any, ...]:
        return tuple([get(x, x) if type(x) is int else x for x in flat])

    shuffled = sorted(map(repr, map(by_rank, letters)))
    return hash((tuple(map(by_rank, machines)), tuple(shuffled), by_rank(more)))
