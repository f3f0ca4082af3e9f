"""What handlers find on the application and the request, typed.

The api never imports the node: it sees `Service`, the few things a handler may ask of it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

import msgspec
from aiohttp import web

from secure_store.api.errors import REQUEST_ID as REQUEST_ID
from secure_store.api.events import EventHub
from secure_store.api.watch import WatchHub
from secure_store.config import Config
from secure_store.core.changes import Change, PutToken
from secure_store.core.effects import Promotion
from secure_store.core.limiter import Limiter
from secure_store.core.plan import Write, Written
from secure_store.core.policy import Rule, Verb
from secure_store.core.records import Position
from secure_store.core.tokens import Principal
from secure_store.metrics import Metrics


class Listing(msgspec.Struct, frozen=True):
    """GET /list: `next` is what to pass as `after` for more; null at the end."""

    keys: tuple[str, ...]
    next: str | None


class VersionInfo(msgspec.Struct, frozen=True):
    """One version in GET /history. Times are UTC milliseconds."""

    version: int
    created_ms: int
    expires_ms: int | None
    deleted_ms: int | None
    destroyed: bool
    readable: bool


class PromotionRefused(Exception):
    """Promoting this node now could split or lose data."""

    def __init__(self, promotion: Promotion) -> None:
        super().__init__(promotion.reason)
        self.promotion = promotion


class RotationRefused(Exception):
    """The keys cannot be changed now; the text says why."""


class Audit(Protocol):
    """The audit log, as the api uses it."""

    def unavailable(self) -> str | None: ...

    def refuse(self) -> None: ...

    def note_read(self, action: str, addr: str, request_id: str, who: str, key: str) -> None: ...

    def note(
        self,
        action: str,
        *,
        addr: str,
        outcome: str,
        request_id: str,
        status: int,
        who: str,
        key: str = "",
        detail: str = "",
        urgent: bool = False,
    ) -> asyncio.Future[None] | None: ...


class Service(Protocol):
    """The node, as its HTTP handlers know it. Raises core.plan's errors."""

    @property
    def node_id(self) -> str: ...

    @property
    def audit(self) -> Audit: ...

    def audit_key(self, key: str) -> str: ...

    async def audit_entries(self, after_seq: int, limit: int) -> list[bytes]: ...

    def anchors_path(self) -> Path | None: ...

    def authenticate(self, token: str) -> Principal | None: ...

    def is_still_valid(self, principal: Principal) -> bool: ...

    def allows(self, principal: Principal, verb: Verb, key: str) -> bool: ...

    def is_primary_here(self) -> bool: ...

    def primary_url(self) -> str | None: ...

    def is_unsettled(self) -> bool: ...

    async def settled(self, key: str, *, prefix: bool = False) -> None: ...

    def read(self, key: str, version: int | None) -> tuple[int, bytes] | None: ...

    def list_keys(self, principal: Principal, prefix: str, after: str, limit: int) -> Listing: ...

    def cursor_key(self, after: str) -> str | None: ...

    def history(self, key: str) -> tuple[VersionInfo, ...] | None: ...

    def tokens(self) -> tuple[PutToken, ...]: ...

    def policies(self) -> dict[str, tuple[Rule, ...]]: ...

    def outranks(self, principal: Principal, roles: tuple[str, ...]) -> bool: ...

    def changes_after(self, last_id: str) -> list[tuple[tuple[Change, ...], Position]] | None: ...

    async def write(self, write: Write) -> Written: ...

    def new_token_hash(self, token: str) -> bytes: ...

    def scope_hash(self, principal: Principal, idempotency_key: str) -> bytes: ...

    async def promote(self, *, force: bool) -> Promotion: ...

    async def rotate(self, *, master: bool) -> int: ...

    def replication(self) -> dict[str, object]: ...

    def status(self) -> dict[str, object]: ...

    def is_degraded(self) -> bool: ...

    def gather_gauges(self) -> None: ...

    def not_ready_because(self) -> str | None: ...


SERVICE = web.AppKey("service", Service)
CONFIG = web.AppKey("config", Config)
METRICS = web.AppKey("metrics", Metrics)
EVENTS = web.AppKey("events", EventHub)
WATCHES = web.AppKey("watches", WatchHub)
LIMITER = web.AppKey("limiter", Limiter)
PRINCIPAL = web.RequestKey("principal", Principal)
AUDITED_KEY = web.RequestKey("audited_key", str)  # the key a request is about
ACTION = web.RequestKey("action", str)  # what the audit log calls the request
AUDITED = web.RequestKey("audited", bool)  # a stream has written its own line
