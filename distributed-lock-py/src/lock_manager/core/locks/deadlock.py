"""Would this wait never end? (guarantee 7)

A client can go on when each of its waits fits beside what is left: the holders and the waiters
before it that cannot go on themselves. So: take away, again and again, every client that can go
on, with all it holds and waits for. There is a deadlock if the client that asks remains. (This is
the reduction of a resource graph, Holt 1972; following single edges is not enough for semaphores,
where it suffices that *some* holder goes.)

Before the request everything could be taken away, because every wait was checked when it began and
releases only help. What the new wait adds leads to or from the requester, hence every deadlock
contains it, each remaining client is blocked by a remaining one, and following these blockers from
the requester leads back to it: the cycle that is named.

Cost: nothing for a client that holds and awaits nothing else, which nobody can be waiting for; else
linear in the holders and waiters that are reachable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lock_manager.core.locks.state import Hold, Lock
from lock_manager.core.locks.table import LockTable

_LOOK_AT = 64  # holds looked at for the short cut; with more, the search decides


def find_cycle(table: LockTable, requester: str) -> tuple[str, ...]:
    """The cycle that the waits of `requester` close: client ids, the requester first, each waiting
    for the next; empty if there is none. The requester must be in its queues already."""
    if not _may_block_others(table, requester):
        return ()
    graph = _Graph(table, requester)
    graph.reduce()
    return () if requester in graph.gone else graph.cycle(requester)


def _may_block_others(table: LockTable, requester: str) -> bool:
    client = table.clients[requester]
    waits = client.waits or {}
    if len({waiter.waiter_id for waiter in waits.values()}) > 1:
        return True
    for looked_at, hold in enumerate(client.each_hold()):
        lock = table.locks[hold.lock_name]
        if looked_at >= _LOOK_AT or lock.waited_for:
            return True
    return False


class _Line:
    """One lock as the reduction sees it: a queue whose satisfied part grows from the front.

    Invariant: load == weights of the remaining holders + of the remaining places before `reached`.
    """

    __slots__ = ("capacity", "clients", "extras", "gone", "load", "lock", "reached", "weights")

    def __init__(self, lock: Lock) -> None:
        self.lock = lock
        self.capacity = lock.capacity
        self.load = lock.load
        places = list(lock.places())
        self.clients = [place.waiter.client_id for place in places]
        self.weights = [place.weight for place in places]
        self.extras = [lock.added_by(place) for place in places]
        self.gone = [False] * len(places)
        self.reached = 0

    def advance(self) -> Iterator[str]:
        """Clients whose wait for this lock is satisfied by now and was not before. (A place that
        adds nothing to the client's hold never has to wait and is not reported.)"""
        while self.reached < len(self.clients):
            at = self.reached
            if not self.gone[at] and self.extras[at]:
                if self.load + self.extras[at] > self.capacity:
                    return
                self.load += self.extras[at]
                yield self.clients[at]
            self.reached += 1

    def leave(self, place: int) -> None:
        self.gone[place] = True
        if place < self.reached:
            self.load -= self.extras[place]


class _Graph:
    def __init__(self, table: LockTable, requester: str) -> None:
        self._table = table
        self.gone: set[str] = set()
        self._lines: dict[str, _Line] = {}
        self._unsatisfied: dict[str, int] = {}
        self._places: dict[str, list[tuple[_Line, int]]] = {}
        self._holds: dict[str, list[tuple[_Line, Hold]]] = {}
        self._explore(requester)

    def _explore(self, requester: str) -> None:
        """Everybody for whom the requester waits, directly or not."""
        found = deque((requester,))
        known = {requester}
        while found:
            client = self._table.clients.get(found.popleft())
            waits = (client.waits or {}) if client is not None else {}
            if client is not None:
                self._unsatisfied[client.client_id] = len(waits)
            for name in waits:
                if name in self._lines:
                    continue
                line = self._lines[name] = _Line(self._table.locks[name])
                for place, waiting in enumerate(line.clients):
                    self._places.setdefault(waiting, []).append((line, place))
                for hold in line.lock.each_hold():
                    self._holds.setdefault(hold.client_id, []).append((line, hold))
                for blocker in (*self._holders(line), *line.clients):
                    if blocker not in known:
                        known.add(blocker)
                        found.append(blocker)

    @staticmethod
    def _holders(line: _Line) -> Iterator[str]:
        return (hold.client_id for hold in line.lock.each_hold())

    def reduce(self) -> None:
        for line in self._lines.values():
            for client, extra in zip(line.clients, line.extras, strict=True):
                if not extra:
                    self._unsatisfied[client] -= 1
        ready = deque(client for client, waits in self._unsatisfied.items() if not waits)
        for line in self._lines.values():
            self._advance(line, ready)
        while ready:
            client = ready.popleft()
            self.gone.add(client)
            touched: dict[str, _Line] = {}
            for line, hold in self._holds.get(client, ()):
                line.load -= hold.weight
                touched[line.lock.name] = line
            for line, place in self._places.get(client, ()):
                line.leave(place)
                touched[line.lock.name] = line
            for line in touched.values():
                self._advance(line, ready)

    def _advance(self, line: _Line, ready: deque[str]) -> None:
        for client in line.advance():
            self._unsatisfied[client] -= 1
            if not self._unsatisfied[client]:
                ready.append(client)

    def cycle(self, requester: str) -> tuple[str, ...]:
        """The shortest way from the requester over remaining blockers back to it."""
        came_from: dict[str, str] = {}
        search = deque((requester,))
        while search:
            client = search.popleft()
            for blocker in self._blockers(client):
                if blocker == requester:
                    path = [client]
                    while path[-1] != requester:
                        path.append(came_from[path[-1]])
                    return tuple(reversed(path))
                if blocker not in came_from:
                    came_from[blocker] = client
                    search.append(blocker)
        raise AssertionError("a requester that cannot go on waits for itself in the end")

    def _blockers(self, client: str) -> Iterator[str]:
        """Remaining clients that this one must wait for: holders and earlier waiters that do not
        fit beside its request."""
        for line, place in self._places.get(client, ()):
            if place < line.reached or not line.extras[place]:
                continue  # satisfied here
            mine = line.weights[place]
            for hold in line.lock.each_hold():
                other = hold.client_id
                if other == client or other in self.gone:
                    continue
                if self._clash(line, mine, hold.weight):
                    yield other
            for earlier in range(place):
                other = line.clients[earlier]
                if other not in self.gone and self._clash(line, mine, line.weights[earlier]):
                    yield other

    @staticmethod
    def _clash(line: _Line, mine: int, other: int) -> bool:
        """In a semaphore everybody before is in the way of somebody who does not fit."""
        return bool(line.lock.limit) or mine + other > line.capacity
