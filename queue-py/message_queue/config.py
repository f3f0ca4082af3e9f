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

from message_queue.core.placement.membership import MAX_MEMBERS

MAX_NAME_BYTES = 256
DEFAULT_BODY_BYTES = 1 << 20


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
    addr: Address
    peers: tuple[Address, ...]  # the founders, this node included; the position is the identity
    position: int  # -1 for a joiner: it is given one
    data_dir: Path
    replication_factor: int
    virtual_nodes: int
    fsync: str
    segment_bytes: int
    memory_bytes: int
    tls: TlsFiles | None
    max_body_bytes: int
    log_format: str
    log_level: str
    join: tuple[Address, ...] = ()  # members that may admit this node
    found_with_majority: bool = False
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
        prog="main.py", description="One node of a replicated message queue.", allow_abbrev=False
    )
    p.add_argument("--id", required=True, help="name of this node, unique in the cluster")
    p.add_argument("--addr", required=True, help="host:port for clients and peers")
    p.add_argument("--peers", help="host:port of every founding node, this one included, in the "
                   "same order on every node; a stored ring overrides it")  # fmt: skip
    p.add_argument("--join", help="host:port of any member (or several, by commas): become one too "
                   "instead of founding a cluster")  # fmt: skip
    p.add_argument("--found_with_majority", action="store_true",
                   help="found a new cluster after three seconds though some of --peers are "
                   "missing; unsafe if a disk is lost before they come")  # fmt: skip
    p.add_argument("--dataDir", help="where this node keeps its messages (default data/<id>)")
    p.add_argument("--replication_factor", type=_positive, default=3,
                   help="nodes that hold each message (default 3, or all if fewer)")  # fmt: skip
    p.add_argument("--virtual_nodes", type=_positive, default=128,
                   help="points of each node on the ring (default 128)")  # fmt: skip
    p.add_argument("--fsync", choices=("always", "interval", "never"), default="always",
                   help="when a message counts as stored: synced to disk (always), synced within "
                   "100 ms, or handed to the kernel")  # fmt: skip
    p.add_argument("--segment_bytes", type=_positive, default=64 << 20,
                   help="size of one file of the log (default 64 MiB)")  # fmt: skip
    p.add_argument("--memory_bytes", type=_positive, default=128 << 20,
                   help="bodies beyond this stay on disk only (default 128 MiB)")  # fmt: skip
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
    addr = Address.parse(args.addr, "--addr")
    if args.peers is None and args.join is None:
        raise ConfigError("one of --peers (a founder) and --join is required")
    peers = addresses(args.peers, "--peers")
    if len(peers) > MAX_MEMBERS:
        raise ConfigError(f"--peers: at most {MAX_MEMBERS} nodes")
    if len(set(peers)) != len(peers):
        raise ConfigError("--peers: names an address twice")
    if peers and addr not in peers:
        raise ConfigError(f"--peers: does not name this node's own address {addr}")
    secret = _cluster_secret(args.cluster_secret_file, environ)
    if not addr.is_loopback and secret is None and not args.insecure:
        raise ConfigError(
            f"--addr: {addr} is beyond loopback: set CLUSTER_SECRET or --cluster_secret_file "
            "(or --insecure)"
        )
    return Config(
        node_id=node_id,
        addr=addr,
        peers=peers,
        position=peers.index(addr) if peers else -1,
        join=addresses(args.join, "--join"),
        found_with_majority=args.found_with_majority,
        replication_factor=_within(args.replication_factor, 1, 1 << 20, "--replication_factor"),
        virtual_nodes=_within(args.virtual_nodes, 1, 4096, "--virtual_nodes"),
        fsync=args.fsync,
        segment_bytes=_within(args.segment_bytes, 64 << 10, 1 << 31, "--segment_bytes"),
        memory_bytes=args.memory_bytes,
        data_dir=Path(args.dataDir or Path("data") / node_id),
        tls=_tls(args.tls_cert, args.tls_key, args.tls_ca),
        max_body_bytes=args.max_body_bytes,
        log_format=args.log_format,
        log_level=args.log_level,
        cluster_secret=secret,
    )


def addresses(text: str | None, flag: str) -> tuple[Address, ...]:
    """A comma-separated list; () if the flag is absent."""
    return tuple(Address.parse(part, flag) for part in text.split(",")) if text is not None else ()


def valid_name(text: str, flag: str) -> str:
    """A node name: 1-256 bytes of letters, digits, `.`, `_`, `-`, not starting with a dot.

    It becomes a folder name and stands in log lines, so nothing else is allowed in it.
    """
    ok = text and len(text.encode()) <= MAX_NAME_BYTES and not text.startswith(".")
    if not (ok and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)):
        raise ConfigError(f"{flag}: expected 1-256 letters, digits, '.', '_' or '-', got {text!r}")
    return text


def _within(value: int, least: int, most: int, flag: str) -> int:
    if not least <= value <= most:
        raise ConfigError(f"{flag}: expected {least} to {most}, got {value}")
    return value


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 62):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
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
