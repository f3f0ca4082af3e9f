"""`main.py cert`, `key`, `backup` and `restore`: what an operator must keep, and keeps safe."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secure_store.client import SecureClient
from secure_store.commands.remote import add_connection, ask, urls_of
from secure_store.commands.terminal import (
    add_node,
    data_dir_of,
    node_files,
    say,
    steady,
    warn,
)
from secure_store.config import ConfigError, valid_name
from secure_store.core.kv import Damaged
from secure_store.storage.backup import BackupError, Manifest, create, restore, verify
from secure_store.storage.data_dir import DataDir, stored_identity
from secure_store.storage.database import Database
from secure_store.storage.keyring import (
    make_master_key,
    open_keyring,
    read_master_key,
    replace_master,
)
from secure_store.storage.reseal import Reseal
from secure_store.transport.tls import make_certificate

POLL_S = 0.2


def add(commands: Any) -> None:
    """Add `cert`, `key`, `backup` and `restore` to main.py's commands."""
    cert = commands.add_parser(
        "cert", help="make a self-signed P-256 certificate and its key",
        description="Make a self-signed P-256 certificate and its key (mode 0600). Nothing is "
        "overwritten.",
        examples=["main.py cert", "main.py cert --host store-a.example --host 10.0.0.1 "
                  "--cert a.crt --key a.key"],
    )  # fmt: skip
    cert.add_argument("--cert", default="server.crt")
    cert.add_argument("--key", default="server.key")
    cert.add_argument("--host", action="append", default=[], help="a name or address; many times")
    cert.add_argument("--days", type=int, default=825)
    cert.set_defaults(run=_cert)
    _add_key(commands)
    backup = commands.add_parser(
        "backup", help="one file with all that a node stores",
        description="Write a consistent copy of a node's store to one new file (mode 0600), sealed "
        "as at rest; the\nnode may be running. Every row is opened before the file gets its name. "
        "The file opens only\nwith the master key of its time: keep that elsewhere.",
        examples=["main.py backup --id nodeA --out /backups/nodeA-2030-01-31",
                  "main.py backup --verify /backups/nodeA-2030-01-31 --master_key_file a.key"],
    )  # fmt: skip
    add_node(backup)
    what = backup.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", help="the file to make")
    what.add_argument("--verify", help="a backup to check instead: every byte, every row")
    backup.set_defaults(run=_backup)
    back = commands.add_parser(
        "restore", help="make a node's data directory from a backup",
        description="Make an empty (or absent) data directory from a backup, after checking all of "
        "it. The result is\na cluster of its own, a lone primary in the next epoch: nodes of the "
        "old cluster refuse it. Tokens\nthat were revoked after the backup are valid again; "
        "--without_tokens forgets them all.",
        examples=["main.py restore --id nodeA --from /backups/nodeA-2030-01-31 "
                  "--master_key_file a.key",
                  "main.py restore --id nodeA --from b --master_key_file a.key --without_tokens"],
    )  # fmt: skip
    add_node(back)
    back.add_argument("--from", dest="source", required=True, help="the backup")
    back.add_argument("--without_tokens", action="store_true", help="forget every token in it")
    back.set_defaults(run=_restore)


def _add_key(commands: Any) -> None:
    key = commands.add_parser(
        "key", help="make a master key, or rotate keys",
        examples=["main.py key make /secure/a.key   # also: main.py key /secure/a.key",
                  "main.py key rotate --url https://127.0.0.1:8000",
                  "main.py key rotate --url https://127.0.0.1:8000 --master"],
    )  # fmt: skip
    actions = key.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="make a master key",
                              examples=["main.py key make /secure/a.key"])  # fmt: skip
    make.add_argument("file", help="the file to make (mode 0600)")
    make.set_defaults(run=_make_key)
    rotate = actions.add_parser(
        "rotate", help="a new data key (and master key) for one node, while it serves",
        description="A new data key for one node: every stored row is sealed anew under it, in the "
        "background, and\nthen the old one is forgotten. --master: also a new master key, taken "
        "from <master key>.next on\nthe node's machine (made if absent); the old one is kept "
        "beside it as .old, and may be deleted\nwhen this has returned with code 0 (older backups "
        "still need it). Tokens are not affected. With\n--id instead of --url: of a stopped node, "
        "by its files. Each node has keys of its own: rotate both.",
        examples=["main.py key rotate --url https://127.0.0.1:8000",
                  "main.py key rotate --url https://127.0.0.1:8001 --master",
                  "main.py key rotate --id nodeA --master"],
    )  # fmt: skip
    rotate.add_argument("--master", action="store_true", help="the master key too")
    rotate.add_argument("--wait", type=float, default=600.0,
                        help="seconds to wait for the end (default 600; 0: do not)")  # fmt: skip
    add_node(rotate)
    add_connection(rotate, one_node=True)
    rotate.set_defaults(run=_rotate)


def _cert(args: argparse.Namespace) -> int:
    if not 1 <= args.days <= 3650:
        raise ConfigError("--days: expected 1 to 3650")
    cert, key = Path(args.cert), Path(args.key)
    for path in (cert, key):
        if path.exists():
            raise ConfigError(f"{path} exists already; it is not overwritten")
    try:
        make_certificate(cert, key, tuple(args.host), args.days)
    except OSError as e:
        raise ConfigError(f"{e.filename}: {e.strerror}") from None
    say(f"made {cert} and {key}")
    return 0


def _make_key(args: argparse.Namespace) -> int:
    path = Path(args.file)
    if path.exists():
        raise ConfigError(f"{path} exists already; it is not overwritten")
    try:
        make_master_key(path)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    say(f"made {path}; keep a copy elsewhere: without it the data cannot be read")
    return 0


# --- rotation


def _rotate(args: argparse.Namespace) -> int:
    if args.id is not None or args.data_dir is not None:
        if args.url:
            raise ConfigError("--url or --id, not both")
        return _rotate_stopped(args)
    url = urls_of(args)[-1]

    async def work(client: SecureClient) -> dict[str, Any]:
        began = await client.ask(url, "POST", "/admin/rotate", {"master": args.master})
        deadline = time.monotonic() + args.wait
        while True:
            status = await client.ask(url, "GET", "/status")
            if not status["resealing"] or time.monotonic() >= deadline:
                return {**began, **status}
            await asyncio.sleep(POLL_S)

    done = ask(args, work)
    if done is None:
        return 1
    number = done["data_key"]
    if done["resealing"]:
        say(f"{done['id']}: new rows are sealed under data key {number}; older ones still are not")
        return 3 if args.wait else 0
    old = "" if done["data_keys"] == [number] else " (older keys are kept for quarantined copies)"
    say(f"{done['id']}: everything is sealed under data key {number}{old}")
    return 0


def _rotate_stopped(args: argparse.Namespace) -> int:
    data_dir, _ = node_files(args)
    identity = stored_identity(data_dir)
    if identity is None:
        raise ConfigError(f"{data_dir} is not a node's data directory (no identity.json)")
    lock = DataDir.open(data_dir, identity)  # refused while a node runs on it
    master_path = Path(args.master_key_file or data_dir / "master.key")
    try:
        keyring = open_keyring(data_dir / "keyring.json", master_path, finish=True)
        if args.master:
            replace_master(keyring, master_path)
        job = Reseal(keyring.rotate())
        database = Database(data_dir / "store.db", keyring, writable=True)
        try:
            done = False
            while not done:
                database.begin()
                done = job.slice(database)
                database.commit()
        finally:
            database.close()
        if not any(data_dir.glob("quarantine-*.db")):
            keyring.retire(job.target)
    except (OSError, sqlite3.Error, Damaged) as e:
        warn(f"main.py: failed: {e}")
        return 1
    finally:
        lock.close()
    say(f"everything is sealed under data key {job.target}")
    return 0


# --- backups


def _backup(args: argparse.Namespace) -> int:
    try:
        if args.verify is not None:
            return _verify_backup(args)
        data_dir, _ = node_files(args)
        made = steady(data_dir, lambda: _make_backup(args), lambda x: isinstance(x, BackupError))
        if isinstance(made, BackupError):
            raise made
    except (BackupError, OSError) as e:
        warn(f"main.py: failed: {e}")
        return 1
    say(f"wrote {args.out}: {made.keys} keys, cluster {made.cluster_id}, epoch {made.epoch}, "
        f"record {made.seq}, audit line {made.audit_seq}")  # fmt: skip
    return 0


def _make_backup(args: argparse.Namespace) -> Manifest | BackupError:
    data_dir, keyring = node_files(args)
    identity = stored_identity(data_dir)
    try:
        return create(
            data_dir, keyring, Path(args.out), node=identity.node_id if identity else "",
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
    except BackupError as e:
        return e


def _verify_backup(args: argparse.Namespace) -> int:
    import tempfile

    if args.master_key_file is None:
        raise ConfigError("--master_key_file is needed: the one of the backup's time")
    master = read_master_key(Path(args.master_key_file))
    with tempfile.TemporaryDirectory(prefix="secure-store-") as folder:
        found, _ = verify(Path(args.verify), master, Path(folder))
    say(f"ok: {found.keys} keys of {found.node}, made {found.made_at}, cluster {found.cluster_id}, "
        f"epoch {found.epoch}, record {found.seq}")  # fmt: skip
    return 0


def _restore(args: argparse.Namespace) -> int:
    if args.id is None:
        raise ConfigError("--id is needed: the name of the node to make")
    node, data_dir = valid_name(args.id, "--id"), data_dir_of(args)
    if args.master_key_file is None:
        raise ConfigError("--master_key_file is needed: the one of the backup's time")
    master = read_master_key(Path(args.master_key_file))
    try:
        made = restore(
            Path(args.source), master, data_dir, node=node, fresh_cluster_id=secrets.token_hex(16),
            keep_tokens=not args.without_tokens, now_ms=time.time_ns() // 1_000_000,
        )  # fmt: skip
    except (BackupError, OSError) as e:
        warn(f"main.py: failed: {e}")
        return 1
    say(f"restored {data_dir}: {made.keys} keys as of {made.made_at}, a cluster of its own")
    say(f"start it with --id {node} --data_dir {data_dir} --master_key_file {args.master_key_file}")
    if not args.without_tokens:
        say("tokens revoked after the backup was made are valid again: main.py token list")
    return 0
