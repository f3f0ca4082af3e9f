"""Locks as a client holds them: for the length of a block, kept alive, and lost out loud."""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

from lock_manager.client.cluster import BACKOFF_S, Cluster
from lock_manager.client.errors import (
    LeaseLost,
    LockError,
    LockHeld,
    LockTimeout,
    Refused,
    Unavailable,
)

KEEPALIVES_PER_LEASE = 3
RELEASE_PERSIST_S = 5.0

log = logging.getLogger(__name__)


class Held:
    """A lock (or several) that this client holds; see `LockClient.lock`."""

    def __init__(self, names: tuple[str, ...], token: int, ttl_ms: int | None) -> None:
        self.names = names
        self.fencing_token = token
        self.ttl_ms = ttl_ms
        self._lost = asyncio.Event()
        self._until_s = 0.0  # on the loop's clock; 0: no lease, or not known yet
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelled_body = False

    @property
    def lost(self) -> bool:
        """Whether somebody else may have it by now."""
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Return when it is lost (for whoever prefers a signal to a cancelled body)."""
        await self._lost.wait()

    def _lasts_until(self, until_s: float) -> None:
        if self.lost or until_s <= self._until_s:
            return
        self._until_s = until_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(until_s, self._lose)

    @property
    def _keep_at_s(self) -> float:
        """When a keepalive is due: early enough for some to fail."""
        length_s = (self.ttl_ms or 0) / 1000
        return self._until_s - length_s + length_s / KEEPALIVES_PER_LEASE

    def _lose(self) -> None:
        if self.lost:
            return
        self._lost.set()
        if self._task is not None and not self._task.done():
            self._cancelled_body = True
            self._task.cancel()

    def _end(self) -> None:
        self._task = None
        if self._timer is not None:
            self._timer.cancel()


class LockClient:
    """One client of the cluster at `urls` (some nodes' HTTP addresses; the others are learned).

    `client_id`: default a random one. `persist_s`: how long a request is tried while no node can
    answer it. `ssl`: for https. Use it by `async with`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        client_id: str | None = None,
        persist_s: float = 30.0,
        ssl: ssl.SSLContext | None = None,
    ) -> None:
        self.client_id = client_id or f"py-{secrets.token_hex(8)}"
        self._cluster = Cluster(urls, persist_s=persist_s, ssl=ssl)
        self._held: set[Held] = set()
        self._turns: dict[str, asyncio.Lock] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._new_lease = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._cluster.open()
        self._keeper = asyncio.create_task(self._keep_alive(), name="lock keepalive")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        await self._cluster.close()

    # --- locks --------------------------------------------------------------------------------

    @asynccontextmanager
    async def lock(
        self,
        name: str,
        *,
        lock_type: str = "exclusive",
        permits: int | None = None,
        limit: int | None = None,
        wait_ms: int = 10_000,
        ttl_ms: int | None = 10_000,
    ) -> AsyncIterator[Held]:
        """Hold one lock for the length of the block.

        `ttl_ms` None: no lease; it stays held if this process dies. Raises LockHeld, LockTimeout,
        DeadlockDetected, Refused, Unavailable; LeaseLost out of the block.
        """
        ask: dict[str, Any] = {"lock_name": name, "lock_type": lock_type}
        ask |= {k: v for k, v in (("permits", permits), ("limit", limit)) if v is not None}
        async with self._holding((name,), ask, wait_ms, ttl_ms) as held:
            yield held

    @asynccontextmanager
    async def locks(
        self,
        asks: Sequence[str | Mapping[str, Any]],
        *,
        wait_ms: int = 10_000,
        ttl_ms: int | None = 10_000,
    ) -> AsyncIterator[Held]:
        """Hold several locks, all or none. An ask is a name (exclusive) or
        `{"lock_name": …, "lock_type": …}`."""
        wanted = [{"lock_name": ask} if isinstance(ask, str) else dict(ask) for ask in asks]
        names = tuple(sorted(ask["lock_name"] for ask in wanted))
        async with self._holding(names, {"locks": wanted}, wait_ms, ttl_ms) as held:
            yield held

    @asynccontextmanager
    async def _holding(
        self, names: tuple[str, ...], ask: dict[str, Any], wait_ms: int, ttl_ms: int | None
    ) -> AsyncIterator[Held]:
        async with self._turn(names, wait_ms):
            held = await self._acquire(names, {**ask, "wait_ms": wait_ms}, ttl_ms)
            task = asyncio.current_task()
            outer_cancels = task.cancelling() if task is not None else 0
            held._task = task
            self._held.add(held)
            self._new_lease.set()
            try:
                yield held
            except asyncio.CancelledError:
                if held._cancelled_body and task is not None and task.uncancel() <= outer_cancels:
                    raise LeaseLost(f"{', '.join(names)} lost") from None
                raise
            finally:
                held._end()
                self._held.discard(held)
                if not held.lost:
                    await asyncio.shield(self._release(names, held.fencing_token))
            if held.lost:  # the body did not notice, or did not care
                raise LeaseLost(f"{', '.join(names)} lost")

    @asynccontextmanager
    async def _turn(self, names: tuple[str, ...], wait_ms: int) -> AsyncIterator[None]:
        """The right to ask for these names within this client; always taken in sorted order."""
        taken: list[asyncio.Lock] = []
        try:
            try:
                async with asyncio.timeout(wait_ms / 1000 or None):
                    for name in names:
                        turn = self._turns.setdefault(name, asyncio.Lock())
                        if not wait_ms and turn.locked():
                            raise LockHeld([])
                        await turn.acquire()
                        taken.append(turn)
            except TimeoutError:
                raise LockTimeout(f"another task of this client holds {names}") from None
            yield
        finally:
            for turn in taken:
                turn.release()
            for name in names:
                if name in self._turns and not self._turns[name].locked():
                    del self._turns[name]

    async def _acquire(
        self, names: tuple[str, ...], ask: dict[str, Any], ttl_ms: int | None
    ) -> Held:
        body = {**ask, "client_id": self.client_id, "request_id": secrets.token_hex(8)}
        if ttl_ms is not None:
            body["ttl_ms"] = ttl_ms
        try:
            answer, sent_s = await self._cluster.ask("/acquire", body, wait_s=ask["wait_ms"] / 1000)
            held = Held(names, answer["fencing_token"], ttl_ms)
            if ttl_ms is not None:
                await self._begin_lease(held, sent_s, answer["expires_in_ms"] / 1000)
        except (asyncio.CancelledError, Unavailable):
            # It may have been granted, and our keepalives would keep it for ever.
            await asyncio.shield(self._release(names, None))
            raise
        return held

    async def _begin_lease(self, held: Held, sent_s: float, remains_s: float) -> None:
        """The lease began somewhere between the request and its answer. After a long wait that
        says little, so it is counted anew."""
        if asyncio.get_running_loop().time() - sent_s < remains_s / 2:
            held._lasts_until(sent_s + remains_s)
            return
        await self._keep([held])
        if held.lost:
            raise LeaseLost(f"{', '.join(held.names)} lost")

    async def _release(self, names: tuple[str, ...], token: int | None) -> None:
        """Give them back, if this client has them. What cannot be released now ends with its
        lease."""
        for name in names:
            body: dict[str, Any] = {
                "lock_name": name,
                "client_id": self.client_id,
                "request_id": secrets.token_hex(8),
            }
            if token is not None:
                body["fencing_token"] = token
            try:
                await self._cluster.ask(
                    "/release", body, persist_s=min(self._cluster.persist_s, RELEASE_PERSIST_S)
                )
            except Unavailable as error:
                log.warning("could not release %s: %s", name, error)
            except Refused as refused:
                if refused.status != 409:  # 409: not held (any more)
                    raise

    # --- leases -------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        """One keepalive renews all leases of this client; sent when the first one needs it."""
        loop = asyncio.get_running_loop()
        pause_s = 0.0
        while True:
            self._new_lease.clear()
            leases = [held for held in self._held if held.ttl_ms is not None and not held.lost]
            due_s = min((held._keep_at_s for held in leases), default=None)
            wait_s = None if due_s is None else max(pause_s, due_s - loop.time())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._new_lease.wait(), wait_s)
                continue
            try:
                await self._keep(leases)
                pause_s = 0.0
            except LockError as error:
                log.warning("keepalive failed: %s", error)  # the leases' own deadlines go on
                pause_s = BACKOFF_S[1]

    async def _keep(self, leases: Sequence[Held]) -> None:
        """One keepalive. It counts for leases that were held before it was sent."""
        shortest_s = min((held.ttl_ms or 0) for held in leases) / 1000
        lost: set[str] = set()
        try:
            _, sent_s = await self._cluster.ask(
                "/keepalive", {"client_id": self.client_id}, persist_s=shortest_s
            )
        except Refused as refused:
            if refused.status != 409:
                raise
            sent_s = refused.body["sent_s"]
            lost.update(refused.body.get("lost", ()))
        for held in leases:
            if lost.intersection(held.names):
                held._lose()
            elif held.ttl_ms is not None:
                held._lasts_until(sent_s + held.ttl_ms / 1000)
