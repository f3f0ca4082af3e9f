"""What operators ask of a leader: hand leadership over, add a node, remove one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lock_manager.api.directory import Directory
from lock_manager.api.errors import ApiError, NotLeader
from lock_manager.core.raft import Accepted, Entry, Member, Refusal, Refused, Role
from lock_manager.core.raft.core import RaftCore

TRANSFER_S = 1.5
CHANGE_S = 2.0
BRIEF = (Refusal.IN_PROGRESS, Refusal.NOT_READY)


class Operators:
    """`wake` makes the node do what the core wants done; `now_ms` is the core's clock."""

    def __init__(
        self,
        core: RaftCore,
        directory: Directory,
        now_ms: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        self._core = core
        self._directory = directory
        self._now_ms = now_ms
        self._wake = wake
        # Changes that are not applied yet: log index -> (term, who waits).
        self._changes: dict[int, tuple[int, asyncio.Future[None]]] = {}

    async def transfer(self, target: str | None) -> str:
        """Hand leadership to the named voter, or to the one that is furthest; returns its name once
        it leads. Raises NotLeader, or ApiError 409 or 503."""
        self._must_lead()
        candidates = [peer for peer in self._core.progress() if peer.voter]
        if target is not None:
            candidates = [p for p in candidates if self._directory.name(p.node_id) == target]
        if not candidates:
            raise ApiError(409, "No such voter to hand leadership to", target=target)
        chosen = max(candidates, key=lambda peer: (peer.match_index, -peer.silent_ms)).node_id
        refused = self._core.transfer(chosen, self._now_ms())
        self._wake()
        if refused is not None:
            raise ApiError(409, "Not possible now", reason=refused.reason.value)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + TRANSFER_S
        while self._core.role is Role.LEADER or self._core.leader_id is None:
            if loop.time() > deadline:
                break
            await asyncio.sleep(0.01)  # a few polls, at an operator's pace
        if self._core.leader_id != chosen:
            raise ApiError(503, "Leadership was not handed over in time", definite=False)
        return self._directory.name(chosen) or str(chosen)

    async def add(self, name: str, raft_addr: str, http_addr: str) -> int:
        """Add a node as a learner, which is promoted when it has caught up; returns its position
        once that is committed."""
        self._must_lead()
        configuration = self._core.configuration
        if self._directory.find(configuration, name) is not None:
            raise ApiError(409, "Already a member", id=name)
        position = self._directory.free_position(configuration, raft_addr)
        member = Member(node_id=position, name=name, raft_addr=raft_addr, http_addr=http_addr)
        await self._committed(lambda: self._core.add(member))
        return position

    async def remove(self, name: str) -> int:
        """Remove a node; returns the position it had once that is committed."""
        self._must_lead()
        member = self._directory.find(self._core.configuration, name)
        if member is None:
            raise ApiError(409, "Not a member", id=name)
        await self._committed(lambda: self._core.remove(member.node_id))
        return member.node_id

    async def _committed(self, propose: Callable[[], Accepted | Refused]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CHANGE_S
        while isinstance(result := propose(), Refused):
            self._wake()
            if result.reason not in BRIEF or loop.time() > deadline:
                raise ApiError(409, "Not possible now", reason=result.reason.value)
            await asyncio.sleep(0.02)  # another change, or the term's first entry, is on its way
            self._must_lead()
        done: asyncio.Future[None] = loop.create_future()
        self._changes[result.last_index] = (result.term, done)
        self._wake()
        await done

    def applied(self, entry: Entry) -> None:
        """A log entry is final."""
        change = self._changes.pop(entry.index, None)
        if change is not None and not change[1].done():
            if change[0] == entry.term:
                change[1].set_result(None)
            else:
                change[1].set_exception(self.elsewhere())

    def leadership_lost(self) -> None:
        error = ApiError(503, "Leadership lost", headers={"Retry-After": "1"}, definite=False)
        for _, waiting in self._changes.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._changes.clear()

    def _must_lead(self) -> None:
        if self._core.role is not Role.LEADER:
            raise self.elsewhere()

    def elsewhere(self) -> NotLeader:
        """Where the present leader is. A node that leads and yet refuses is about to stop."""
        if self._core.role is Role.LEADER:
            return NotLeader(None, None)
        return NotLeader(*self._directory.leader(self._core.configuration, self._core.leader_id))
