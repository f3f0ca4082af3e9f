"""How long a batch waits for company."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

from message_queue.core.replication.drafts import Accepted
from message_queue.core.replication.effects import Effects
from message_queue.gathering import ENOUGH_BYTES, TURNS, Gathering
from message_queue.proposing import Proposer


def test_a_lone_client_waits_for_nobody() -> None:
    gathering = Gathering()
    assert not gathering.goes_on(1, 0)
    assert not gathering.goes_on(1, 0)


def test_a_batch_waits_while_each_turn_brings_more_and_no_longer() -> None:
    gathering = Gathering()
    assert not gathering.goes_on(8, 0), "the first one has nobody to wait for"
    assert gathering.goes_on(2, 0)
    assert gathering.goes_on(5, 0)
    assert not gathering.goes_on(5, 0), "a turn that brought nothing"
    assert [gathering.goes_on(n, 0) for n in range(1, TURNS + 2)] == [True] * TURNS + [False]


class Owner:
    """Takes what is proposed."""

    epoch, assigned, gathered, gathered_bytes = 64, 0, 0, 0

    @property
    def has_gathered(self) -> bool:
        return self.gathered > 0

    def gather(self, _: int) -> tuple[tuple[object, ...], list[object]]:
        taken, self.gathered = self.gathered, 0
        return (object(),) * taken, [object()] * taken

    def proposed(self, gathered: list[object], first: int, _: int) -> None:
        self.assigned = first + len(gathered) - 1


class Node:
    """Stores at once whatever comes, and tells nobody."""

    def __init__(self) -> None:
        self.replicator = self.links = self
        self.batches: list[int] = []
        self.last = 0

    def cluster_ms(self) -> int:
        return 0

    def propose(self, _: int, drafts: tuple[object, ...], __: int) -> Accepted:
        first, self.last = self.last + 1, self.last + len(drafts)
        self.batches.append(len(drafts))
        return Accepted(64, first, Effects())

    def apply(self, _: Effects) -> None: ...

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


async def test_two_batches_are_under_way_and_the_rest_gathers_until_one_is_stored() -> None:
    node, owner = Node(), Owner()
    host = SimpleNamespace(
        partition=3,
        owner=owner,
        batches=deque(),
        flushing=False,
        ended=False,
        gathering=Gathering(),
    )
    proposer = Proposer(node)  # type: ignore[arg-type]  # all that it asks

    async def ask() -> None:
        owner.gathered += 1
        proposer.flush_soon(host)  # type: ignore[arg-type]  # all that it asks
        for _ in range(TURNS + 2):
            await asyncio.sleep(0)

    for _ in range(5):
        await ask()
    assert node.batches == [1, 1]
    assert list(host.batches) == [1, 2]
    host.batches.popleft()
    await ask()
    assert node.batches == [1, 1, 4], "all that gathered meanwhile, as one"


def test_a_large_batch_waits_for_nobody() -> None:
    gathering = Gathering()
    assert not gathering.goes_on(8, 0)
    assert gathering.goes_on(2, ENOUGH_BYTES - 1)
    assert not gathering.goes_on(3, ENOUGH_BYTES)
