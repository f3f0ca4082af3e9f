"""One file that holds a whole store, and making a node's data directory from it.

    SECURE-STORE-BACKUP 1\\n | u32 length | manifest (JSON) | keyring.json | store.db | HMAC-SHA256

Everything in it is sealed as at rest: without the master key of its time it opens for nobody. The
HMAC (its key comes from the keyring, so from the master key) covers every byte before it. The copy
of the database is one consistent view (VACUUM INTO), of a running node or a stopped one, and every
row of it is opened before the file gets its name.

A restored store is a **new incarnation**: another cluster id, the next epoch, no log, other audit
keys. Whoever remembers the old cluster (its replica, a primary that still lives) refuses it and is
refused, instead of being overwritten; an empty node joins it and gets a snapshot.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import sqlite3
from pathlib import Path
from typing import BinaryIO

import msgspec

from secure_store.config import ConfigError
from secure_store.core.audit import Told
from secure_store.core.effects import Durable
from secure_store.core.kv import Damaged
from secure_store.core.messages import Role
from secure_store.files import sync_directory, write_durably
from secure_store.storage.audit_files import read_end
from secure_store.storage.data_dir import Identity
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring

MAGIC = b"SECURE-STORE-BACKUP 1\n"
MAC_BYTES = 32
MAX_MANIFEST_BYTES = 64 << 10
MAX_KEYRING_BYTES = 1 << 20
PARTS = ("keyring.json", "store.db")
_CHUNK = 1 << 20


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file in the backup."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a backup is of."""

    made_at: str  # UTC
    node: str
    cluster_id: str
    epoch: int
    seq: int  # the last record in it
    record_hash: str
    keys: int
    audit_seq: int  # where the node's audit log ended
    audit_mac: str
    parts: tuple[Part, ...]


class BackupError(Exception):
    """A backup that cannot be made, or is not one that may be restored; the text says why."""


# --- making one


def create(data_dir: Path, keyring_of: Keyring, out: Path, *, node: str, made_at: str) -> Manifest:
    """Write a backup of `data_dir` to the new file `out` (mode 0600, whole or not at all).

    The node may be running. Raises BackupError, OSError.
    """
    if out.exists():
        raise BackupError(f"{out} exists already; it is not overwritten")
    copy = out.with_name(f".{out.name}.{os.getpid()}.db")
    scratch = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        manifest, keyring_file = _copy(data_dir, keyring_of, copy, node=node, made_at=made_at)
        fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            mac = hmac.new(keyring_of.derive(b"backup"), digestmod="sha256")
            text = msgspec.json.encode(manifest)
            for piece in (MAGIC, len(text).to_bytes(4, "big"), text, keyring_file):
                f.write(piece)
                mac.update(piece)
            with copy.open("rb") as source:
                while piece := source.read(_CHUNK):
                    f.write(piece)
                    mac.update(piece)
            f.write(mac.digest())
            f.flush()
            os.fsync(f.fileno())
        scratch.replace(out)
        sync_directory(out.parent)
    except (sqlite3.Error, Damaged) as e:
        raise BackupError(f"{data_dir}: {e}") from None
    finally:
        copy.unlink(missing_ok=True)
        scratch.unlink(missing_ok=True)
    return manifest


def _copy(
    data_dir: Path, keyring: Keyring, copy: Path, *, node: str, made_at: str
) -> tuple[Manifest, bytes]:
    """A copy of the database in which everything opens, and the keyring that opens it."""
    live = Database(data_dir / "store.db", keyring)
    try:
        live.copy_to(copy)
    finally:
        live.close()
    # After the copy: a key that came in between is of no use to it, one that it needs is there
    # unless a rotation has just ended, which the inspection finds.
    keyring_file = (data_dir / "keyring.json").read_bytes()
    database = Database(copy, keyring)
    try:
        database.begin_read()
        if problems := list(database.inspect()):
            raise BackupError(f"{data_dir} is damaged (main.py doctor): {problems[0]}")
        last, durable = database.last(), database.load_state()
        keys = database.db.execute("SELECT count(*) FROM keys").fetchone()[0]
    finally:
        database.close()
    if durable.role is Role.UNJOINED:
        raise BackupError(f"{data_dir} holds nothing yet")
    if durable.shown_limit is not None:
        raise BackupError(
            f"{data_dir}: its history is about to be replaced; back the other node up"
        )
    end = read_end(data_dir / "audit" / "audit.log", keyring.audit_mac_key)
    parts = (
        Part(PARTS[0], len(keyring_file), hashlib.sha256(keyring_file).hexdigest()),
        Part(PARTS[1], copy.stat().st_size, _sha256(copy)),
    )
    manifest = Manifest(
        made_at, node, durable.cluster_id, durable.epoch, last.seq, last.hash.hex(), keys,
        end.seq, end.mac.hex(), parts,
    )  # fmt: skip
    return manifest, keyring_file


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- reading one


def verify(path: Path, master: bytes, into: Path) -> tuple[Manifest, Keyring]:
    """Unpack the backup into the empty folder `into` and check all of it: every byte, every row.

    Raises BackupError (`into` may hold part of it then), OSError.
    """
    with path.open("rb") as f:
        manifest, head = _read_manifest(f, path)
        sizes = [part.size for part in manifest.parts]
        if len(head) + sum(sizes) + MAC_BYTES != path.stat().st_size:
            raise BackupError(f"{path} is truncated, or longer than it was")
        keyring_file = f.read(sizes[0])
        (into / PARTS[0]).write_bytes(keyring_file)
        try:
            keyring = Keyring.open_or_make(into / PARTS[0], master)
        except ConfigError as e:
            raise BackupError(f"{path}: {str(e).removeprefix(f'{into / PARTS[0]}: ')}") from None
        mac = hmac.new(keyring.derive(b"backup"), digestmod="sha256")
        mac.update(head)
        mac.update(keyring_file)
        digest = hashlib.sha256()
        left = sizes[1]
        with (into / PARTS[1]).open("wb") as out:
            while left and (piece := f.read(min(_CHUNK, left))):
                left -= len(piece)
                mac.update(piece)
                digest.update(piece)
                out.write(piece)
        if not hmac.compare_digest(mac.digest(), f.read()):
            raise BackupError(f"{path} is damaged: its MAC does not fit")
    hashes = [hashlib.sha256(keyring_file).hexdigest(), digest.hexdigest()]
    if hashes != [part.sha256 for part in manifest.parts]:
        raise BackupError(f"{path} is damaged: a part is not what its manifest says")
    _check_database(into / PARTS[1], keyring, manifest, path)
    return manifest, keyring


def read_manifest(path: Path) -> Manifest:
    """What a backup says that it is of (not verified); raises BackupError, OSError."""
    with path.open("rb") as f:
        return _read_manifest(f, path)[0]


def _read_manifest(f: BinaryIO, path: Path) -> tuple[Manifest, bytes]:
    """(manifest, every byte up to its end)."""
    head = f.read(len(MAGIC) + 4)
    size = int.from_bytes(head[len(MAGIC) :], "big")
    if head[: len(MAGIC)] != MAGIC or len(head) != len(MAGIC) + 4 or size > MAX_MANIFEST_BYTES:
        raise BackupError(f"{path} is not a backup of this store")
    text = f.read(size)
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise BackupError(f"{path} is damaged: its manifest cannot be read") from None
    sizes = [part.size for part in manifest.parts]
    if tuple(part.name for part in manifest.parts) != PARTS or min(sizes) < 0:
        raise BackupError(f"{path} is damaged: its manifest names other parts")
    if sizes[0] > MAX_KEYRING_BYTES:
        raise BackupError(f"{path} is damaged: its keyring is too long")
    return manifest, head + text


def _check_database(database_path: Path, keyring: Keyring, manifest: Manifest, path: Path) -> None:
    database = Database(database_path, keyring)
    try:
        database.begin_read()
        problems = list(database.inspect())
        last, durable = database.last(), database.load_state()
    except (sqlite3.Error, Damaged) as e:
        raise BackupError(f"{path} is damaged: {e}") from None
    finally:
        database.close()
    if problems:
        raise BackupError(f"{path} is damaged: {problems[0]}")
    named = (manifest.cluster_id, manifest.epoch, manifest.seq, manifest.record_hash)
    if named != (durable.cluster_id, durable.epoch, last.seq, last.hash.hex()):
        raise BackupError(f"{path} is damaged: it holds another position than its manifest says")


def restore(
    path: Path,
    master: bytes,
    data_dir: Path,
    *,
    node: str,
    fresh_cluster_id: str,
    keep_tokens: bool,
    now_ms: int,
) -> Manifest:
    """Make `data_dir` (absent or empty) from the backup: all of it is verified in a folder beside,
    which takes its name at the end. Raises BackupError, OSError."""
    if data_dir.exists() and any(data_dir.iterdir()):
        raise BackupError(f"{data_dir} is not empty; a restore overwrites nothing")
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = data_dir.with_name(f".{data_dir.name}.restore-{os.getpid()}")
    scratch.mkdir(mode=0o700)
    try:
        manifest, keyring = verify(path, master, scratch)
        try:
            _reincarnate(scratch, keyring, fresh_cluster_id, keep_tokens=keep_tokens, now_ms=now_ms)
        except (sqlite3.Error, Damaged) as e:
            raise BackupError(f"{path}: {e}") from None
        identity = Identity("secure_store", node)
        write_durably(scratch / "identity.json", msgspec.json.encode(identity))
        write_durably(scratch / "restored.json", msgspec.json.encode(manifest))
        if data_dir.exists():
            data_dir.rmdir()
        scratch.rename(data_dir)
        sync_directory(data_dir.parent)
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)
    return manifest


def _reincarnate(
    folder: Path, keyring: Keyring, cluster_id: str, *, keep_tokens: bool, now_ms: int
) -> None:
    """Fold what the log still held, then begin a cluster of its own in the next epoch."""
    database = Database(folder / PARTS[1], keyring, writable=True)
    try:
        was, position = database.load_state(), database.last()
        database.begin()
        tail = database.read_log(database.applied().seq, 1 << 62, 1 << 62)
        if tail is None:
            raise Damaged("the log has a gap")
        database.apply(tail, database.load_tokens(), now_ms)
        if not keep_tokens:
            database.drop_tokens()
        database.drop_log(position)
        database.save_told(Told(position.seq, 0))
        database.save_state(
            Durable(role=Role.PRIMARY, cluster_id=cluster_id, epoch=was.epoch + 1, mode=was.mode)
        )
        database.commit()
    finally:
        database.close()
    keyring.renew_audit_keys()
    database = Database(folder / PARTS[1], keyring, writable=True)
    try:
        database.begin()
        database.recount()
        database.commit()
        database.begin_read()
        if problems := list(database.inspect()):
            raise Damaged(problems[0])
        database.end_read()
        database.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        database.close()


def restored_from(data_dir: Path) -> Manifest | None:
    """The backup that this data directory was made from, if it was."""
    try:
        return msgspec.json.decode((data_dir / "restored.json").read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return None
