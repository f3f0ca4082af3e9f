"""What handlers find on the application and the request, typed.

The api never imports the node: it sees `Service`, the few things a handler may ask of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from lock_manager.api.events import EventHub
from lock_manager.config import Config
from lock_manager.core.locks.commands import Command
from lock_manager.core.locks.replies import Reply
from lock_manager.core.locks.views import Edge, LockView
from lock_manager.metrics import Metrics

if TYPE_CHECKING:
    from lock_manager.api.operators import Operators
    from lock_manager.api.pending import Listener, Pending


class Service(Protocol):
    """The node, as its HTTP handlers know it."""

    def status(self) -> dict[str, object]:
        """The body of GET /status."""

    def measure(self) -> Metrics:
        """The metrics, with the gauges as they are now."""

    def not_ready_because(self) -> str | None:
        """None when the node can serve, else the reason."""

    def begin(self, command: Command, listener: Listener) -> Pending:
        """As execute, without waiting: `listener` gets the reply or the error. Raises NotLeader or
        ApiError 503 itself if nothing was begun."""

    def abandon(self, pending: Pending) -> None:
        """Its client hung up: nobody listens any more, and the cluster is told so."""

    async def execute(self, command: Command) -> Reply:
        """Have it committed and applied; for an acquire that must wait, as long as it waits.

        Raises NotLeader, or ApiError 503 (`definite` tells whether it can still take effect). If
        the caller is cancelled, nobody listens any more, and the cluster is told so.
        """

    def confirmation(self) -> asyncio.Future[None]:
        """As confirm_leadership, without waiting. Raises NotLeader itself."""

    async def confirm_leadership(self) -> None:
        """Return when the views below are as new as any write answered before this call. Raises
        NotLeader, or ApiError 503."""

    def lock(self, lock_name: str) -> LockView: ...

    def locks(self, most: int) -> tuple[list[LockView], bool]:
        """At most so many locks in use, and whether these are all."""

    def wait_graph(self, most: int) -> tuple[list[Edge], bool]:
        """At most so many edges, and whether these are all."""

    def validate(self, lock_name: str, fencing_token: int) -> bool: ...

    @property
    def operators(self) -> Operators: ...


SERVICE = web.AppKey("service", Service)
CONFIG = web.AppKey("config", Config)
METRICS = web.AppKey("metrics", Metrics)
EVENTS = web.AppKey("events", EventHub)
REQUEST_ID = web.RequestKey("request_id", str)
