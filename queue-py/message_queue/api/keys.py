"""What handlers find on the application and the request, typed.

The api never imports the node: it sees `Service`, the few things a handler may ask of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from aiohttp import web

from message_queue.api.events import EventHub
from message_queue.config import Config
from message_queue.core.operations import Answer, Consume, Direct, Operation
from message_queue.metrics import Metrics


class WrongNode(Exception):
    """The operation belongs elsewhere and must not be forwarded; `owner` is that node's address,
    None while nobody owns it."""

    def __init__(self, owner: str | None) -> None:
        super().__init__(owner)
        self.owner = owner


class Delivered(Protocol):
    """An answer that leased messages: what a client that is already gone gives back."""

    @property
    def answer(self) -> Answer: ...

    def undo(self) -> None:
        """The client never saw it: end its leases."""


class Service(Protocol):
    """The node, as its HTTP handlers know it."""

    def status(self) -> dict[str, object]:
        """The body of GET /status."""

    def not_ready_because(self) -> str | None:
        """None when the node can serve, else the reason."""

    async def ask(self, operation: Operation, forward: bool = True) -> Answer:
        """Have the owner do it, wherever that is. Raises WrongNode when it may not be forwarded.
        Never raises for an unreachable owner: that is an answer (503)."""

    def begin(self, operation: Direct, done: Callable[[Answer], None]) -> None:
        """Like `ask`, for those who have many under way: `done` is called once, maybe at once."""

    async def consume(self, operation: Consume, forward: bool = True) -> Delivered:
        """Like `ask`; cancelling it leaves nothing leased."""

    def consume_now(self, operation: Consume) -> Delivered | None:
        """What can be leased in this very turn; None: nothing was done, `consume` knows more."""

    async def ack(
        self, ids: Sequence[str], receipt: str | None, forward: bool = True
    ) -> list[int] | Answer:
        """A status (200, 404, 409) for each id, or the answer that explains why there is none."""

    async def configure(self, queue: str, changes: bytes, forward: bool = True) -> Answer:
        """Change a queue's settings, after checking that no dead letter cycle comes of it."""

    async def redrive(self, queue: str, most: int | None, forward: bool = True) -> Answer:
        """Send dead letters back: those of a queue, or all that lie in a dead letter queue."""

    async def show(self, queue: str) -> Answer:
        """The figures of a queue, its dead letters included."""

    async def queues(self) -> dict[str, object]:
        """The queues of all reachable owners."""

    async def change_ring(self, join: bool, addr: str) -> Answer:
        """Let the node at that address into the ring, or out of it."""

    def ring(self, queue: str | None) -> dict[str, object]:
        """Placement: nodes, partitions, owners, epochs."""


SERVICE = web.AppKey("service", Service)
CONFIG = web.AppKey("config", Config)
METRICS = web.AppKey("metrics", Metrics)
EVENTS = web.AppKey("events", EventHub)
REQUEST_ID = web.RequestKey("request_id", str)
