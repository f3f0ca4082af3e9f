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
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, get_args
from urllib.parse import parse_qsl, urlsplit

from mesi_cache.core.cache.slots import Policy

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
    url: str  # this node's name as a member
    peers: tuple[str, ...]  # the other members' URLs; members hash by URL
    dial: Mapping[str, str]  # where to reach a member, if not at its URL
    capacity: int
    store: str  # memory, or sqlite:PATH ("" is the file in data_dir)
    lease_ms: int
    flush_ms: int
    fsync: str
    write_policy: str
    policy: Policy
    data_dir: Path
    tls: TlsFiles | None
    max_body_bytes: int
    log_format: str
    log_level: str
    cluster_secret: bytes | None = field(default=None, repr=False)  # never logged

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    @property
    def members(self) -> tuple[str, ...]:
        """Every member's URL, this node's included, in an order that all members share."""
        return tuple(sorted({self.url, *self.peers}))


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors (its own print the whole usage) and no abbreviations."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="main.py", description="One node of the coherent cache.", allow_abbrev=False)
    p.add_argument("--id", required=True, help="name of this node, for its log and data directory")
    p.add_argument("--addr", required=True, help="host:port for clients and peers")
    p.add_argument("--peers", default="", help="URLs of the other members, separated by commas")
    p.add_argument("--capacity", type=_positive, default=1024, help="lines in the cache (1024)")
    p.add_argument("--data_dir", help="where this node keeps its data (default data/<id>)")
    p.add_argument(
        "--store",
        default="",
        help="main memory: memory, sqlite:PATH (default: a file in --data_dir), "
        "redis://HOST:PORT/DB, or the URL of an HTTP origin",
    )
    p.add_argument(
        "--lease_ms",
        type=_positive,
        default=2000,
        help="how long a copy lives without renewal: a writer waits for an unreachable "
        "sharer at most that long (2000)",
    )
    p.add_argument(
        "--flush_ms",
        type=_positive,
        default=200,
        help="how often the write log is synced to disk: what a power cut of the machine "
        "may cost (200)",
    )
    p.add_argument(
        "--fsync",
        choices=("interval", "always"),
        default="interval",
        help="sync the write log every --flush_ms, or before every answer",
    )
    p.add_argument(
        "--write_policy",
        choices=("back", "through", "back_unsafe"),
        default="back",
        help="store writes now and then, or before each answer, or now and then without a log "
        "(a killed home loses what it has not stored yet)",
    )
    p.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="lru",
        help="which line goes when the cache is full: least recently used, or S3-FIFO",
    )
    p.add_argument(
        "--dial",
        action="append",
        default=[],
        metavar="URL=URL",
        help="reach the member URL at another address (a proxy); may be repeated",
    )
    add_common_flags(p)
    return p


def add_common_flags(p: argparse.ArgumentParser) -> None:
    """The flags that all four services share, word for word."""
    p.add_argument(
        "--cluster_secret_file",
        help="file with the secret that peers present to each "
        "other (or environment CLUSTER_SECRET)",
    )
    p.add_argument("--tls_cert", help="PEM certificate: serve and dial by TLS")
    p.add_argument("--tls_key", help="PEM private key of --tls_cert")
    p.add_argument(
        "--tls_ca", help="PEM file of the authorities (or certificates) to trust in peers"
    )
    p.add_argument(
        "--insecure", action="store_true", help="bind beyond loopback without a cluster secret"
    )
    p.add_argument(
        "--max_body_bytes",
        type=_positive,
        default=DEFAULT_BODY_BYTES,
        help="largest request body (default 1 MiB)",
    )
    p.add_argument("--log_format", choices=("text", "json"), default="text", help="lines on stderr")
    p.add_argument(
        "--log_level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least severe line to print",
    )


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Config:
    """Read and validate `argv`; raises ConfigError (bad flag, file, or combination of them)."""
    args = parser().parse_args(argv)
    node_id = valid_name(args.id, "--id")
    addr = Address.parse(args.addr, "--addr")
    tls = _tls(args.tls_cert, args.tls_key, args.tls_ca)
    url = f"{'https' if tls else 'http'}://{addr}"
    listed = [_member_url(text, "--peers") for text in args.peers.split(",") if text.strip()]
    if len(set(listed)) != len(listed):
        raise ConfigError("--peers: names a member twice")
    peers = tuple(peer for peer in listed if peer != url)
    secret = _cluster_secret(args.cluster_secret_file, environ)
    if not addr.is_loopback and secret is None and not args.insecure:
        raise ConfigError(
            f"--addr: {addr} is beyond loopback: set CLUSTER_SECRET or --cluster_secret_file "
            "(or --insecure)"
        )
    if not 100 <= args.lease_ms <= 600_000:
        raise ConfigError("--lease_ms: expected 100 to 600000")
    if args.write_policy == "back_unsafe" and args.fsync == "always":
        raise ConfigError("--fsync: always has no log to sync under --write_policy=back_unsafe")
    _check_store(args.store)
    return Config(
        node_id=node_id,
        addr=addr,
        url=url,
        peers=peers,
        dial=_dial(args.dial, peers),
        capacity=args.capacity,
        store=args.store,
        lease_ms=args.lease_ms,
        flush_ms=args.flush_ms,
        fsync=args.fsync,
        write_policy=args.write_policy,
        policy=args.policy,
        data_dir=Path(args.data_dir or Path("data") / node_id),
        tls=tls,
        max_body_bytes=args.max_body_bytes,
        log_format=args.log_format,
        log_level=args.log_level,
        cluster_secret=secret,
    )


def _check_store(store: str) -> None:
    if store in ("", "memory"):
        return
    if store.startswith(("redis://", "rediss://", "http://", "https://")):
        _check_store_url(store)
        return
    path = store.removeprefix("sqlite:")
    if not store.startswith("sqlite:") or not path:
        raise ConfigError(
            f"--store: expected memory, sqlite:PATH, redis://… or http(s)://…, got {store!r}"
        )
    if not Path(path).parent.is_dir():
        raise ConfigError(f"--store: no such directory: {Path(path).parent}")


def _check_store_url(store: str) -> None:
    parts = urlsplit(store)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if not parts.hostname or port == 0 or parts.fragment:
        raise ConfigError(f"--store: expected {parts.scheme}://host, and perhaps a port and a path")
    if parts.scheme in ("redis", "rediss"):
        if find_spec("redis") is None:
            raise ConfigError("--store: redis needs redis-py: pip install redis")
        names = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        if names - {"prefix"}:
            raise ConfigError("--store: of the options in a redis URL, only ?prefix= is known")
        if parts.path.strip("/") and not parts.path.strip("/").isdigit():
            raise ConfigError("--store: expected redis://host:port/NUMBER")
    elif parts.query or parts.username is not None:
        raise ConfigError("--store: an origin's URL takes no query and no user")


def _member_url(text: str, flag: str) -> str:
    """`http://host:port` as every member must write it, or the same member gets two names."""
    parts = urlsplit(text.strip().rstrip("/"))
    if parts.scheme not in ("http", "https") or parts.path or parts.query or parts.fragment:
        raise ConfigError(f"{flag}: expected http://host:port, got {text!r}")
    if "@" in parts.netloc:
        raise ConfigError(f"{flag}: expected http://host:port, got a URL with a user in it")
    try:
        return f"{parts.scheme}://{Address.parse(parts.netloc, flag)}"
    except ConfigError:
        raise ConfigError(f"{flag}: expected http://host:port, got {text!r}") from None


def _dial(pairs: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    dial: dict[str, str] = {}
    for pair in pairs:
        member, _, where = pair.partition("=")
        member = _member_url(member, "--dial")
        if member not in peers:
            raise ConfigError(f"--dial: {member} is not among --peers")
        dial[member] = _member_url(where, "--dial")
    return dial


def valid_name(text: str, flag: str) -> str:
    """A node name: 1-256 bytes of letters, digits, `.`, `_`, `-`, not starting with a dot.

    It becomes a folder name and stands in log lines, so nothing else is allowed in it.
    """
    ok = text and len(text.encode()) <= MAX_NAME_BYTES and not text.startswith(".")
    if not (ok and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)):
        raise ConfigError(f"{flag}: expected 1-256 letters, digits, '.', '_' or '-', got {text!r}")
    return text


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
