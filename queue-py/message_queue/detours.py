"""Operations of streams that found no owner at once: tried again, in the order in which they were
asked.

```
begin ──▶ here, or one hop ──▶ answered
  │            │ nothing was done: no owner, or it has lost its lease for a moment
  │            ▼
  └─────▶ the partition's detour: while it is open, whoever comes later stands behind
               └──▶ all of them again, oldest first, when there is an owner; 503 when their time is
                    over
```

A producer that does not wait for answers still gets its messages stored in its order (guarantee 5).
So nobody passes: neither here, nor at another node. That one, once it has refused one of this
node's operations, refuses those that are on the way behind it, until it meets one sent `ANEW`; and
that one leaves only when all before it have come back.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

from message_queue.core.operations import Answer, Direct, Produce, certain_refusal, unknown_outcome
from message_queue.transport.forwards import Reply

if TYPE_CHECKING:
    from message_queue.node import Node

NO_OWNER_S = 1.7
"""How long an operation waits for an owner before 503."""
ANSWER_S = 1.85
"""How long its answer may take in all."""
LOOK_AGAIN_S = 0.01
"""A lease may be back at any moment, without anybody's telling."""
MAX_WAITING = 20_000
"""In all detours of a node; beyond it operations are refused at once."""
MAX_BYTES = 64 << 20
"""Of the bodies among them; likewise."""


class Begun:
    """An operation on its way; called with its reply, once or never again."""

    __slots__ = ("away", "began_s", "detours", "done", "number", "op", "over", "partition")

    def __init__(
        self,
        detours: Detours,
        number: int,
        op: Direct,
        partition: int,
        done: Callable[[Answer], None],
        began_s: float,
    ) -> None:
        self.detours = detours
        self.number = number
        """Counts what the node was asked."""
        self.op = op
        self.partition = partition
        self.done = done
        self.began_s = began_s
        self.away: int | None = None
        """The node that was asked to do it."""
        self.over = False
        """Answered."""

    def __call__(self, reply: Reply) -> None:
        if self.away is not None:
            self.detours.came_back(self, refused=reply is None)
        if isinstance(reply, Answer):
            self.answer(reply)
        elif reply is None:
            self.detours.add(self)
        else:
            self.answer(unknown_outcome("No answer from the owner"))

    def answer(self, answer: Answer) -> None:
        """Unless it was answered for want of time."""
        if not self.over:
            self.over = True
            self.done(answer)

    def __lt__(self, other: Begun) -> bool:
        return self.number < other.number


class Detours:
    """Of one node. `start` tries an operation, which is then called with what became of it."""

    def __init__(
        self, node: Node, start: Callable[[Begun], None], refuses_all: Callable[[], str | None]
    ) -> None:
        self._node = node
        self._start = start
        self._refuses_all = refuses_all
        self.open: dict[int, list[Begun]] = {}
        """Partition -> who waits there, as a heap."""
        self._waiting = 0
        self._bytes = 0
        self._away: dict[int, list[int]] = {}
        """Partition -> [node, how many operations it was asked to do and has not answered]."""
        self._anew: set[tuple[int, int]] = set()
        """(node, partition) that refused something: the next one there is a new beginning."""

    def overtakes(self, partition: int, position: int) -> bool:
        """What goes to `position` now might pass what another node was asked to do before."""
        away = self._away.get(partition)
        return away is not None and position != away[0]

    def goes_to(self, begun: Begun, position: int) -> bool:
        """Another node is asked. Whether that is a new beginning there."""
        partition = begun.partition
        begun.away = position
        away = self._away.get(partition)
        if away is None:
            away = self._away[partition] = [position, 0]
        away[1] += 1
        if not self._anew:
            return False
        key = position, partition
        anew = key in self._anew
        self._anew.discard(key)
        return anew

    def came_back(self, begun: Begun, refused: bool) -> None:
        """It answered, or never will."""
        position, partition = begun.away, begun.partition
        if position is None:
            return
        begun.away = None
        if refused:
            self._anew.add((position, partition))
        away = self._away[partition]
        away[1] -= 1
        if not away[1]:
            del self._away[partition]

    def add(self, begun: Begun) -> None:
        """Nothing was done: it has to wait its turn."""
        if begun.over:
            return
        size = _body_bytes(begun.op)
        if self._waiting >= MAX_WAITING or self._bytes + size > MAX_BYTES:
            begun.answer(certain_refusal("No quorum"))
            return
        self._waiting += 1
        self._bytes += size
        waiting = self.open.get(begun.partition)
        if waiting is None:
            waiting = self.open[begun.partition] = []
            self._node.spawn(self._lead(begun.partition, waiting))
        heapq.heappush(waiting, begun)

    async def _lead(self, partition: int, waiting: list[Begun]) -> None:
        """Until nobody waits there."""
        loop = asyncio.get_running_loop()
        while waiting:
            await self._node.changes(LOOK_AGAIN_S)
            why = self._refuses_all()
            now_s = loop.time()
            while waiting and (why or waiting[0].began_s + NO_OWNER_S <= now_s):
                self._take(waiting).answer(certain_refusal(why or "No quorum"))
            if partition not in self._away:
                self._try(waiting, loop)
        del self.open[partition]

    def _try(self, waiting: list[Begun], loop: asyncio.AbstractEventLoop) -> None:
        """All of them, in order, as far as they find an owner."""
        before = len(waiting)
        while waiting and len(waiting) <= before:
            before = len(waiting) - 1
            begun = self._take(waiting)
            loop.call_at(begun.began_s + ANSWER_S, _expire, begun)
            self._start(begun)

    def _take(self, waiting: list[Begun]) -> Begun:
        begun = heapq.heappop(waiting)
        self._waiting -= 1
        self._bytes -= _body_bytes(begun.op)
        return begun


def _body_bytes(op: Direct) -> int:
    return sum([len(new.body) for new in op.messages]) if isinstance(op, Produce) else 0


def _expire(begun: Begun) -> None:
    """Its time went into waiting for an owner: the rest was not enough."""
    begun.answer(unknown_outcome("No answer in time"))
