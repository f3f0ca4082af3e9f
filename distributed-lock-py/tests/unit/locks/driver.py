"""A machine driven by short words, one batch a command, its invariants checked after each."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from lock_manager.core.locks import invariants
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Batch,
    Cancel,
    Command,
    ForceRelease,
    Keepalive,
    LeaderStarted,
    LockType,
    Release,
    ReleaseAll,
    Undelivered,
    decode_batch,
    encode_batch,
    fingerprint,
)
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import Acquired, Outcomes, Queued, Reply


def ask(text: str) -> Ask:
    """`a` exclusive, `a:s` shared, `a:2/3` two of three permits."""
    name, _, kind = text.partition(":")
    if not kind:
        return Ask(name)
    if kind == "s":
        return Ask(name, LockType.SHARED)
    permits, _, limit = kind.partition("/")
    return Ask(name, LockType.SEMAPHORE, int(permits), int(limit))


class Driver:
    def __init__(self) -> None:
        self.machine = LockMachine()
        self.index = 0
        self.now = 0
        self.delay_ms = 0
        self.late: dict[int, Reply] = {}  # answers to tickets
        self.outcomes = Outcomes([], [], [])

    def apply(self, *commands: Command) -> list[Any]:
        self.index += 1
        payload = encode_batch(Batch(self.now, list(commands), self.delay_ms))
        self.outcomes = self.machine.apply(self.index, decode_batch(payload))
        invariants.check(self.machine)
        for resolution in self.outcomes.resolutions:
            for ticket in resolution.tickets:
                self.late[ticket] = resolution.reply
        return self.outcomes.answers

    def acquire(
        self, client: str, *locks: str, wait: int = 10_000, ttl: int = 0, request: str = ""
    ) -> Any:
        command = Acquire(client, tuple(map(ask, locks)), wait, ttl, request)
        return self.apply(replace(command, fingerprint=fingerprint(command)))[0]

    def release(self, client: str, lock: str, token: int = 0, request: str = "") -> Any:
        command = Release(client, lock, token, request)
        return self.apply(replace(command, fingerprint=fingerprint(command)))[0]

    def release_all(self, client: str) -> Any:
        return self.apply(ReleaseAll(client))[0]

    def keepalive(self, client: str, ttl: int = 0) -> Any:
        return self.apply(Keepalive(client, ttl))[0]

    def cancel(self, ticket: int) -> Any:
        return self.apply(Cancel(ticket))[0]

    def undelivered(self, grant: Acquired) -> Any:
        tokens = {one.lock_name: one.fencing_token for one in grant.locks}
        return self.apply(Undelivered(grant.client_id, tokens))[0]

    def force_release(self, lock: str, client: str = "") -> Any:
        return self.apply(ForceRelease(lock, "test", client))[0]

    def new_leader(self) -> None:
        self.apply(LeaderStarted())

    def pass_ms(self, ms: int) -> None:
        self.now += ms
        self.apply()

    # ---- what a test asks

    def token(self, client: str, *locks: str, **more: Any) -> int:
        """Acquire, which must succeed at once; its token."""
        reply = self.acquire(client, *locks, **more)
        assert isinstance(reply, Acquired), reply
        return reply.fencing_token

    def ticket(self, client: str, *locks: str, **more: Any) -> int:
        """Acquire, which must wait; its ticket."""
        reply = self.acquire(client, *locks, **more)
        assert isinstance(reply, Queued), reply
        return reply.ticket

    def holders(self, lock: str) -> list[str]:
        found = self.machine.table.locks.get(lock)
        return [hold.client_id for hold in found.each_hold()] if found else []

    def queue(self, lock: str) -> list[str]:
        found = self.machine.table.locks.get(lock)
        return [place.waiter.client_id for place in found.places()] if found else []
