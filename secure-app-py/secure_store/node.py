"""The only file where the rooms meet: what the api asks for, done with engine, view, audit and
keys."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from secure_store import report
from secure_store.api.events import EventHub
from secure_store.api.keys import Listing, PromotionRefused, RotationRefused, VersionInfo
from secure_store.api.watch import WatchHub, parse_event_id
from secure_store.config import Config, ConfigError
from secure_store.core import plan
from secure_store.core.changes import (
    Change,
    PutToken,
    RevokeToken,
)
from secure_store.core.effects import Promotion
from secure_store.core.messages import Role
from secure_store.core.outrank import outranks
from secure_store.core.policy import PolicySet, Rule, Verb
from secure_store.core.records import Position
from secure_store.core.tokens import Principal, plain_hash, token_hash
from secure_store.cursor import open_cursor, seal_cursor
from secure_store.engine import Engine, wall_ms
from secure_store.heads import PeerHeads
from secure_store.ledger import Ledger
from secure_store.metrics import Metrics
from secure_store.storage.audit_files import read_entries
from secure_store.storage.audit_log import AuditLog, AuditUnavailable
from secure_store.storage.keyring import Keyring, replace_master
from secure_store.storage.reseal import Reseal
from secure_store.storage.view import View
from secure_store.sweeping import Sweeper

log = logging.getLogger(__name__)

OPEN_WAIT_S = 1.0
MAX_SCAN = 2_000
MAX_DATA_KEYS = 16
MAX_KNOWN = 4_096


class Node:
    """Implements api.keys.Service."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        events: EventHub,
        watches: WatchHub,
        *,
        view: View,
        audit: AuditLog,
        keyring: Keyring,
        static_tokens: dict[bytes, Principal],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._events = events
        self._watches = watches
        self._view = view
        self.audit = audit
        self._keyring = keyring
        self._static = static_tokens
        self.on_fatal = on_fatal
        self._engine: Engine | None = None
        self.heads = PeerHeads(config, audit, keyring)
        self._resealing = False
        self._rotating = asyncio.Lock()
        self._sweeper: Sweeper | None = None
        self._hmac_keys = config.audit_keys == "hmac"
        self.ledger = Ledger(config.node_id, audit)
        self._known: dict[bytes, Principal] = {}  # by a token's hash; void with any change of one

    @property
    def node_id(self) -> str:
        return self._config.node_id

    def attach(self, engine: Engine) -> None:
        self._engine = engine

    def begin(self) -> None:
        """What goes on by itself, once the engine runs."""
        self.reseal()
        self._sweeper = Sweeper(
            self._config.node_id,
            self._view,
            self.engine,
            self._metrics,
            note=self.system_note,
            audit_key=self.audit_key,
        )

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("attach() comes first")
        return self._engine

    # --- who, and may they --------------------------------------------------------------------

    def authenticate(self, token: str) -> Principal | None:
        """Who holds this token; None if nobody may use it. Both hashes are always computed, so that
        unknown and revoked take the same time."""
        view = self._view
        digest = plain_hash(token)
        known = self._known.get(digest)
        if (
            known is not None
            and not self.engine.state.ambiguous()
            and not 0 < known.expires_ms <= wall_ms()
        ):
            return known
        static = self._static.get(digest)
        hashed = token_hash(view.token_key or b"", token)
        found = view.tokens.find(hashed, wall_ms())
        if found is not None and self.engine.state.ambiguous():
            found = view.head_tokens.find(hashed, wall_ms())  # a revocation may be open: it counts
        principal = static or found
        if principal is not None and principal.uses_left < 0:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[digest] = principal
        return principal

    def is_still_valid(self, principal: Principal) -> bool:
        """Whether an open stream of this principal may go on."""
        if not principal.accessor:
            return True
        token = self._view.tokens.by_accessor.get(principal.accessor)
        return token is not None and not (token.expires_ms and wall_ms() >= token.expires_ms)

    def allows(self, principal: Principal, verb: Verb, key: str) -> bool:
        allowed = _grants(self._view.policies, principal, verb, key)
        if allowed and self.engine.state.ambiguous():  # a stricter policy may be open: it counts
            return _grants(self._view.head_policies, principal, verb, key)
        return allowed

    def outranks(self, principal: Principal, roles: tuple[str, ...]) -> bool:
        """Whether these roles may do anything that the principal may not."""
        policies = self._view.policies
        wanted = policies.compiled(roles)
        bounds = (principal.roles, *principal.ceilings)
        return any(outranks(wanted, policies.compiled(bound)) for bound in bounds)

    def is_primary_here(self) -> bool:
        return self.engine.state.wished.role is not Role.REPLICA

    def primary_url(self) -> str | None:
        return self.engine.state.wished.peer_url or self._config.primary

    # --- reads --------------------------------------------------------------------------------

    def read(self, key: str, version: int | None) -> tuple[int, bytes] | None:
        """(version, JSON text), or None."""
        if version is None:
            return self._view.current(key, wall_ms())
        state = self._view.state(key)
        found = state.find(version) if state is not None else None
        if found is None or not found.readable(wall_ms()):
            return None
        text = self._view.value(key, version)
        return None if text is None else (version, text)

    def is_unsettled(self) -> bool:
        """Whether a restart leaves anything open (see `settled`)."""
        return self.engine.state.ambiguous()

    async def settled(self, key: str, *, prefix: bool = False) -> None:
        """Wait, up to 1 s, while a restart leaves open what was last written to this key (or to
        keys with this prefix); raises OutcomeUnknown if it stays open."""
        state = self.engine.state
        if not state.ambiguous():
            return
        is_open = self._view.is_open_under if prefix else self._view.is_open
        deadline = time.monotonic() + OPEN_WAIT_S
        while state.ambiguous() and is_open(key, state.shown_seq):
            if time.monotonic() >= deadline:
                raise plan.OutcomeUnknown("The last write to this key is not decided yet")
            await asyncio.sleep(0.01)

    def list_keys(self, principal: Principal, prefix: str, after: str, limit: int) -> Listing:
        """Readable keys that the principal may list; `next` says where to go on, if anywhere: it
        names no other key."""
        keys: list[str] = []
        for scanned, key in enumerate(self._view.scan(prefix, after, wall_ms()), 1):
            if self.allows(principal, "list", key):
                if len(keys) == limit:
                    return Listing(tuple(keys), keys[-1])
                keys.append(key)
            elif scanned >= MAX_SCAN:  # a long stretch of other people's keys
                return Listing(tuple(keys), seal_cursor(self._view.token_key or b"", key))
        return Listing(tuple(keys), None)

    def cursor_key(self, after: str) -> str | None:
        """The key in a `next` that is no key; None if `after` is none of those."""
        return open_cursor(self._view.token_key or b"", after)

    def history(self, key: str) -> tuple[VersionInfo, ...] | None:
        state = self._view.state(key)
        if state is None:
            return None
        now_ms = wall_ms()
        return tuple(
            VersionInfo(
                v.number,
                v.created_ms,
                v.expires_ms or None,
                v.deleted_ms or None,
                v.destroyed,
                v.readable(now_ms),
            )
            for v in state.versions
        )

    def tokens(self) -> tuple[PutToken, ...]:
        return tuple(self._view.tokens.by_accessor.values())

    def policies(self) -> dict[str, tuple[Rule, ...]]:
        return self._view.policies.roles

    def changes_after(self, last_id: str) -> list[tuple[tuple[Change, ...], Position]] | None:
        """What was decided since the event of this id; None if that cannot be told."""
        parsed = parse_event_id(last_id)
        if parsed is None:
            return None
        return self._view.decided_after(*parsed, self.engine.state.shown_seq)

    # --- writes -------------------------------------------------------------------------------

    async def write(self, write: plan.Write) -> plan.Written:
        metrics = self._metrics
        metrics.writes += 1
        try:
            written = await self.engine.write(write)
        except plan.Rejected:
            metrics.writes_rejected += 1
            raise
        except plan.OutcomeUnknown:
            metrics.writes_unknown += 1
            raise
        metrics.writes_degraded += written.degraded
        if written.line and (filed := self.audit.written(written.line)) is not None:
            try:
                await filed
            except AuditUnavailable:
                raise plan.OutcomeUnknown("Audit log unavailable") from None
        return written

    def new_token_hash(self, token: str) -> bytes:
        if self._view.token_key is None:
            raise plan.Rejected("The store is not founded yet", not_primary=False)
        return token_hash(self._view.token_key, token)

    def scope_hash(self, principal: Principal, idempotency_key: str) -> bytes:
        key = self._view.token_key or b""
        scope = principal.name.encode() + b"\0" + idempotency_key.encode()
        return hmac.digest(key, b"idempotency\0" + scope, "sha256")

    async def promote(self, *, force: bool) -> Promotion:
        promotion = await self.engine.promote(force=force)
        if not promotion.ok:
            raise PromotionRefused(promotion)
        return promotion

    async def rotate(self, *, master: bool) -> int:
        """A new data key (and master key): what is sealed from now on is under it, what was sealed
        before comes under it in the background. Gives its number; raises RotationRefused."""
        if len(self._keyring.numbers) >= MAX_DATA_KEYS:
            raise RotationRefused(f"{MAX_DATA_KEYS} data keys are kept: main.py doctor says why")
        if self._rotating.locked():
            raise RotationRefused("another one is just being begun")
        async with self._rotating:
            return await self._rotate(master=master)

    async def _rotate(self, *, master: bool) -> int:
        try:
            if master:
                path = self._config.master_key_path
                await asyncio.to_thread(replace_master, self._keyring, path)
                self.system_note("master_key", f"the keyring is wrapped by the new {path}")
            number = await asyncio.to_thread(self._keyring.rotate)
        except (OSError, ConfigError) as e:
            raise RotationRefused(str(e)) from None
        self.system_note("data_key", f"data key {number} is in use")
        self.reseal()
        return number

    def reseal(self) -> None:
        """Bring everything under the newest data key, if anything may not be (also at start)."""
        writer = self.engine.writer
        if writer is None or len(self._keyring.numbers) == 1:
            return
        job = Reseal(self._keyring.active_key)
        loop = asyncio.get_running_loop()

        def done() -> None:
            """(Writer's thread.)"""
            loop.call_soon_threadsafe(self._resealed, job, self._retire(job))

        self._resealing = True
        writer.background(job.slice, done)

    def _retire(self, job: Reseal) -> str:
        """Forget the data keys that nothing needs any more; gives why they are kept, else ""."""
        if job.damaged:
            return f"{job.damaged} rows do not open: run main.py doctor"
        if any(self._config.data_dir.glob("quarantine-*.db")):
            return "there are quarantined copies"
        try:
            self._keyring.retire(job.target)
        except OSError as e:
            return str(e)
        return ""

    def _resealed(self, job: Reseal, kept: str) -> None:
        if job.target == self._keyring.active_key:
            self._resealing = False
        details = f"{job.resealed} rows came under data key {job.target}"
        self.system_note("resealed", f"{details}; older keys are kept: {kept}" if kept else details)

    # --- audit --------------------------------------------------------------------------------

    def audit_key(self, key: str) -> str:
        """How a key's name stands in the audit log."""
        if not self._hmac_keys or not key:
            return key
        digest = hmac.digest(self._keyring.audit_mac_key, b"key\0" + key.encode(), "sha256")
        return "hmac:" + digest.hex()[:32]

    def on_audit_state(self, failure: str | None) -> None:
        if failure is None:
            log.warning("the audit log can be written again")
        else:
            log.error("the audit log cannot be written, requests are refused: %s", failure)
        self._events.publish("audit", failure=failure)

    def system_note(self, event: str, details: str) -> None:
        """Something happened to the pair: log, event stream and audit get it."""
        log.info("%s: %s", event, details)
        self._events.publish("pair", what=event, details=details)
        self.audit.note(
            f"pair.{event}", addr="", outcome="system", request_id="", status=0,
            who=f"node:{self._config.node_id}", detail=details[:256],
        )  # fmt: skip

    def anchors_path(self) -> Path | None:
        return self.heads.anchors_path()

    async def audit_entries(self, after_seq: int, limit: int) -> list[bytes]:
        """Lines of the audit log after `after_seq`, as they stand in the file."""
        path = self._config.audit_files[0]
        return await asyncio.to_thread(read_entries, path, after_seq, limit)

    # --- what the engine tells ----------------------------------------------------------------

    def on_reset(self, seq: int) -> None:
        """A snapshot has replaced everything; it ends at record `seq`."""
        self.ledger.replaced(seq)
        self._watches.lost()
        self._recheck()

    def on_shown(self, changes: tuple[Change, ...], position: Position) -> int:
        """A record was decided; gives the number of its audit line, if this node is to write it."""
        line = self.ledger.shown(changes, position.seq, position.epoch)
        self._watches.publish(changes, position)
        if any(isinstance(change, RevokeToken) for change in changes):
            self._recheck()
        return line

    def _recheck(self) -> None:
        """Tokens have been revoked: who holds one is nobody from now on, on open streams too."""
        self._known.clear()
        self._watches.recheck()
        self._events.recheck()

    # --- state --------------------------------------------------------------------------------

    def not_ready_because(self) -> str | None:
        return report.not_ready_because(self.engine.state, self.audit.unavailable())

    def is_degraded(self) -> bool:
        return self.engine.state.degraded

    def replication(self) -> dict[str, object]:
        return report.replication(self.engine.state, self._config)

    def status(self) -> dict[str, object]:
        anchored = self.heads.anchored
        return {
            "id": self._config.node_id,
            "url": self._config.url,
            **self.replication(),
            "audit": {
                "seq": self.audit.seq,
                "failure": self.audit.unavailable(),
                "peer_anchor_seq": anchored.seq if anchored is not None else None,
            },
            "data_key": self._keyring.active_key,
            "data_keys": self._keyring.numbers,
            "resealing": self._resealing,
            "demo_tokens": self._config.demo_tokens,
        }

    def gather_gauges(self) -> None:
        gauges = report.gauges(self.engine.state)
        gauges["audit_seq"] = self.audit.seq
        gauges["tokens"] = len(self._view.tokens.by_accessor)
        gauges["data_keys"] = len(self._keyring.numbers)
        self._metrics.gauges = gauges
        self._metrics.audit_fsyncs = self.audit.fsyncs
        if self.engine.writer is not None:
            self._metrics.commits = self.engine.writer.commits

    async def hand_over(self) -> None:
        """Take no more writes; seal for an in-step replica."""
        try:
            async with asyncio.timeout(1.5):
                await self.engine.leave()
        except TimeoutError:
            log.warning("the replica did not take the seal in time")

    async def stop(self) -> None:
        """Write down what is left, let go."""
        await self.engine.stop()
        if self._sweeper is not None:
            await self._sweeper.stop()
        await self.heads.stop()
        await asyncio.to_thread(self.audit.stop)


def _grants(policies: PolicySet, principal: Principal, verb: Verb, key: str) -> bool:
    """A token may do what its roles may, and what made it (and so on up) may."""
    return policies.allows(principal.roles, verb, key) and all(
        policies.allows(roles, verb, key) for roles in principal.ceilings
    )
