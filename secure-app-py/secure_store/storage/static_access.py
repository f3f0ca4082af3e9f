"""Tokens and policies that come from files, and the seed's two demo tokens."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from secure_store.config import Config, ConfigError
from secure_store.core.policy import PolicyError, Rule, check_role_name, check_rules
from secure_store.core.tokens import Principal, plain_hash

T = TypeVar("T")

# Public by nature (they stand in the README): on loopback only, and only without a token file.
DEMO_TOKENS = {"token-user-ABC": "user", "token-admin-123": "admin"}


class StaticToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of --tokens_file: `sha256` (hex) of a random token, or the token itself."""

    name: str
    roles: tuple[str, ...]
    sha256: str = ""
    token: str = ""


def load_tokens(config: Config) -> dict[bytes, Principal]:
    """SHA-256 of each static token -> who holds it; raises ConfigError."""
    if config.tokens_file is None:
        if not config.demo_tokens:
            return {}
        return {plain_hash(t): Principal(f"demo:{r}", (r,)) for t, r in DEMO_TOKENS.items()}
    path = config.tokens_file
    entries = read_tokens_file(path)
    tokens: dict[bytes, Principal] = {}
    for entry in entries:
        what = f"--tokens_file: {path}: token {entry.name!r}"
        try:
            for role in entry.roles:
                check_role_name(role)
            hashed = bytes.fromhex(entry.sha256) if entry.sha256 else b""
        except (PolicyError, ValueError) as e:
            raise ConfigError(f"{what}: {e}") from None
        if bool(entry.token) == bool(entry.sha256) or not entry.name.isprintable():
            raise ConfigError(f"{what}: needs a printable name and either token or sha256")
        if entry.token:
            if len(entry.token) < 22:
                raise ConfigError(f"{what}: a token needs at least 22 characters (128 bits)")
            _check_private(path)
            hashed = plain_hash(entry.token)
        if len(hashed) != 32 or hashed in tokens:
            raise ConfigError(f"{what}: sha256 is not 64 hex digits, or is given twice")
        if hashed in {plain_hash(t) for t in DEMO_TOKENS}:
            raise ConfigError(f"{what}: is a demo token, which everybody knows")
        tokens[hashed] = Principal(f"file:{entry.name}", entry.roles)
    return tokens


def read_tokens_file(path: Path) -> list[StaticToken]:
    """What stands in a --tokens_file; raises ConfigError."""
    return _read(path, "--tokens_file", list[StaticToken])


def load_policies(config: Config) -> dict[str, tuple[Rule, ...]] | None:
    """Role -> rules of --policies_file; raises ConfigError."""
    if config.policies_file is None:
        return None
    path = config.policies_file
    policies = _read(path, "--policies_file", dict[str, tuple[Rule, ...]])
    for role, rules in policies.items():
        try:
            check_role_name(role)
            check_rules(rules)
        except PolicyError as e:
            raise ConfigError(f"--policies_file: {path}: role {role!r}: {e}") from None
    return policies


def _read(path: Path, flag: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as e:
        raise ConfigError(f"{flag}: cannot read {path}: {e.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"{flag}: {path}: {e}") from None


def _check_private(path: Path) -> None:
    if sys.platform != "win32" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--tokens_file: {path} holds tokens and is readable by others")
