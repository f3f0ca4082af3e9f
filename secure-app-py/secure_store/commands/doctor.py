"""`main.py doctor`: open everything that a node has stored; with `--production`, go through the
README's checklist. It reads only; a running node is not disturbed."""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secure_store.client import SecureClient, SecureError
from secure_store.commands.remote import ask
from secure_store.commands.terminal import (
    TOKEN_VARIABLE,
    add_node,
    data_dir_of,
    node_files,
    say,
    steady,
)
from secure_store.config import DEFAULT_CERT, DEFAULT_KEY, ConfigError
from secure_store.core.audit import Code, verify
from secure_store.core.changes import PutToken
from secure_store.core.effects import Durable
from secure_store.core.messages import Role
from secure_store.storage.audit_files import raw_lines, segments
from secure_store.storage.backup import BackupError, read_manifest
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring, beside, read_master_key
from secure_store.storage.rollback import told_beyond
from secure_store.storage.static_access import read_tokens_file
from secure_store.transport.tls import certificate_problems, key_problems

BACKUP_AGE_S = 8 * 86_400
FREE_BYTES = 1 << 30
FREE_SHARE = 0.05


@dataclass
class Patient:
    """What is looked at, and what has been read of it."""

    args: argparse.Namespace
    data_dir: Path
    keyring: Keyring
    state: Durable = field(default_factory=Durable)
    tokens: list[PutToken] = field(default_factory=list)

    @property
    def master_path(self) -> Path:
        return Path(self.args.master_key_file or self.data_dir / "master.key")

    @property
    def audit_files(self) -> list[Path]:
        given = [Path(path) for path in self.args.audit_file]
        return given or [self.data_dir / "audit" / "audit.log"]


def add(commands: Any) -> None:
    """Add `doctor` to main.py's commands."""
    p = commands.add_parser(
        "doctor", help="open everything a node has stored; --production: the README's checklist",
        description="Open everything that a node has stored and say what is wrong. With "
        "--production: go\nthrough the README's checklist instead, one line an item; give it the "
        "node's own flags. Exit\ncode 1 if anything is wrong. Items: " + ", ".join(CHECKS),
        examples=["main.py doctor --id nodeA",
                  "main.py doctor --production --id nodeA --master_key_file /secure/a.key \\",
                  "    --tokens_file tokens.json --audit_file /a/audit.log "
                  "--audit_file /b/audit.log --backups /backups",
                  "main.py doctor --only certificate --id nodeA --cert a.crt --key a.key"],
    )  # fmt: skip
    add_node(p)
    p.add_argument("--production", action="store_true", help="the checklist")
    p.add_argument("--only", action="append", choices=tuple(CHECKS), default=[],
                   help="these items of the checklist; many times")  # fmt: skip
    p.add_argument("--cert", default=DEFAULT_CERT, help="the node's certificate")
    p.add_argument("--key", default=DEFAULT_KEY, help="its key")
    p.add_argument("--peer_cert", action="append", default=[], help="pinned; many times")
    p.add_argument("--tokens_file", help="the node's static tokens")
    p.add_argument("--audit_file", action="append", default=[], help="the node's; many times")
    p.add_argument("--backups", help="the folder where its backups are kept")
    p.add_argument("--url", help="https://host:port of the running node, asked with the token in "
                   f"{TOKEN_VARIABLE}")  # fmt: skip
    p.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    data_dir, keyring = node_files(args)
    if not (data_dir / "store.db").exists():
        raise ConfigError(f"{data_dir_of(args) / 'store.db'} does not exist")
    patient = Patient(args, data_dir, keyring)
    if args.production or args.only:
        return _checklist(patient)
    problems = _data(patient) + _audit_chain(patient) + certificate_problems(Path(args.cert))
    for problem in problems:
        say(problem)
    say("ok" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _checklist(patient: Patient) -> int:
    names = patient.args.only or list(CHECKS)
    opened = _data(patient)  # the other items look at what is stored
    failed = 0
    for name in names:
        problems = opened + _leftovers(patient) if name == "data" else CHECKS[name](patient)
        failed += bool(problems)
        say(f"{'FAIL' if problems else 'ok  '}  {name}")
        for problem in problems:
            say(f"      {problem}")
    say("ok" if not failed else f"{failed} of {len(names)} items fail")
    return 1 if failed else 0


# --- the items


def _data(patient: Patient) -> list[str]:
    """Everything opens, nothing is missing."""
    return steady(patient.data_dir, lambda: _open_all(patient), bool)


def _open_all(patient: Patient) -> list[str]:
    _, patient.keyring = node_files(patient.args)
    path = patient.data_dir / "store.db"
    database = Database(path, patient.keyring)
    problems: list[str] = []
    try:
        if older := told_beyond(database, patient.audit_files, patient.keyring.audit_mac_key):
            problems.append(older)
        database.begin_read()
        problems += database.inspect()
        if not problems:
            patient.state = database.load_state()
            patient.tokens = list(database.load_tokens().by_accessor.values())
    except sqlite3.Error as e:
        problems.append(f"{path}: {e}")
    finally:
        database.close()
    return problems


def _leftovers(patient: Patient) -> list[str]:
    problems = [
        f"{copy}: what an old primary had alone; look at it, then move it away"
        for copy in sorted(patient.data_dir.glob("quarantine-*.db"))
    ]
    if len(numbers := patient.keyring.numbers) > 1:
        problems.append(f"data keys {numbers} are in use: a rotation has not ended")
    return problems


def _master_key(patient: Patient) -> list[str]:
    path = patient.master_path
    problems: list[str] = []
    if patient.args.master_key_file is None or path.parent.resolve() == patient.data_dir.resolve():
        problems.append(f"{path} lies beside the data that it opens: use --master_key_file")
    try:
        read_master_key(path)
    except ConfigError as e:
        problems.append(str(e))
    for suffix in (".next", ".old"):
        if beside(path, suffix).exists():
            problems.append(f"{beside(path, suffix)} is left over from a change of master keys")
    return problems


def _certificate(patient: Patient) -> list[str]:
    args = patient.args
    problems = certificate_problems(Path(args.cert)) + key_problems(Path(args.cert), Path(args.key))
    for path in args.peer_cert:
        problems += certificate_problems(Path(path))
    if not args.peer_cert:
        problems.append("no --peer_cert: both nodes share one key")
    return problems


def _tokens(patient: Patient) -> list[str]:
    if patient.args.tokens_file is None:
        problems = ["no --tokens_file: the demo tokens are on (main.py token bootstrap)"]
    else:
        entries = read_tokens_file(Path(patient.args.tokens_file))
        problems = [f"static token {e.name!r} stands there in the clear: use sha256"
                    for e in entries if e.token]  # fmt: skip
        if not entries:
            problems.append(f"{patient.args.tokens_file} holds no token")
    for token in patient.tokens:
        if not token.expires_ms:
            problems.append(f"token {token.accessor} ({token.name or 'no name'}) never expires")
        if token.parent.startswith("demo:"):
            problems.append(f"token {token.accessor} was made with a demo token: revoke it")
    return problems


def _replication(patient: Patient) -> list[str]:
    state = patient.state
    if state.role is Role.UNJOINED or not state.peer_url:
        return ["this node has no other one: an acknowledged write is on one disk"]
    if state.role is Role.PRIMARY and not state.in_step:
        return [f"the replica {state.peer_id} is not in step: writes are on one disk"]
    if state.role is Role.REPLICA and not state.told_in_step and state.sealed is None:
        return ["this replica has not been told that it is in step"]
    return []


def _audit(patient: Patient) -> list[str]:
    files = patient.audit_files
    problems = _audit_chain(patient)
    if len(files) < 2:
        problems.append("one --audit_file only: give a second one, on another disk")
    elif len({path.parent.stat().st_dev for path in files if path.parent.exists()}) < 2:
        problems.append("all audit files lie on one disk")
    kept = list((patient.data_dir / "audit").glob("anchors-*.jsonl"))
    if not kept:
        problems.append("no head of the other node's log is kept here")
    return problems


def _audit_chain(patient: Patient) -> list[str]:
    problems = []
    for path in patient.audit_files:
        verdict = verify(raw_lines(path), patient.keyring.audit_mac_key)
        if verdict.code is Code.TORN:  # a running node may have been writing it just now
            time.sleep(0.2)
            verdict = verify(raw_lines(path), patient.keyring.audit_mac_key)
        if not segments(path):
            problems.append(f"audit log {path}: does not exist")
        elif verdict.code is not Code.OK:
            problems.append(f"audit log {path}: {verdict.code.name.lower()} at {verdict.seq}")
    return problems


def _backups(patient: Patient) -> list[str]:
    if patient.args.backups is None:
        return ["no --backups: where are they kept?"]
    folder = Path(patient.args.backups)
    newest: tuple[float, Path] | None = None
    try:
        for path in folder.iterdir():
            try:
                made = read_manifest(path)
            except (BackupError, OSError):
                continue
            if made.cluster_id == patient.state.cluster_id:
                at_s = path.stat().st_mtime
                newest = max(newest, (at_s, path)) if newest else (at_s, path)
    except OSError as e:
        return [f"--backups: {folder}: {e.strerror}"]
    if newest is None:
        return [f"{folder} holds no backup of this cluster (main.py backup)"]
    if (days := (time.time() - newest[0]) / 86_400) * 86_400 > BACKUP_AGE_S:
        return [f"the newest backup, {newest[1]}, is {days:.0f} days old"]
    return []


def _disk(patient: Patient) -> list[str]:
    problems = []
    for folder in dict.fromkeys((patient.data_dir, *(p.parent for p in patient.audit_files))):
        if not folder.exists():
            continue
        usage = shutil.disk_usage(folder)
        if usage.free < FREE_BYTES or usage.free < usage.total * FREE_SHARE:
            problems.append(f"{folder}: {usage.free >> 20} MiB free of {usage.total >> 20}")
        inside = patient.data_dir in folder.parents  # which nobody else can enter
        if sys.platform != "win32" and not inside and folder.stat().st_mode & 0o007:
            problems.append(f"{folder} is open to everybody: chmod o= it")
    return problems


def _service(patient: Patient) -> list[str]:
    args = patient.args
    if args.url is None or not os.environ.get(TOKEN_VARIABLE):
        return [f"not asked: give --url, and a token in {TOKEN_VARIABLE}"]

    async def look(client: SecureClient) -> list[str]:
        problems = []
        try:
            await client.ask(args.url, "GET", "/readyz")
        except SecureError as e:
            problems.append(f"{args.url} is not ready: {e}")
        status = await client.ask(args.url, "GET", "/status")
        metrics = await client.ask(args.url, "GET", "/metrics")
        if status["degraded"]:
            problems.append("it is degraded: writes are on one disk")
        if status["demo_tokens"]:
            problems.append("its demo tokens are on")
        for name in ("audit_refusals", "writes_unknown", "damaged_reads"):
            if metrics.get(name):
                problems.append(f"secure_store_{name} is {metrics[name]}")
        return problems

    asked = argparse.Namespace(
        url=[args.url], cert=[args.cert], ca=None, pin=[], token_file=None, timeout=10.0
    )
    found = ask(asked, look)
    return [f"{args.url} does not answer"] if found is None else found


CHECKS: dict[str, Callable[[Patient], list[str]]] = {
    "master-key": _master_key,
    "certificate": _certificate,
    "tokens": _tokens,
    "replication": _replication,
    "audit": _audit,
    "data": _leftovers,
    "backups": _backups,
    "disk": _disk,
    "service": _service,
}
