"""The only file where the rooms meet: what the api asks for, done with engine, view, audit and
keys."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secure_store.api.events import EventHub
from secure_store.api.keys import Listing, PromotionRefused, VersionInfo
from secure_store.api.watch import WatchHub
from secure_store.config import Config, ConfigError, valid_name
from secure_store.core import plan
from secure_store.core.audit import Head
from secure_store.core.changes import (
    Change,
    Destroy,
    MarkDeleted,
    PutPolicy,
    PutToken,
    PutValue,
    RevokeToken,
    UseToken,
)
from secure_store.core.effects import Promotion
from secure_store.core.messages import Role
from secure_store.core.pair import Phase
from secure_store.core.policy import Rule, Verb
from secure_store.core.tokens import Principal, plain_hash, token_hash
from secure_store.engine import Engine, wall_ms
from secure_store.ledger import Ledger
from secure_store.metrics import Metrics
from secure_store.storage.anchors import AnchorError, Anchors
from secure_store.storage.audit_files import read_entries
from secure_store.storage.audit_log import AuditLog, AuditUnavailable
from secure_store.storage.keyring import Keyring
from secure_store.storage.view import View
from secure_store.transport.link import AuditHead

log = logging.getLogger(__name__)

OPEN_WAIT_S = 1.0
MAX_SCAN = 10_000


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
        self._heads_sent: dict[int, int] = {}  # link -> seq of the last head sent on it
        self._anchors: Anchors | None = None
        self._head_waiting: AuditHead | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._anchor_complaint = ""
        self._public_key = keyring.signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self._hmac_keys = config.audit_keys == "hmac"
        self.ledger = Ledger(config.node_id, audit)

    @property
    def node_id(self) -> str:
        return self._config.node_id

    def attach(self, engine: Engine) -> None:
        self._engine = engine

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
        static = self._static.get(plain_hash(token))
        hashed = token_hash(view.token_key or b"", token)
        found = view.tokens.find(hashed, wall_ms())
        if found is not None and self.engine.state.ambiguous():
            found = view.head_tokens.find(hashed, wall_ms())  # a revocation may be open: it counts
        return static or found

    def is_still_valid(self, principal: Principal) -> bool:
        """Whether an open stream of this principal may go on."""
        if not principal.accessor:
            return True
        token = self._view.tokens.by_accessor.get(principal.accessor)
        return token is not None and not (token.expires_ms and wall_ms() >= token.expires_ms)

    def allows(self, principal: Principal, verb: Verb, key: str) -> bool:
        allowed = self._view.policies.allows(principal.roles, verb, key)
        if allowed and self.engine.state.ambiguous():  # a stricter policy may be open: it counts
            return self._view.head_policies.allows(principal.roles, verb, key)
        return allowed

    def is_primary_here(self) -> bool:
        return self.engine.state.wished.role is not Role.REPLICA

    def primary_url(self) -> str | None:
        return self.engine.state.wished.peer_url or self._config.primary

    # --- reads --------------------------------------------------------------------------------

    async def read(self, key: str, version: int | None) -> tuple[int, bytes] | None:
        """(version, JSON text), or None."""
        if version is None:
            return self._view.current(key, wall_ms())
        state = self._view.state(key)
        found = state.find(version) if state is not None else None
        if found is None or not found.readable(wall_ms()):
            return None
        text = self._view.value(key, version)
        return None if text is None else (version, text)

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
        """Readable keys that the principal may list; `more` if there are others beyond."""
        allows = self._view.policies.allows
        keys: list[str] = []
        seen = ""
        scanned = 0
        for key in islice(self._view.scan(prefix, after, wall_ms()), MAX_SCAN):
            scanned += 1
            if len(keys) == limit:
                return Listing(tuple(keys), keys[-1])
            seen = key
            if allows(principal.roles, "list", key):
                keys.append(key)
        return Listing(tuple(keys), seen if scanned == MAX_SCAN else None)

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

    def policy(self, role: str) -> tuple[Rule, ...] | None:
        return self._view.policies.roles.get(role)

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

    def rotate_data_key(self) -> int:
        """A new data key for everything that is sealed from now on; the old ones stay readable."""
        return self._keyring.rotate()

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

    def next_head(self, link: int) -> AuditHead | None:
        """Our chain's signed end for the other node, if it has moved since the last one there."""
        seq = self.audit.seq
        if self._heads_sent.get(link) == seq:
            return None
        self._heads_sent = {link: seq}
        head = self.audit.signed_head()
        return AuditHead(head, self._public_key.hex())

    def on_head(self, message: AuditHead) -> None:
        """The other node's chain: keep the newest head, as fast as the disk takes them."""
        name = message.head.node
        try:
            valid_name(name, "the other node's name")  # it names a file
        except ConfigError as e:
            log.error("%s", e)
            return
        if name == self._config.node_id:
            log.error("the other node has this node's --id %r", name)
            return
        self._head_waiting = message
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep_heads(), name="anchors")

    async def _keep_heads(self) -> None:
        while (message := self._head_waiting) is not None:
            self._head_waiting = None
            try:
                await asyncio.to_thread(self._keep_head, message)
            except (AnchorError, OSError, ValueError) as e:
                if str(e) != self._anchor_complaint:
                    self._anchor_complaint = str(e)
                    log.error("the other node's audit head was not kept: %s", e)
                return
            await asyncio.sleep(0.1)

    def _keep_head(self, message: AuditHead) -> None:
        if self._anchors is None or self._anchors.peer_id != message.head.node:
            self._anchors = Anchors(
                self._config.data_dir / "audit",
                message.head.node,
                bytes.fromhex(message.public_key),
            )
        if message.public_key != self._anchors.public_key.hex():
            raise AnchorError("it is signed with another key than the one pinned")
        self._anchors.keep(message.head)

    async def audit_entries(self, after_seq: int, limit: int) -> list[bytes]:
        """Lines of the audit log after `after_seq`, as they stand in the file."""
        path = self._config.audit_files[0]
        return await asyncio.to_thread(read_entries, path, after_seq, limit)

    def anchors_path(self) -> Path | None:
        """The file of the other node's heads, once there is one."""
        return self._anchors.path if self._anchors is not None else None

    @property
    def anchored(self) -> Head | None:
        return self._anchors.last if self._anchors is not None else None

    # --- what the engine tells ----------------------------------------------------------------

    def on_shown(self, changes: tuple[Change, ...], seq: int) -> int:
        """A record was decided; gives the number of its audit line, if this node is to write it."""
        recheck = False
        line = self.ledger.shown(changes, seq)
        for change in changes:
            match change:
                case PutValue(key, version, value):
                    self._watches.publish("set", key, version, value)
                case MarkDeleted(key, version, deleted_ms):
                    self._watches.publish("delete" if deleted_ms else "undelete", key, version)
                case Destroy(key, version):
                    self._watches.publish("destroy", key, version)
                case RevokeToken() | PutPolicy() | UseToken():
                    recheck = True
                case _:
                    pass
        if recheck:
            self._watches.recheck()
        return line

    # --- state --------------------------------------------------------------------------------

    def not_ready_because(self) -> str | None:
        state = self.engine.state
        if (failure := self.audit.unavailable()) is not None:
            return f"audit log: {failure}"
        if state.wished.role is Role.PRIMARY:
            if state.refused:
                return state.refused
            if not state.is_primary:
                return "starting"
            making = time.monotonic_ns() // 1_000_000 < state.making_until_ms
            if state.degraded and making:
                return "a link to the replica is being made"
        return None

    def is_degraded(self) -> bool:
        return self.engine.state.degraded

    def replication(self) -> dict[str, object]:
        state = self.engine.state
        session = state.session
        mine = state.wished
        contact = state.last_contact_ms
        body: dict[str, object] = {
            "role": mine.role.value,
            "cluster_id": mine.cluster_id,
            "epoch": mine.epoch,
            "mode": mine.mode.value,
            "in_step": mine.in_step if mine.role is Role.PRIMARY else mine.told_in_step,
            "degraded": state.degraded,
            "last_seq": state.last.seq,
            "durable_seq": state.durable_seq,
            "shown_seq": state.shown_seq,
            "link": session.phase.value if session is not None else "down",
            "last_contact_ms_ago": (
                None if contact is None else time.monotonic_ns() // 1_000_000 - contact
            ),
            "peer": {"id": mine.peer_id, "url": mine.peer_url or self._config.replica or ""},
            "refused": state.refused or None,
            "sealed": state.sealed or mine.sealed is not None,
        }
        if mine.role is Role.PRIMARY and session is not None:
            live = session.phase in (Phase.CATCHUP, Phase.LIVE)
            body["replica_lag"] = state.last.seq - session.acked_seq if live else None
        return body

    def status(self) -> dict[str, object]:
        head = self.anchored
        return {
            "id": self._config.node_id,
            "url": self._config.url,
            **self.replication(),
            "audit": {
                "seq": self.audit.seq,
                "failure": self.audit.unavailable(),
                "peer_anchor_seq": head.seq if head is not None else None,
            },
            "data_key": self._keyring.active_key,
            "demo_tokens": self._config.demo_tokens,
        }

    def gather_gauges(self) -> None:
        state = self.engine.state
        self._metrics.gauges = {
            "last_seq": state.last.seq,
            "shown_seq": state.shown_seq,
            "epoch": state.wished.epoch,
            "is_primary": int(state.is_primary),
            "degraded": int(state.degraded),
            "link_up": int(state.session is not None),
            "audit_seq": self.audit.seq,
            "waiting_writes": len(state.held) + len(state.pending),
            "tokens": len(self._view.tokens.by_accessor),
        }
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
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await asyncio.to_thread(self.audit.stop)


def log_id_of(keyring: Keyring) -> str:
    """Names the node's audit log: derived from its signing key."""
    public = keyring.signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return hashlib.sha256(public).hexdigest()[:32]
