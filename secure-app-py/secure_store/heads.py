"""The ends of the two audit chains on their way: ours to the other node, the other node's kept
here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secure_store.config import Config, ConfigError, valid_name
from secure_store.core.audit import Head
from secure_store.storage.anchors import AnchorError, Anchors
from secure_store.storage.audit_log import AuditLog
from secure_store.storage.keyring import Keyring
from secure_store.transport.link import AuditHead

log = logging.getLogger(__name__)


class PeerHeads:
    """Used on the event loop."""

    def __init__(self, config: Config, audit: AuditLog, keyring: Keyring) -> None:
        self._config = config
        self.audit = audit
        self._heads_sent: dict[int, int] = {}  # link -> seq of the last head sent on it
        self._anchors: Anchors | None = None
        self._head_waiting: AuditHead | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._anchor_complaint = ""
        self._public_key = keyring.signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

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

    def anchors_path(self) -> Path | None:
        """The file of the other node's heads, once there is one."""
        return self._anchors.path if self._anchors is not None else None

    @property
    def anchored(self) -> Head | None:
        return self._anchors.last if self._anchors is not None else None

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)


def log_id_of(keyring: Keyring) -> str:
    """Names the node's audit log: derived from its signing key."""
    public = keyring.signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return hashlib.sha256(public).hexdigest()[:32]
