"""Heads of the *other* node's audit chain, kept here, where its owner cannot reach them.

One file per peer: the first line pins the peer's public key (first contact, over mutually
authenticated TLS), each further line is a head it signed. Heads that arrive close together are
written as one; the newest is always written. A head with a bad signature is not kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from secure_store.core.audit import Head
from secure_store.files import sync_directory

MAX_FILE_BYTES = 16 << 20


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of an anchors file."""

    node: str
    public_key: str


class AnchorError(Exception):
    """An anchors file, or a head, that cannot be trusted; the text says why."""


def check_head(public_key: bytes, head: Head) -> bool:
    """Whether the head was signed by the owner of the key."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(bytes.fromhex(head.signature), head.signed_text())
    except (InvalidSignature, ValueError):
        return False
    return True


class Anchors:
    """The file of one peer's heads. Appending is quick but syncs: call it from a worker thread."""

    def __init__(self, directory: Path, peer_id: str, public_key: bytes) -> None:
        self.peer_id = peer_id
        self.path = directory / f"anchors-{peer_id}.jsonl"
        self.public_key = public_key
        if self.path.exists():
            pin = read_pin(self.path)
            if pin.public_key != public_key.hex():
                raise AnchorError(f"{peer_id} has another audit key than the one pinned here")
        else:
            directory.mkdir(parents=True, exist_ok=True)
            self._append(msgspec.json.encode(Pin(peer_id, public_key.hex())) + b"\n")
            sync_directory(directory)
        self.last: Head | None = None

    def keep(self, head: Head) -> None:
        """Make a head durable; raises AnchorError for a bad signature, OSError for a bad disk."""
        if not check_head(self.public_key, head):
            raise AnchorError("a head is not signed by its node")
        self._append(msgspec.json.encode(head) + b"\n")
        self.last = head
        if self.path.stat().st_size > MAX_FILE_BYTES:
            self._thin_out()

    def _append(self, data: bytes) -> None:
        with self.path.open("ab") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def _thin_out(self) -> None:
        """Keep every other head of the older half: a cut or rewrite moves the newest ones
        anyway."""
        pin, heads = read_anchors(self.path)
        half = len(heads) // 2
        kept = heads[:half:2] + heads[half:]
        scratch = self.path.with_suffix(".new")
        with scratch.open("wb") as f:
            f.writelines(msgspec.json.encode(each) + b"\n" for each in (pin, *kept))
            f.flush()
            os.fsync(f.fileno())
        scratch.replace(self.path)
        sync_directory(self.path.parent)


def read_pin(path: Path) -> Pin:
    """The pin of an anchors file; raises AnchorError."""
    with path.open("rb") as f:
        try:
            return msgspec.json.decode(f.readline(), type=Pin)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise AnchorError(f"{path} does not begin with a public key") from None


def read_anchors(path: Path) -> tuple[Pin, list[Head]]:
    """An anchors file; raises AnchorError if a line is not a head signed by the pinned key.

    (A torn last line is what a crash leaves, and is passed over.)
    """
    pin = read_pin(path)
    lines = path.read_bytes().split(b"\n")
    return pin, check_heads(pin, lines[1:-1])


def check_heads(pin: Pin, lines: Iterable[bytes]) -> list[Head]:
    """Heads from JSON lines, each signature checked; raises AnchorError."""
    key = bytes.fromhex(pin.public_key)
    heads = []
    for number, line in enumerate(lines, 2):
        try:
            head = msgspec.json.decode(line, type=Head)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise AnchorError(f"line {number} is not a head") from None
        if not check_head(key, head):
            raise AnchorError(f"line {number} is not signed by {pin.node}")
        heads.append(head)
    return heads
