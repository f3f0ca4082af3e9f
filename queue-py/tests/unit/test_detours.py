"""The order of what a stream asks for, when owners come, go and lose their leases for a moment."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from message_queue.core.operations import (
    Answer,
    Direct,
    Forward,
    Forwarded,
    NewMessage,
    NodeMessage,
    Produce,
)
from message_queue.detours import Begun, Detours
from message_queue.routing import FORWARD_S, Router, target_of
from message_queue.transport.forwards import Forwards, Serving

HERE, THERE = 0, 1


class Owner:
    """Stores while it has the lease."""

    def __init__(self, stored: list[int]) -> None:
        self.leased = False
        self.stored = stored

    def begin(self, op: Direct, done: Callable[[Answer | None], None]) -> None:
        assert isinstance(op, Produce)
        if not self.leased:
            done(None)
            return
        self.stored.append(int(op.messages[0].body))
        done(Answer(201))


class Cluster:
    """A node that is asked, and another one; a message between them takes a turn or two."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.here, self.there = Owner(self.stored), Owner(self.stored)
        self.route: int | None = None
        """The owner, as the node knows it."""
        self.refused: str | None = None
        self.wire: list[tuple[int, NodeMessage]] = []
        self.answers: dict[int, int] = {}
        self.forwards = Forwards(lambda to, message: self._post(to, message))
        self.serving = Serving(
            lambda to, message: self._post(to, message), self._never, self.there.begin, target_of
        )
        self.detours = Detours(self, self._start, lambda: self.refused)  # type: ignore[arg-type]  # all that it asks
        self.tasks: list[asyncio.Task[None]] = []
        self._asked = 0

    def _post(self, to: int, message: NodeMessage) -> bool:
        self.wire.append((to, message))
        return True

    async def _never(self, _: object) -> None:
        raise AssertionError

    def deliver(self, count: int) -> None:
        """So many messages arrive."""
        for _ in range(min(count, len(self.wire))):
            _, message = self.wire.pop(0)
            if isinstance(message, Forward):
                self.serving.serve(HERE, message)
            elif isinstance(message, Forwarded):
                self.forwards.answered(THERE, message.number, message.answer)

    async def changes(self, _: float) -> None:
        await asyncio.sleep(0)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    def ask(self) -> None:
        """The next message."""
        self._asked += 1
        number = self._asked
        op = Produce("q", (NewMessage(b"%d" % number),))
        loop = asyncio.get_running_loop()

        def answered(answer: Answer) -> None:
            assert number not in self.answers, "answered twice"
            self.answers[number] = answer.status

        begun = Begun(self.detours, number, op, 5, answered, loop.time())
        if 5 in self.detours.open:
            self.detours.add(begun)
        else:
            self._start(begun)

    _node: Any = None
    _detours: Any = None

    def _start(self, begun: Begun) -> None:
        """As `Router._start` has it."""
        Router._start(Standing(self), begun)  # type: ignore[arg-type]  # all that it asks


class Standing:
    """What `Router._start` looks at."""

    def __init__(self, cluster: Cluster) -> None:
        self._detours = cluster.detours
        self.forwards = cluster.forwards
        hosts = {5: cluster.here} if cluster.route == HERE else {}

        class Stand:
            position = HERE
            forwarded = 0
            stopping = False
            may_serve = staticmethod(lambda _: cluster.here.leased)
            owner = staticmethod(lambda _: cluster.route)

        self._node: Any = Stand
        self._node.hosts = hosts
        self._node.config = self._node.metrics = self._node.replicator = Stand

    def _tell(self, *_: object) -> None: ...


@pytest.mark.parametrize("seed", range(int(os.environ.get("SIM_SEEDS", "12"))))
async def test_what_one_stream_asks_for_is_stored_in_its_order_whatever_owners_do(
    seed: int,
) -> None:
    draw = random.Random(seed)
    cluster = Cluster()
    for _ in range(300):
        for _ in range(draw.choice((0, 1, 3))):
            cluster.ask()
        if draw.random() < 0.3:
            cluster.deliver(draw.randint(0, 5))
        if draw.random() < 0.1:
            cluster.there.leased = not cluster.there.leased
        if draw.random() < 0.1:
            cluster.here.leased = not cluster.here.leased
        if draw.random() < 0.1:
            cluster.route = draw.choice((HERE, THERE, THERE, None))
        if draw.random() < 0.3:
            await asyncio.sleep(0)
    cluster.there.leased, cluster.here.leased, cluster.route = True, True, THERE
    for _ in range(2000):
        cluster.deliver(9)
        await asyncio.sleep(0)
        if len(cluster.answers) == cluster._asked:
            break
    assert set(cluster.answers.values()) == {201}
    assert len(cluster.answers) == cluster._asked
    assert cluster.stored == list(range(1, cluster._asked + 1))
    assert not cluster.detours.open


async def test_who_waits_too_long_is_refused_and_so_is_everybody_when_the_node_stops() -> None:
    cluster = Cluster()
    cluster.ask()
    cluster.refused = "Node is stopping"
    async with asyncio.timeout(20):
        while not cluster.answers:  # noqa: ASYNC110 - a condition without an event
            await asyncio.sleep(0)
    assert cluster.answers == {1: 503}
    await asyncio.gather(*cluster.tasks)
    assert not cluster.detours.open


async def test_what_waits_for_an_owner_has_room_for_so_many_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("message_queue.detours.MAX_BYTES", 5)
    cluster = Cluster()
    for _ in range(8):
        cluster.ask()
    assert cluster.answers == {6: 503, 7: 503, 8: 503}
    cluster.route, cluster.here.leased = HERE, True
    async with asyncio.timeout(20):
        while len(cluster.answers) < 8:  # noqa: ASYNC110 - a condition without an event
            await asyncio.sleep(0)
    assert cluster.stored == [1, 2, 3, 4, 5]
    cluster.route = None
    cluster.here.leased = False
    cluster.ask()
    assert 9 not in cluster.answers, "there is room again"
    cluster.refused = "Node is stopping"
    await asyncio.gather(*cluster.tasks)


async def test_time_spent_in_waiting_for_an_owner_is_missing_for_the_answer() -> None:
    cluster = Cluster()
    loop = asyncio.get_running_loop()
    statuses: list[int] = []
    late = loop.time() - FORWARD_S + 0.2
    op = Produce("q", (NewMessage(b"1"),))
    begun = Begun(cluster.detours, 1, op, 5, lambda a: statuses.append(a.status), late)
    cluster.detours.add(begun)
    cluster.route = THERE  # asked, and never heard of again
    async with asyncio.timeout(20):
        while not statuses:  # noqa: ASYNC110 - a condition without an event
            await asyncio.sleep(0.01)
    assert statuses == [503]
    begun(Answer(201))
    assert statuses == [503], "what comes too late is told to nobody"
