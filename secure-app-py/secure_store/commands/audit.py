"""`main.py audit verify`: recompute the chain, and hold it against the other node's anchors."""

from __future__ import annotations

import argparse
import os
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from secure_store.commands.terminal import TOKEN_VARIABLE, add_node, node_files, say
from secure_store.config import ConfigError, https_url
from secure_store.core.audit import Code, Head, verify
from secure_store.storage.anchors import AnchorError, Pin, check_heads, read_anchors
from secure_store.storage.audit_files import raw_lines, segments
from secure_store.storage.keyring import Keyring


def add(commands: Any) -> None:
    """Add `audit` to main.py's commands."""
    audit = commands.add_parser(
        "audit", help="check an audit log",
        examples=["main.py audit verify --id nodeA --anchors data/nodeB/audit/anchors-nodeA.jsonl"],
    )  # fmt: skip
    actions = audit.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "verify",
        help="recompute the chain and hold it against anchors",
        description="Recompute the chain and hold it against the heads that the other node keeps. "
        "Exit codes: 0 ok, 10 edit,\n11 delete, 12 reorder, 13 cut, 14 rewrite, 15 fork, 16 torn "
        "last line.",
        examples=[
            "main.py audit verify --id nodeA",
            "main.py audit verify --id nodeA --anchors anchors-nodeA.jsonl",
            f"{TOKEN_VARIABLE}=… main.py audit verify --id nodeA --peer https://127.0.0.1:8001",
        ],
    )
    add_node(check)
    check.add_argument("--audit_file", help="the log (default <data_dir>/audit/audit.log)")
    check.add_argument("--anchors", action="append", default=[],
                       help="a file of heads kept by the other node; many times")  # fmt: skip
    check.add_argument("--peer", help="https://host:port of the other node, asked for its anchors "
                       f"with the token in {TOKEN_VARIABLE}")  # fmt: skip
    check.add_argument("--peer_cert", default="server.crt", help="certificate of --peer")
    check.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    data_dir, keyring = node_files(args)
    log_path = Path(args.audit_file or data_dir / "audit" / "audit.log")
    heads = _heads(args, keyring)
    if not segments(log_path) and not heads:
        raise ConfigError(f"{log_path} does not exist")
    verdict = verify(raw_lines(log_path), keyring.audit_mac_key, heads)
    if verdict.code is Code.OK:
        anchored = f"{verdict.unanchored} after the last anchor" if heads else "no anchors given"
        say(f"ok: {verdict.entries} entries, {anchored}")
    else:
        say(f"{verdict.code.name.lower()}: entry {verdict.seq}: {verdict.reason}")
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
    with urllib.request.urlopen(request, timeout=10, context=context) as response:  # noqa: S310 - https only, as above
        body: bytes = response.read()
    return body
