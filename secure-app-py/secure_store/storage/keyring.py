"""The node's keys: a master key wraps the data keys and the audit keys, which seal everything else.

`master.key` (base64 of 32 bytes, mode 0600) never leaves its file. `keyring.json` holds the other
keys, each wrapped by it (AES-256-GCM, the key's name as associated data). New values are sealed
under the newest data key; older ones stay readable until reseal.py has brought every row under it,
so rotation needs no downtime.

**Another master key** comes in by files, never over the network: `master.key.next`. The keyring is
wrapped by it (one atomic write), then it takes the place of `master.key` (one rename), and what was
there is kept as `master.key.old`. A crash in between leaves a keyring that the next one opens: a
start looks, and finishes. Two nodes that share one file do so one after the other: the second finds
that its keyring opens with the old one.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import stat
import sys
import threading
from collections import deque
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from secure_store.config import ConfigError
from secure_store.core.kv import Damaged
from secure_store.files import sync_directory, write_durably, write_private

KEY_BYTES = 32
NONCE_BYTES = 12
ID_BYTES = 4
NONCES = 256  # drawn from the system at once
OVERHEAD_BYTES = ID_BYTES + NONCE_BYTES + 16


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    data_keys: dict[str, bytes]
    audit_mac: bytes
    audit_sign: bytes


class Keyring:
    """Seals and opens. Thread-safe; a retired data key goes from the file, and from memory at the
    next start (somebody may be reading an older view of the database)."""

    def __init__(self, path: Path, master: bytes, file: _File) -> None:
        self._path = path
        self._master = AESGCM(master)
        self._lock = threading.Lock()
        self._raw = {int(i): self._unwrap(f"data/{i}", w) for i, w in file.data_keys.items()}
        if not self._raw:
            raise Damaged("the keyring holds no data key")
        self._ciphers = {i: AESGCM(raw) for i, raw in self._raw.items()}
        self._active = max(self._ciphers)
        self._nonces: deque[bytes] = deque()  # each is taken out once, by whichever thread
        self.audit_mac_key = self._unwrap("audit_mac", file.audit_mac)
        self._sign_seed = self._unwrap("audit_sign", file.audit_sign)
        self.signer = Ed25519PrivateKey.from_private_bytes(self._sign_seed)

    @property
    def active_key(self) -> int:
        """The data key that new values are sealed under."""
        return self._active

    def seal(self, name: bytes, plain: bytes) -> bytes:
        """Encrypt under the active data key; `name` says what and where this is, and is bound to
        it."""
        active = self._active  # once: another thread may rotate
        number = active.to_bytes(ID_BYTES, "big")
        nonce = self._nonce()
        return number + nonce + self._ciphers[active].encrypt(nonce, plain, number + name)

    def _nonce(self) -> bytes:
        """Fresh chance: a system call for each would cost as much as the sealing."""
        while True:
            try:
                return self._nonces.popleft()
            except IndexError:
                drawn = os.urandom(NONCES * NONCE_BYTES)
                starts = range(0, len(drawn), NONCE_BYTES)
                self._nonces.extend(drawn[at : at + NONCE_BYTES] for at in starts)

    def open(self, name: bytes, sealed: bytes) -> bytes:
        """What `seal` was given under this name; raises Damaged for anything else."""
        if not isinstance(sealed, bytes):  # SQLite keeps whatever a flipped type byte says
            raise Damaged("stored data is of a wrong type")
        number = sealed[:ID_BYTES]
        cipher = self._ciphers.get(int.from_bytes(number, "big"))
        nonce = sealed[ID_BYTES : ID_BYTES + NONCE_BYTES]
        if cipher is None or len(sealed) < OVERHEAD_BYTES:
            raise Damaged("stored data is sealed under no known key")
        try:
            return cipher.decrypt(nonce, sealed[ID_BYTES + NONCE_BYTES :], number + name)
        except InvalidTag:
            raise Damaged("stored data does not open") from None

    def derive(self, purpose: bytes) -> bytes:
        """A key of its own for `purpose`; a rotation does not change it."""
        return hmac.digest(self.audit_mac_key, b"derive\0" + purpose, "sha256")

    def rotate(self) -> int:
        """Add a data key, durable before it is used; returns its number."""
        with self._lock:
            number = self._active + 1
            raw = os.urandom(KEY_BYTES)
            self._raw[number] = raw
            self._write()
            self._ciphers[number] = AESGCM(raw)
            self._active = number
        return number

    @property
    def numbers(self) -> list[int]:
        """The data keys that are kept."""
        return sorted(self._raw)

    def retire(self, below: int) -> None:
        """Forget the data keys below this number: nothing is sealed under them any more."""
        with self._lock:
            self._raw = {number: raw for number, raw in self._raw.items() if number >= below}
            self._write()

    def rewrap(self, master: bytes) -> None:
        """Wrap every key by another master key (see replace_master)."""
        with self._lock:
            self._master = AESGCM(master)
            self._write()

    def renew_audit_keys(self) -> None:
        """Begin another audit log: a restored node must not sign as the one that it is a copy of.
        (The rows' tally is keyed by these too: it must be made anew.)"""
        with self._lock:
            self.audit_mac_key, self._sign_seed = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
            self.signer = Ed25519PrivateKey.from_private_bytes(self._sign_seed)
            self._write()

    def _write(self) -> None:
        file = _File(
            {str(i): self._wrap(f"data/{i}", raw) for i, raw in self._raw.items()},
            self._wrap("audit_mac", self.audit_mac_key),
            self._wrap("audit_sign", self._sign_seed),
        )
        write_durably(self._path, msgspec.json.encode(file))

    def _wrap(self, name: str, raw: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._master.encrypt(nonce, raw, name.encode())

    def _unwrap(self, name: str, wrapped: bytes) -> bytes:
        try:
            return self._master.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise Damaged(f"the master key does not open {name!r}") from None

    @classmethod
    def open_or_make(cls, path: Path, master: bytes) -> Keyring:
        """The keyring at `path`, made if absent; raises ConfigError if it does not open."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return cls._make(path, master)
        try:
            return cls(path, master, msgspec.json.decode(raw, type=_File))
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as e:
            raise ConfigError(f"{path} is damaged: {e}") from None
        except Damaged as e:
            raise ConfigError(f"{path}: {e}") from None

    @classmethod
    def _make(cls, path: Path, master: bytes) -> Keyring:
        cipher = AESGCM(master)

        def wrap(name: str) -> bytes:
            nonce = os.urandom(NONCE_BYTES)
            return nonce + cipher.encrypt(nonce, os.urandom(KEY_BYTES), name.encode())

        file = _File({"1": wrap("data/1")}, wrap("audit_mac"), wrap("audit_sign"))
        write_durably(path, msgspec.json.encode(file))
        return cls(path, master, file)


def read_master_key(path: Path) -> bytes:
    """The 32 bytes in a master key file; raises ConfigError, naming what is wrong."""
    try:
        text = path.read_bytes().strip()
        mode = path.stat().st_mode
    except OSError as e:
        raise ConfigError(f"master key {path}: {e.strerror or e}") from e
    if sys.platform != "win32" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"master key {path} is readable by others: chmod 600 it")
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"master key {path}: expected base64 of {KEY_BYTES} bytes")
    return key


def make_master_key(path: Path) -> bytes:
    """Write a new master key (mode 0600, durable) that must not exist yet."""
    key = os.urandom(KEY_BYTES)
    write_private(path, base64.b64encode(key) + b"\n")
    return key


def beside(path: Path, suffix: str) -> Path:
    """`master.key` -> `master.key.next`, `master.key.old`."""
    return path.with_name(path.name + suffix)


def open_keyring(keyring_path: Path, master_path: Path, *, finish: bool) -> Keyring:
    """A node's keyring by its master key file; if a change of master keys was interrupted, by the
    next or the old one. `finish`: then bring the change to its end. Raises ConfigError."""
    try:
        return Keyring.open_or_make(keyring_path, read_master_key(master_path))
    except ConfigError as refused:
        for suffix in (".next", ".old"):
            other = beside(master_path, suffix)
            if not other.exists() or not keyring_path.exists():
                continue
            try:
                keyring = Keyring.open_or_make(keyring_path, read_master_key(other))
            except ConfigError:
                continue
            if finish and suffix == ".next":
                _put_in_place(master_path)
            elif finish:
                keyring.rewrap(read_master_key(master_path))
            return keyring
        raise refused from None


def replace_master(keyring: Keyring, master_path: Path) -> None:
    """Wrap the keyring by the key in `<master key>.next` (made if absent), and put that in place;
    the old one is kept as `<master key>.old`. Raises ConfigError, OSError."""
    following = beside(master_path, ".next")
    if not following.exists():
        make_master_key(following)
    keyring.rewrap(read_master_key(following))
    _put_in_place(master_path)


def _put_in_place(master_path: Path) -> None:
    """Only once the keyring is wrapped by the next key. Until the last line `.next` opens it."""
    old = beside(master_path, ".old")
    old.unlink(missing_ok=True)
    write_private(old, master_path.read_bytes())
    beside(master_path, ".next").replace(master_path)
    sync_directory(master_path.parent)
