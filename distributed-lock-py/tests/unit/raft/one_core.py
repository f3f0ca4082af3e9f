"""One core of three, whose peers a test plays itself."""

from __future__ import annotations

import random

from lock_manager.core.raft import (
    AppendReply,
    Configuration,
    Effects,
    Member,
    RaftConfig,
    RaftCore,
    Restored,
    Role,
    VoteReply,
)

MEMBERS = Configuration(tuple(Member(node_id=node) for node in (1, 2, 3)))


def make(node: int = 1, restored: Restored | None = None, **changes: object) -> RaftCore:
    config = RaftConfig(node_id=node, bootstrap=MEMBERS, **changes)  # type: ignore[arg-type]
    return RaftCore(config, restored or Restored(), random.Random(7).randrange, 0)


def settle(core: RaftCore) -> list[Effects]:
    """Drains and syncs until nothing is left."""
    drained = []
    while core.has_effects:
        effects = core.drain()
        drained.append(effects)
        if effects.persist is not None:
            core.persisted(effects.persist.seq, core.state.now_ms)
    return drained


def leader(**changes: object) -> RaftCore:
    """Node 1, elected by node 2, its no-op committed by node 2."""
    core = make(**changes)
    core.campaign(0)
    settle(core)
    core.step(VoteReply(sender=2, to=1, term=1, granted=True, pre_vote=True), 0)
    settle(core)
    core.step(VoteReply(sender=2, to=1, term=1, granted=True), 0)
    settle(core)
    core.step(AppendReply(sender=2, to=1, term=1, success=True, match_index=1), 0)
    settle(core)
    assert core.role is Role.LEADER
    assert core.commit_index == 1
    return core
