"""What handlers find on the application and the request, typed.

The api never imports the node: it sees `Service`, the few things a handler may ask of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from aiohttp import web

from mesi_cache.api.events import EventHub
from mesi_cache.config import Config
from mesi_cache.core.records import Operation
from mesi_cache.core.step import Answer, Changed, Found, Missing, Unavailable
from mesi_cache.metrics import Metrics


class Listener(Protocol):
    """Who waits for an answer; a future of asyncio's is one."""

    def done(self) -> bool:
        """Nobody waits any longer."""

    def set_result(self, answer: Answer, /) -> None:
        """Called at most once, and not if `done`."""


class Service(Protocol):
    """The node, as its HTTP handlers know it."""

    def lookup(self, key: str) -> Found | None:
        """A hit, at once and without any message; None if the line cannot be shown now."""

    def begin(self, key: str, operation: Operation | None, listener: Listener) -> None:
        """Start a read (`operation` None) or change that has no name. Its answer is told within
        5 s, maybe before this returns; it goes on if nobody listens any longer."""

    async def read(self, key: str) -> Found | Missing | Unavailable:
        """The value of `key`, from this cache or its home; answered within 5 s."""

    async def change(
        self, key: str, operation: Operation, name: str | None = None
    ) -> Changed | Unavailable:
        """Do `operation` once; answered within 5 s. It goes on if the caller leaves. Asked for
        again under the same `name`, on any node, it is answered as before."""

    async def read_many(self, keys: Sequence[str]) -> list[Found | Missing | Unavailable]:
        """Like `lookup`, then `read`, of each; one round to each home."""

    async def change_many(
        self, changes: Sequence[tuple[str, Operation]]
    ) -> list[Changed | Unavailable]:
        """Like `change` of each, in this order where keys are the same; one round to each home."""

    def lines(self) -> list[dict[str, object]]:
        """The lines that hold a slot, least recently used first."""

    async def directory(self, key: str) -> dict[str, object] | Unavailable:
        """The home's entry of `key`, wherever the home is."""

    def metrics_json(self) -> dict[str, object]:
        """The body of GET /metrics."""

    def metrics_prometheus(self) -> bytes:
        """The same for Prometheus."""

    def status(self) -> dict[str, object]:
        """The body of GET /status."""

    def not_ready_because(self) -> str | None:
        """None when the node can serve, else the reason."""


SERVICE = web.AppKey("service", Service)
CONFIG = web.AppKey("config", Config)
METRICS = web.AppKey("metrics", Metrics)
EVENTS = web.AppKey("events", EventHub)
REQUEST_ID = web.RequestKey("request_id", str)
