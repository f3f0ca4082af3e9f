"""The lock table: who holds what, who stands where, and the mechanics that keep both right.

This room knows nothing of commands, answers or request ids (machine.py does). Its rule: whatever
frees capacity marks the lock as dirty, and `take_grantable` later finds who may be let in. Costs
do not depend on how many locks, clients or waiters there are: only on those touched.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator

from lock_manager.core.locks.commands import Ask
from lock_manager.core.locks.replies import Granted, HolderView
from lock_manager.core.locks.state import Client, Hold, Lock, Place, Waiter, weight_of
from lock_manager.core.locks.timers import Timers

# Guarantee 9: how long a grant of which nobody could be told, and a waiter whose leader is gone,
# stay for a retry.
GRACE_MS = 10_000


class LockTable:
    def __init__(self) -> None:
        self.now_ms = 0  # cluster time
        self.token = 0  # the last fencing token given out
        self.locks: dict[str, Lock] = {}
        self.clients: dict[str, Client] = {}
        self.waiters: dict[int, Waiter] = {}
        self.ends: Timers[Hold] = Timers()  # leases and reaping
        self.delays: Timers[Lock] = Timers()
        # Told of each lock before it or a hold on it changes (a snapshot that is being written).
        self.before_change: Callable[[Lock], None] | None = None
        # If all that happens is that its lease is renewed: told of the hold instead.
        self.before_renewal: Callable[[Hold], None] | None = None
        self._dirty: deque[str] = deque()

    # ------------------------------------------------------------------------------- looking up

    def client(self, client_id: str) -> Client:
        client = self.clients.get(client_id)
        if client is None:
            client = self.clients[client_id] = Client(client_id)
        return client

    def tidy_client(self, client_id: str) -> None:
        client = self.clients.get(client_id)
        if client is not None and client.idle:
            del self.clients[client_id]

    def hold_of(self, lock_name: str, client_id: str) -> Hold | None:
        lock = self.locks.get(lock_name)
        return None if lock is None else lock.hold_of(client_id)

    def waiter_of(self, client_id: str, lock_name: str) -> Waiter | None:
        client = self.clients.get(client_id)
        return client.waits.get(lock_name) if client is not None and client.waits else None

    def holders(self, lock: Lock, now_ms: int) -> Iterator[HolderView]:
        for hold in lock.each_hold():
            yield HolderView(
                hold.client_id,
                lock.type_of(hold.weight),
                hold.token,
                max(0, hold.expires_ms - now_ms) if hold.ttl_ms else None,
                hold.weight if lock.limit else 0,
            )

    def _touch(self, lock: Lock) -> None:
        """Must come before every change of a lock, its holds or its queues."""
        if self.before_change is not None:
            self.before_change(lock)

    # ---------------------------------------------------------------------------- may it be had?

    def fits_now(self, client_id: str, ask: Ask) -> bool:
        """Whether a request that comes now would get this lock: behind everybody who waits."""
        lock = self.locks.get(ask.lock_name)
        if lock is None:
            return True
        hold = lock.hold_of(client_id)
        extra = weight_of(ask) - (hold.weight if hold else 0)
        if hold and extra <= 0:
            return True
        if lock.free_from_ms:
            return False
        room = lock.capacity - lock.load - extra
        ahead = iter((lock.conversions or {}).values()) if hold else lock.places()
        return self._room_behind(lock, room, ahead) >= 0

    def _may_enter(self, lock: Lock, waiter: Waiter) -> bool:
        """Whether a waiter fits here together with the holders and everybody before it."""
        room = lock.capacity - lock.load
        for place in (lock.conversions or {}).values():
            extra = lock.added_by(place)
            if place.waiter is waiter:
                return extra == 0 or (extra <= room and not lock.free_from_ms)
            room -= extra
        for place in (lock.queue or {}).values():
            if room <= 0 or lock.free_from_ms:
                break
            if place.waiter is waiter:
                return place.weight <= room
            room -= place.weight
        return False

    @staticmethod
    def _room_behind(lock: Lock, room: int, ahead: Iterable[Place]) -> int:
        for place in ahead:
            if room < 0:
                break
            room -= lock.added_by(place)
        return room

    @property
    def is_tidy(self) -> bool:
        """Whether take_grantable has nothing to look at."""
        return not self._dirty

    def take_grantable(self) -> Waiter | None:
        """The next waiter that may be let in now; None: nobody, and the table is tidy.

        The caller grants it (or ends it) before asking again.
        """
        while self._dirty:
            lock = self.locks.get(self._dirty[0])
            waiter = None if lock is None else self.first_ready(lock)
            if waiter is not None:
                return waiter
            name = self._dirty.popleft()
            if lock is not None and lock.idle:
                self.delays.forget(lock)
                del self.locks[name]
        return None

    def first_ready(self, lock: Lock) -> Waiter | None:
        room = lock.capacity - lock.load
        for place in (lock.conversions or {}).values():
            extra = lock.added_by(place)
            fits = extra == 0 or (extra <= room and not lock.free_from_ms)
            if fits and self._may_enter_others(lock, place.waiter):
                return place.waiter
            room -= extra
        for place in (lock.queue or {}).values():
            if room <= 0 or lock.free_from_ms:
                break
            if place.weight <= room and self._may_enter_others(lock, place.waiter):
                return place.waiter
            room -= place.weight
        return None

    def _may_enter_others(self, lock: Lock, waiter: Waiter) -> bool:
        return len(waiter.asks) == 1 or all(
            self._may_enter(self.locks[ask.lock_name], waiter)
            for ask in waiter.asks
            if ask.lock_name != lock.name
        )

    # ------------------------------------------------------------------------------------ holding

    def grant(
        self, client_id: str, asks: tuple[Ask, ...], ttl_ms: int, *, told: int
    ) -> tuple[Granted, ...]:
        """Give the client all of `asks`, by one new token unless it only keeps or reduces."""
        client = self.client(client_id)
        grows = False
        for ask in asks:
            hold = self.hold_of(ask.lock_name, client_id)
            grows = grows or hold is None or hold.weight < weight_of(ask)
        if grows:
            self.token += 1
        return tuple([self._give(client, ask, ttl_ms, told) for ask in asks])

    def grant_free(self, client_id: str, ask: Ask, ttl_ms: int) -> Granted:
        """As `grant`, of one lock that is not in `locks`: nobody has it, wants it or had it."""
        self.token = token = self.token + 1
        name, weight = ask.lock_name, weight_of(ask)
        hold = Hold(name, client_id, weight, token, token, told=1)
        self.locks[name] = Lock(name, ask.limit, weight, hold)
        self.client(client_id).add(hold)
        if ttl_ms:
            hold.ttl_ms = ttl_ms
            hold.expires_ms = self.now_ms + ttl_ms
            self.schedule(hold)
        return Granted(name, ask.lock_type, token, token, ask.permits, ask.limit)

    def _give(self, client: Client, ask: Ask, ttl_ms: int, told: int) -> Granted:
        lock = self._lock(ask)
        self._touch(lock)
        hold = lock.hold_of(client.client_id)
        weight = weight_of(ask)
        if hold is None:
            hold = Hold(lock.name, client.client_id, weight, self.token, self.token, told=told)
            lock.add(hold)
            client.add(hold)
            if not told:
                hold.reap_ms = self.now_ms + GRACE_MS
        else:
            lock.load += weight - hold.weight
            if weight < hold.weight:
                self._dirty.append(lock.name)
            elif weight > hold.weight:
                hold.token = self.token
            hold.weight = weight
            self.claim(hold, told)
        if ttl_ms:
            hold.ttl_ms = ttl_ms
            hold.expires_ms = self.now_ms + ttl_ms
        if hold.ttl_ms or hold.reap_ms:
            self.schedule(hold)
        return Granted(lock.name, ask.lock_type, hold.token, hold.origin, ask.permits, ask.limit)

    def claim(self, hold: Hold, answers: int = 1) -> None:
        """The client is about to be told of this hold by so many more answers."""
        self._touch(self.locks[hold.lock_name])
        hold.told += answers
        if hold.told and hold.reap_ms:
            hold.reap_ms = 0
            self.schedule(hold)

    def disclaim(self, hold: Hold) -> None:
        """One of those answers reached nobody."""
        if hold.told:
            self._touch(self.locks[hold.lock_name])
            hold.told -= 1
            if not hold.told:
                hold.reap_ms = self.now_ms + GRACE_MS
                self.schedule(hold)

    def is_over(self, hold: Hold) -> bool:
        """Whether its time has passed, though nobody came to end it yet."""
        return 0 < hold.due_ms <= self.now_ms

    def renew_all(self, client: Client, ttl_ms: int) -> int:
        """Count the client's leases anew, each by its own length if `ttl_ms` is 0; how many.

        All of them in one step, however many: so nothing is called for a hold unless it must be.
        """
        now_ms, before_renewal = self.now_ms, self.before_renewal
        renewed = 0
        for hold in client.each_hold():
            if not hold.ttl_ms:
                continue
            renewed += 1
            if before_renewal is not None:
                before_renewal(hold)
            if ttl_ms:
                hold.ttl_ms = ttl_ms
            hold.expires_ms = expires = now_ms + hold.ttl_ms
            if hold.reap_ms or not hold.timer_ms or expires < hold.timer_ms:
                self.schedule(hold)
            else:  # its entry in the heap comes up too soon, and is put back then
                hold.due_ms = expires
        return renewed

    def schedule(self, hold: Hold) -> None:
        expires, reap = hold.expires_ms, hold.reap_ms
        hold.due_ms = min(expires, reap) if expires and reap else expires or reap
        self.ends.watch(hold)

    def drop(self, hold: Hold, delay_ms: int = 0) -> None:
        """The hold is over; the lock stays free for `delay_ms`."""
        lock = self.locks[hold.lock_name]
        self._touch(lock)
        lock.remove(hold)
        client = self.clients[hold.client_id]
        client.remove(hold)
        if client.idle:
            del self.clients[hold.client_id]
        if hold.due_ms:
            self.ends.forget(hold)
        if delay_ms:
            lock.free_from_ms = lock.due_ms = self.now_ms + delay_ms
            self.delays.watch(lock)
        if lock.idle and not lock.due_ms:
            del self.locks[lock.name]  # as take_grantable would, without the detour
        else:
            self._dirty.append(lock.name)

    def end_delay(self, lock: Lock) -> None:
        self._touch(lock)
        lock.free_from_ms = lock.due_ms = 0
        self._dirty.append(lock.name)

    def _lock(self, ask: Ask) -> Lock:
        lock = self.locks.get(ask.lock_name)
        if lock is None:
            lock = self.locks[ask.lock_name] = Lock(ask.lock_name, ask.limit)
        elif lock.limit != ask.limit:  # only its delay is left of what it was
            self._touch(lock)
            lock.limit = ask.limit
        return lock

    # ------------------------------------------------------------------------------------- queues

    def enqueue(self, waiter: Waiter) -> None:
        client = self.client(waiter.client_id)
        if client.waits is None:
            client.waits = {}
        self.waiters[waiter.waiter_id] = waiter
        for ask in waiter.asks:
            lock = self._lock(ask)
            self._touch(lock)
            place = Place(waiter, weight_of(ask))
            if lock.hold_of(waiter.client_id) is None:
                lock.queue = lock.queue if lock.queue is not None else OrderedDict()
                lock.queue[waiter.waiter_id] = place
            else:
                lock.conversions = (
                    lock.conversions if lock.conversions is not None else OrderedDict()
                )
                lock.conversions[waiter.waiter_id] = place
            client.waits[ask.lock_name] = waiter

    def dequeue(self, waiter: Waiter) -> None:
        client = self.clients[waiter.client_id]
        waits = client.waits or {}
        del self.waiters[waiter.waiter_id]
        for ask in waiter.asks:
            lock = self.locks[ask.lock_name]
            self._touch(lock)
            if lock.queue is not None and waiter.waiter_id in lock.queue:
                del lock.queue[waiter.waiter_id]
                if not lock.queue:
                    lock.queue = None
            elif lock.conversions is not None:
                del lock.conversions[waiter.waiter_id]
                if not lock.conversions:
                    lock.conversions = None
            del waits[ask.lock_name]
            self._dirty.append(lock.name)
        if not waits:
            client.waits = None
            self.tidy_client(waiter.client_id)
