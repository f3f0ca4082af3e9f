"""The operator's commands: `main.py cert|key|audit …`. Exit code 2 for a mistake in using them."""

from __future__ import annotations

import argparse
import os
import sqlite3
import ssl
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import msgspec

from secure_store import logs
from secure_store.config import ConfigError, https_url, valid_name
from secure_store.core.audit import Code, Head, verify
from secure_store.storage.anchors import AnchorError, Pin, check_heads, read_anchors
from secure_store.storage.audit_files import raw_lines, segments
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring, make_master_key, read_master_key
from secure_store.transport.tls import certificate_problems, make_certificate

TOKEN_VARIABLE = "SECURE_STORE_TOKEN"  # noqa: S105 - the variable's name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> object:  # type: ignore[override]  # it raises, as NoReturn asks
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="main.py", allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True, parser_class=_Parser)
    cert = commands.add_parser("cert", help="make a self-signed P-256 certificate and its key")
    cert.add_argument("--cert", default="server.crt")
    cert.add_argument("--key", default="server.key")
    cert.add_argument("--host", action="append", default=[], help="a name or address; many times")
    cert.add_argument("--days", type=int, default=825)
    key = commands.add_parser("key", help="make a master key")
    key.add_argument("file", help="the file to make (mode 0600)")
    doctor = commands.add_parser("doctor", help="open everything a node has stored, and say what "
                                 "is wrong; exit code 1 if anything is")  # fmt: skip
    doctor.add_argument("--id", help="the node")
    doctor.add_argument("--data_dir", help="its data directory (default data/<id>)")
    doctor.add_argument("--master_key_file", help="default <data_dir>/master.key")
    doctor.add_argument("--cert", default="server.crt")
    audit = commands.add_parser("audit", help="check an audit log")
    actions = audit.add_subparsers(dest="action", required=True, parser_class=_Parser)
    check = actions.add_parser("verify", help="recompute the chain and hold it against anchors; "
                               "exit codes: 0 ok, 10 edit, 11 delete, 12 reorder, 13 cut, "
                               "14 rewrite, 15 fork, 16 torn last line")  # fmt: skip
    check.add_argument("--id", help="the node whose log it is")
    check.add_argument("--data_dir", help="its data directory (default data/<id>)")
    check.add_argument("--audit_file", help="the log (default <data_dir>/audit/audit.log)")
    check.add_argument("--master_key_file", help="default <data_dir>/master.key")
    check.add_argument("--anchors", action="append", default=[],
                       help="a file of heads kept by the other node; many times")  # fmt: skip
    check.add_argument("--peer", help="https://host:port of the other node, asked for its anchors "
                       f"with the token in {TOKEN_VARIABLE}")  # fmt: skip
    check.add_argument("--peer_cert", default="server.crt", help="certificate of --peer")
    return p


def main(argv: Sequence[str]) -> int:
    """`main.py`: a command if the first word is one, else a node. Returns the exit code."""
    if not argv or argv[0].startswith("-"):
        from secure_store import server  # a command need not wait for the web stack's import

        return server.main(argv)
    try:
        return run(argv)
    except ConfigError as e:
        print(f"main.py: error: {logs.one_line(str(e))}", file=sys.stderr)  # noqa: T201
        return 2


def run(argv: Sequence[str]) -> int:
    """Carry out one command; raises ConfigError for a mistake in it."""
    args = parser().parse_args(argv)
    match args.command:
        case "cert":
            return _cert(args)
        case "key":
            return _key(Path(args.file))
        case "doctor":
            return _doctor(args)
        case _:
            return _verify(args)


def _say(text: str) -> None:
    print(text)  # noqa: T201 - a command's output


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
    _say(f"made {cert} and {key}")
    return 0


def _key(path: Path) -> int:
    if path.exists():
        raise ConfigError(f"{path} exists already; it is not overwritten")
    try:
        make_master_key(path)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    _say(f"made {path}; keep a copy elsewhere: without it the data cannot be read")
    return 0


def _node(args: argparse.Namespace) -> tuple[Path, Keyring]:
    """The data directory that is meant, and its keys."""
    if args.data_dir is None and args.id is None:
        raise ConfigError("--id or --data_dir is needed")
    if args.data_dir is not None:
        data_dir = Path(args.data_dir)
    else:
        data_dir = Path("data") / valid_name(args.id, "--id")
    keyring_path = data_dir / "keyring.json"
    if not keyring_path.exists():
        raise ConfigError(f"{data_dir} is not a node's data directory (no keyring.json)")
    master = read_master_key(Path(args.master_key_file or data_dir / "master.key"))
    return data_dir, Keyring.open_or_make(keyring_path, master)


def _doctor(args: argparse.Namespace) -> int:
    """Reads only; a running node is not disturbed."""
    data_dir, keyring = _node(args)
    path = data_dir / "store.db"
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    database = Database(path, keyring)
    problems: list[str] = []
    try:
        database.begin_read()
        problems += database.inspect()
    except sqlite3.Error as e:
        problems.append(f"{path}: {e}")
    finally:
        database.close()
    verdict = verify(raw_lines(data_dir / "audit" / "audit.log"), keyring.audit_mac_key)
    if verdict.code is not Code.OK:
        problems.append(f"audit log: {verdict.code.name.lower()} at {verdict.seq}")
    problems += certificate_problems(Path(args.cert))
    for problem in problems:
        _say(problem)
    _say("ok" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _verify(args: argparse.Namespace) -> int:
    data_dir, keyring = _node(args)
    log_path = Path(args.audit_file or data_dir / "audit" / "audit.log")
    heads = _heads(args, keyring)
    if not segments(log_path) and not heads:
        raise ConfigError(f"{log_path} does not exist")
    verdict = verify(raw_lines(log_path), keyring.audit_mac_key, heads)
    if verdict.code is Code.OK:
        anchored = f"{verdict.unanchored} after the last anchor" if heads else "no anchors given"
        _say(f"ok: {verdict.entries} entries, {anchored}")
    else:
        _say(f"{verdict.code.name.lower()}: entry {verdict.seq}: {verdict.reason}")
    return int(verdict.code)


def _heads(args: argparse.Namespace, keyring: Keyring) -> list[Head]:
    """Every head that is offered, each signed by this log's own node."""
    public = keyring.signer.public_key().public_bytes_raw().hex()
    heads: list[Head] = []
    try:
        for path in args.anchors:
            pin, found = read_anchors(Path(path))
            heads += _own(found, pin, public, path)
        if args.peer is not None:
            lines = _ask(https_url(args.peer, "--peer"), args.peer_cert).split(b"\n")
            pin = msgspec.json.decode(lines[0], type=Pin)
            heads += _own(check_heads(pin, lines[1:-1]), pin, public, args.peer)
    except (OSError, ValueError) as e:
        raise ConfigError(f"anchors: {e}") from None
    except AnchorError as e:
        raise ConfigError(f"anchors cannot be trusted: {e}") from None
    return heads


def _own(heads: list[Head], pin: Pin, public: str, source: str) -> list[Head]:
    if pin.public_key != public:
        raise AnchorError(f"{source} holds heads of {pin.node}, whose key is not this log's")
    return heads


def _ask(url: str, certificate: str) -> bytes:
    """GET /audit/anchors of the other node, which must present exactly this certificate."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError(f"--peer: the token is taken from {TOKEN_VARIABLE}, which is not set")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate itself is the only trust anchor
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    request = urllib.request.Request(  # noqa: S310 - https_url has checked the scheme
        url + "/audit/anchors", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=10, context=context) as response:  # noqa: S310
        body: bytes = response.read()
    return body
