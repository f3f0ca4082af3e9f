"""Flags -> one frozen, validated `Config`. Nothing else reads argv or the environment.

A start-up mistake is a `ConfigError`: `server.main` prints it as one line on stderr and exits with
2, before anything was written.
"""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from secure_store.core.messages import Mode

MAX_NAME_BYTES = 64
DEFAULT_BODY_BYTES = 2 << 20
DEFAULT_CERT = "server.crt"
DEFAULT_KEY = "server.key"


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
class Config:
    node_id: str
    addr: Address
    url: str  # where the other node reaches this one
    replica: str | None  # https://host:port
    primary: str | None  # the replica's view; says that this node is one
    mode: Mode | None
    cert: Path
    key: Path
    make_cert: bool  # may be made at start if both files are absent
    peer_certs: tuple[Path, ...]
    tls_min: str
    tokens_file: Path | None
    policies_file: Path | None
    master_key_file: Path | None
    data_dir: Path
    audit_files: tuple[Path, ...]
    audit_keys: str
    max_body_bytes: int
    log_format: str
    log_level: str

    @property
    def master_key_path(self) -> Path:
        return self.master_key_file or self.data_dir / "master.key"

    @property
    def demo_tokens(self) -> bool:
        """The seed's two tokens: on loopback only, and only while no token file was configured."""
        return self.addr.is_loopback and self.tokens_file is None


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors (its own print the whole usage) and no abbreviations."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="main.py",
        description="One node of the secure key-value store. Operator's commands: "
        "main.py cert|key|token|policy|audit|backup|restore|promote|doctor --help",
        allow_abbrev=False,
    )
    p.add_argument("--id", required=True, help="name of this node, unique in the pair")
    p.add_argument("--addr", required=True, help="host:port for clients and for the other node")
    p.add_argument("--replica", help="https://host:port of the replica: this node is the primary")
    p.add_argument("--primary", help="https://host:port of the primary: this node is its replica, "
                   "and never founds a store of its own")  # fmt: skip
    p.add_argument("--replication", choices=("available", "strict"),
                   help="while the replica is away: go on alone and say so, or refuse writes "
                   "(default: what the pair runs already, at first available)")  # fmt: skip
    p.add_argument("--cert", help="PEM certificate (default server.crt in the working directory, "
                   "made at start on loopback if absent)")  # fmt: skip
    p.add_argument("--key", help="PEM private key of --cert (default server.key)")
    p.add_argument("--peer_cert", action="append", default=[],
                   help="certificate that the other node may present; many times, so that old and "
                   "new overlap during a rotation (default: this node's own)")  # fmt: skip
    p.add_argument("--tls_min", choices=("1.2", "1.3"), default="1.3", help="oldest TLS version")
    p.add_argument("--tokens_file", help="JSON list of static tokens; turns the demo tokens off")
    p.add_argument("--policies_file",
    help="JSON object: role -> rules, used until a policy of that "
                   "role is put")  # fmt: skip
    p.add_argument("--master_key_file", help="base64 of 32 bytes, mode 0600 (default "
                   "<data_dir>/master.key, made at first start on loopback)")  # fmt: skip
    p.add_argument("--data_dir", help="where this node keeps its data (default data/<id>)")
    p.add_argument(
        "--audit_file",
        action="append",
        default=[],
        help="audit log; many times for copies (default <data_dir>/audit/audit.log)",
    )
    p.add_argument("--audit_keys", choices=("plain", "hmac"), default="plain",
                   help="how key names stand in the audit log")  # fmt: skip
    p.add_argument("--advertise_url", help="https://host:port at which the other node reaches this "
                   "one (default https://<addr>)")  # fmt: skip
    p.add_argument("--max_body_bytes", type=_positive, default=DEFAULT_BODY_BYTES,
                   help="largest request body (default 2 MiB)")  # fmt: skip
    p.add_argument("--log_format", choices=("text", "json"), default="text", help="lines on stderr")
    p.add_argument("--log_level", choices=("debug", "info", "warning", "error"), default="info",
                   help="least severe line to print")  # fmt: skip
    return p


def parse(argv: Sequence[str]) -> Config:
    """Read and validate `argv`; raises ConfigError (bad flag, file, or combination of them)."""
    args = parser().parse_args(argv)
    node_id = valid_name(args.id, "--id")
    addr = Address.parse(args.addr, "--addr")
    replica = https_url(args.replica, "--replica") if args.replica is not None else None
    primary = https_url(args.primary, "--primary") if args.primary is not None else None
    if replica is not None and primary is not None:
        raise ConfigError("--replica and --primary: a node is one or the other")
    own_url = f"https://{addr}"
    url = https_url(args.advertise_url, "--advertise_url") if args.advertise_url else own_url
    if replica in (own_url, url):
        raise ConfigError(f"--replica: {replica} is this node itself")
    data_dir = Path(args.data_dir or Path("data") / node_id)
    config = Config(
        node_id=node_id,
        addr=addr,
        url=url,
        replica=replica,
        primary=primary,
        mode=Mode(args.replication) if args.replication else None,
        cert=Path(args.cert or DEFAULT_CERT),
        key=Path(args.key or DEFAULT_KEY),
        make_cert=args.cert is None and args.key is None and addr.is_loopback,
        peer_certs=tuple(Path(p) for p in args.peer_cert),
        tls_min=args.tls_min,
        tokens_file=_readable(args.tokens_file, "--tokens_file"),
        policies_file=_readable(args.policies_file, "--policies_file"),
        master_key_file=_readable(args.master_key_file, "--master_key_file"),
        data_dir=data_dir,
        audit_files=tuple(Path(p) for p in args.audit_file) or (data_dir / "audit" / "audit.log",),
        audit_keys=args.audit_keys,
        max_body_bytes=args.max_body_bytes,
        log_format=args.log_format,
        log_level=args.log_level,
    )
    _check_exposed(config)
    return config


def _check_exposed(config: Config) -> None:
    """Beyond loopback nothing is made up: no demo token, no made certificate, no made master
    key."""
    if len(set(config.audit_files)) != len(config.audit_files):
        raise ConfigError("--audit_file: names a file twice")
    if config.addr.is_loopback:
        return
    if config.tokens_file is None:
        raise ConfigError(
            f"--addr: {config.addr} is beyond loopback: --tokens_file is needed (the demo tokens "
            "work on loopback only)"
        )
    if not config.master_key_path.exists():
        raise ConfigError(
            f"--addr: {config.addr} is beyond loopback: --master_key_file is needed "
            "(main.py key makes one)"
        )
    if not (config.cert.exists() and config.key.exists()):
        raise ConfigError(
            f"--addr: {config.addr} is beyond loopback: {config.cert} and {config.key} are needed "
            "(main.py cert makes them)"
        )


def https_url(text: str, flag: str) -> str:
    """`https://host:port`, nothing more; raises ConfigError naming `flag`."""
    parts = urlsplit(text.strip())
    if parts.scheme != "https" or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"{flag}: expected https://host:port, got {text!r}")
    return f"https://{Address.parse(parts.netloc, flag)}"


def valid_name(text: str, flag: str) -> str:
    """A node name: 1-64 bytes of letters, digits, `.`, `_`, `-`, not starting with a dot.

    It becomes a folder name and stands in log lines, so nothing else is allowed in it.
    """
    ok = text and len(text.encode()) <= MAX_NAME_BYTES and not text.startswith(".")
    if not (ok and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)):
        raise ConfigError(f"{flag}: expected 1-64 letters, digits, '.', '_' or '-', got {text!r}")
    return text


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 62):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _readable(path: str | None, flag: str) -> Path | None:
    if path is None:
        return None
    try:
        with Path(path).open("rb"):
            return Path(path)
    except OSError as e:
        raise ConfigError(f"{flag}: cannot read {path}: {e.strerror}") from e
