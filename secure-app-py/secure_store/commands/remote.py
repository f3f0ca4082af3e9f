"""How a command speaks to a running node: where, trusted by what, and with which token.

The token comes from a file, standard input or the environment, never from an argument: arguments
are seen by every process on the machine and stay in the shell's history.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from secure_store.client import SecureClient, SecureError
from secure_store.commands.terminal import TOKEN_VARIABLE, warn
from secure_store.config import DEFAULT_CERT, ConfigError, https_url
from secure_store.trust import Trust, TrustError

T = TypeVar("T")
DEFAULT_URL = "https://127.0.0.1:8000"


def add_connection(p: argparse.ArgumentParser, *, one_node: bool = False) -> None:
    """The flags of every command that asks a running node."""
    group = p.add_argument_group("connection")
    which = "the node" if one_node else "a node; many times, the primary is found among them"
    group.add_argument("--url", action="append", default=[],
                       help=f"https://host:port of {which} (default {DEFAULT_URL})")  # fmt: skip
    group.add_argument("--cert", action="append", default=[],
                       help="the nodes' certificate (PEM), pinned; many times "
                       f"(default {DEFAULT_CERT}, if there is no --ca and no --pin)")  # fmt: skip
    group.add_argument("--ca", help="trust certificates of this authority (PEM) instead")
    group.add_argument("--pin", action="append", default=[],
                       help="SHA-256 of the nodes' certificate, instead; many times")  # fmt: skip
    group.add_argument("--token_file", help="file that holds the token, - for standard input "
                       f"(default: the variable {TOKEN_VARIABLE})")  # fmt: skip
    group.add_argument("--timeout", type=float, default=10.0,
                       help="seconds to go on trying (default 10)")  # fmt: skip


def urls_of(args: argparse.Namespace) -> list[str]:
    return [https_url(url, "--url") for url in args.url or [DEFAULT_URL]]


def read_token(path: str | None) -> str:
    """The token for a command; raises ConfigError."""
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        missing = f"a token is needed: --token_file, or the variable {TOKEN_VARIABLE}"
    else:
        try:
            token = sys.stdin.readline() if path == "-" else Path(path).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"--token_file: {path}: {getattr(e, 'strerror', None) or e}"
            ) from None
        missing = f"--token_file: {path} holds no token"
    token = token.strip()
    if not token:
        raise ConfigError(missing)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("the token holds characters that no token has")
    return token


def trust_of(args: argparse.Namespace) -> Trust:
    certificates = args.cert or ([] if args.ca or args.pin else [DEFAULT_CERT])
    try:
        return Trust(ca=args.ca, cert=certificates, pin=args.pin)
    except TrustError as e:
        raise ConfigError(f"--cert/--ca/--pin: {e}") from None


def ask(args: argparse.Namespace, work: Callable[[SecureClient], Awaitable[T]]) -> T | None:
    """Connect and do `work`; None, and one line on stderr, if the nodes refuse or do not answer.

    Raises ConfigError for a mistake in the arguments."""
    urls, trust, token = urls_of(args), trust_of(args), read_token(args.token_file)

    async def connected() -> T:
        async with SecureClient(urls, token, trust=trust, persist_s=args.timeout) as client:
            return await work(client)

    try:
        return asyncio.run(connected())
    except SecureError as e:
        detail = getattr(e, "body", {}).get("detail")
        warn(f"main.py: refused: {e}" + (f" ({detail})" if detail else ""))
        return None
