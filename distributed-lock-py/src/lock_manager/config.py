"""Flags -> one frozen, validated `Config`. Nothing else reads argv or the environment.

A start-up mistake is a `ConfigError`: `server.main` prints it as one line on stderr and exits with
2, before anything was written.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

MAX_NAME_BYTES = 256
DEFAULT_BODY_BYTES = 1 << 20
HEARTBEAT_MS = 50
ELECTION_TIMEOUT_MS = 300
SNAPSHOT_ENTRIES = 20_000


class ConfigError(Exception):
    """A flag, file, port or directory that the node cannot start with (exit code 2)."""


@dataclass(frozen=True, slots=True)
class Address:
    """A `host:port` to bind or dial; `str()` gives it back, IPv6 in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def parse(cls, text: str, flag: str) -> Address:
        """Read `host:port` or `[v6]:port` (port 1-65535); raises ConfigError naming `flag`."""
        host, colon, port = text.strip().rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"{flag}: expected host:port, got {text!r}")
        if "/" in host or any(c.isspace() for c in host):
            raise ConfigError(f"{flag}: expected host:port without a scheme, got {text!r}")
        return cls(host, int(port))


@dataclass(frozen=True, slots=True)
class TlsFiles:
    cert: Path
    key: Path
    ca: Path | None


@dataclass(frozen=True, slots=True)
class Config:
    node_id: str
    position: int  # from 1: this node's place in `peers`, its name in Raft
    raft_addr: Address
    http_addr: Address
    peers: tuple[Address, ...]  # where to dial each member's Raft side, this node included
    peer_http_addrs: tuple[Address, ...]  # where clients find each member, in the same order
    join: bool
    data_dir: Path
    heartbeat_ms: int
    election_timeout_ms: int
    lock_delay_ms: int
    snapshot_entries: int
    tls: TlsFiles | None
    max_body_bytes: int
    log_format: str
    log_level: str
    cluster_secret: bytes | None = field(default=None, repr=False)  # never logged

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors (its own print the whole usage) and no abbreviations."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="main.py", description="One node of a fault-tolerant lock service.", allow_abbrev=False
    )
    p.add_argument("--id", required=True, help="name of this node, unique in the cluster")
    p.add_argument("--raft_addr", required=True, help="host:port for the other nodes")
    p.add_argument("--http_addr", required=True, help="host:port for clients")
    p.add_argument("--peers", required=True, help="raft_addr of every node, this one included, "
                   "comma-separated and in the same order on every node")  # fmt: skip
    p.add_argument("--peer_http_addrs", required=True,
                   help="http_addr of every node, in the order of --peers")  # fmt: skip
    p.add_argument("--join", action="store_true", help="start without a vote and wait until a "
                   "running cluster adds this node (POST /admin/members)")  # fmt: skip
    p.add_argument("--data_dir", help="where this node keeps its data (default data/<id>)")
    p.add_argument("--heartbeat_ms", type=_positive, default=HEARTBEAT_MS,
                   help=f"a leader's sign of life (default {HEARTBEAT_MS})")  # fmt: skip
    p.add_argument("--election_timeout_ms", type=_positive, default=ELECTION_TIMEOUT_MS,
                   help="silence after which a follower asks for votes, drawn from [this, 2 x this)"
                   f" (default {ELECTION_TIMEOUT_MS})")  # fmt: skip
    p.add_argument("--lock_delay_ms", type=_not_negative, default=0,
                   help="how long a lock stays free after a lease expired (default 0)")  # fmt: skip
    p.add_argument("--snapshot_entries", type=_positive, default=SNAPSHOT_ENTRIES,
                   help="log entries after which a snapshot takes their place "
                   f"(default {SNAPSHOT_ENTRIES})")  # fmt: skip
    add_common_flags(p)
    return p


def add_common_flags(p: argparse.ArgumentParser) -> None:
    """The flags that all four services share, word for word."""
    p.add_argument("--cluster_secret_file", help="file with the secret that peers present to each "
                   "other (or environment CLUSTER_SECRET)")  # fmt: skip
    p.add_argument("--tls_cert", help="PEM certificate: serve and dial by TLS")
    p.add_argument("--tls_key", help="PEM private key of --tls_cert")
    p.add_argument(
        "--tls_ca", help="PEM file of the authorities (or certificates) to trust in peers"
    )
    p.add_argument("--insecure", action="store_true",
                   help="bind beyond loopback without a cluster secret")  # fmt: skip
    p.add_argument("--max_body_bytes", type=_positive, default=DEFAULT_BODY_BYTES,
                   help="largest request body (default 1 MiB)")  # fmt: skip
    p.add_argument("--log_format", choices=("text", "json"), default="text", help="lines on stderr")
    p.add_argument("--log_level", choices=("debug", "info", "warning", "error"), default="info",
                   help="least severe line to print")  # fmt: skip


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Config:
    """Read and validate `argv`; raises ConfigError (bad flag, file, or combination of them)."""
    args = parser().parse_args(argv)
    node_id = valid_name(args.id, "--id")
    raft_addr = Address.parse(args.raft_addr, "--raft_addr")
    http_addr = Address.parse(args.http_addr, "--http_addr")
    peers, peer_http_addrs = _members(args, raft_addr, http_addr)
    secret = _cluster_secret(args.cluster_secret_file, environ)
    for flag, addr in (("--raft_addr", raft_addr), ("--http_addr", http_addr)):
        if not addr.is_loopback and secret is None and not args.insecure:
            raise ConfigError(
                f"{flag}: {addr} is beyond loopback: set CLUSTER_SECRET or --cluster_secret_file "
                "(or --insecure)"
            )
    if args.heartbeat_ms * 2 > args.election_timeout_ms:
        raise ConfigError(
            f"--election_timeout_ms: {args.election_timeout_ms} must be at least twice "
            f"--heartbeat_ms ({args.heartbeat_ms})"
        )
    return Config(
        node_id=node_id,
        position=peers.index(raft_addr) + 1,
        raft_addr=raft_addr,
        http_addr=http_addr,
        peers=peers,
        peer_http_addrs=peer_http_addrs,
        join=args.join,
        data_dir=Path(args.data_dir or Path("data") / node_id),
        heartbeat_ms=args.heartbeat_ms,
        election_timeout_ms=args.election_timeout_ms,
        lock_delay_ms=args.lock_delay_ms,
        snapshot_entries=args.snapshot_entries,
        tls=_tls(args.tls_cert, args.tls_key, args.tls_ca),
        max_body_bytes=args.max_body_bytes,
        log_format=args.log_format,
        log_level=args.log_level,
        cluster_secret=secret,
    )


def _members(
    args: argparse.Namespace, raft_addr: Address, http_addr: Address
) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
    """The paired lists: as long as each other, nothing twice, this node at one place in both."""
    lists = []
    for flag, text in (("--peers", args.peers), ("--peer_http_addrs", args.peer_http_addrs)):
        addresses = tuple(Address.parse(part, flag) for part in text.split(","))
        if len(set(addresses)) != len(addresses):
            raise ConfigError(f"{flag}: names an address twice")
        lists.append(addresses)
    peers, peer_http_addrs = lists
    if len(peers) != len(peer_http_addrs):
        raise ConfigError(
            f"--peer_http_addrs: names {len(peer_http_addrs)} nodes, --peers {len(peers)}"
        )
    if set(peers) & set(peer_http_addrs):
        raise ConfigError("--peers and --peer_http_addrs: have an address in common")
    if raft_addr not in peers:
        raise ConfigError(f"--peers: does not name this node's own --raft_addr {raft_addr}")
    if peer_http_addrs[peers.index(raft_addr)] != http_addr:
        raise ConfigError(
            f"--peer_http_addrs: does not name this node's own --http_addr {http_addr} at the "
            "place that its --raft_addr has in --peers"
        )
    return peers, peer_http_addrs


def valid_name(text: str, flag: str) -> str:
    """A node name: 1-256 bytes of letters, digits, `.`, `_`, `-`, not starting with a dot.

    It becomes a folder name and stands in log lines, so nothing else is allowed in it.
    """
    ok = text and len(text.encode()) <= MAX_NAME_BYTES and not text.startswith(".")
    if not (ok and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)):
        raise ConfigError(f"{flag}: expected 1-256 letters, digits, '.', '_' or '-', got {text!r}")
    return text


def _positive(text: str) -> int:
    if _not_negative(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _not_negative(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 40):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _read(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"{flag}: cannot read {path}: {e.strerror}") from e


def _cluster_secret(path: str | None, environ: Mapping[str, str]) -> bytes | None:
    if path is None:
        secret = environ.get("CLUSTER_SECRET", "").encode()
        return secret or None
    secret = _read(path, "--cluster_secret_file").strip()
    if not secret:
        raise ConfigError(f"--cluster_secret_file: {path} is empty")
    return secret


def _tls(cert: str | None, key: str | None, ca: str | None) -> TlsFiles | None:
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("--tls_cert and --tls_key go together")
    for flag, path in (("--tls_cert", cert), ("--tls_key", key), ("--tls_ca", ca)):
        if path is not None:
            _read(path, flag)
    return TlsFiles(Path(cert), Path(key), Path(ca) if ca else None)
