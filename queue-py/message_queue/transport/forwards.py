"""Operations on their way to another node and back, over the peer links.

One hop: who is asked does it or says that it is not the owner, and never asks a third. The links
may lose messages: an operation whose link broke, or that is not answered in time, has an unknown
outcome; one that never left has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from message_queue.core.operations import Answer, Forward, ForwardEnded, NodeMessage, Operation

MAX_WAITING = 20_000
"""Operations under way to other nodes; beyond it new ones are refused."""


class NotSent(Exception):
    """The operation did not leave this node: nothing was done."""


class OutcomeUnknown(Exception):
    """It left, and no answer came."""


class Forwards:
    """The asking side. `send` queues a message for a peer; False: its link is down or full."""

    def __init__(self, send: Callable[[int, NodeMessage], bool]) -> None:
        self._send = send
        self._number = 0
        self._waiting: dict[int, tuple[int, asyncio.Future[Answer | None]]] = {}

    async def ask(self, position: int, operation: Operation, timeout_s: float) -> Asked:
        """The answer of the node at `position`. Raises NotSent or OutcomeUnknown. When the caller
        is cancelled, the other node is told that nobody waits any more."""
        if len(self._waiting) >= MAX_WAITING:
            raise NotSent
        self._number += 1
        number = self._number
        answered: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (position, answered)
        done = False
        try:
            if not self._send(position, Forward(number, operation)):
                raise NotSent
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await answered
            except TimeoutError:
                raise OutcomeUnknown from None
            done = True
            return Asked(self, position, number, answer)
        finally:
            del self._waiting[number]
            if not done:
                self._send(position, ForwardEnded(number))

    def answered(self, position: int, number: int, answer: Answer | None) -> None:
        """A `Forwarded` came in. One that nobody waits for is dropped."""
        waiting = self._waiting.get(number)
        if waiting is not None and waiting[0] == position and not waiting[1].done():
            waiting[1].set_result(answer)

    def peer_lost(self, position: int) -> None:
        """The link to a peer broke: what it was asked is in doubt."""
        for peer, answered in self._waiting.values():
            if peer == position and not answered.done():
                answered.set_exception(OutcomeUnknown())

    def withdraw(self, position: int, number: int) -> None:
        """The answer reached nobody: leases that came with it go back."""
        self._send(position, ForwardEnded(number))


class Asked:
    """An answer, and the means to give back what it leased. `answer` None: not the owner."""

    __slots__ = ("_forwards", "_number", "_position", "answer")

    def __init__(
        self, forwards: Forwards, position: int, number: int, answer: Answer | None
    ) -> None:
        self._forwards = forwards
        self._position = position
        self._number = number
        self.answer = answer

    def undo(self) -> None:
        """The client never saw it."""
        self._forwards.withdraw(self._position, self._number)
