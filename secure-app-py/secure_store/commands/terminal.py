"""What the commands share: how they read their arguments and speak to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from secure_store.config import ConfigError, valid_name
from secure_store.storage.keyring import Keyring, open_keyring

T = TypeVar("T")
TOKEN_VARIABLE = "SECURE_STORE_TOKEN"  # noqa: S105 - the variable's name


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and examples below the help."""

    def __init__(self, **settings: Any) -> None:
        examples = settings.pop("examples", ())
        if examples:
            settings["epilog"] = "examples:\n" + "\n".join(f"  {each}" for each in examples)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def say(text: str) -> None:
    print(text)  # noqa: T201 - a command's output


def warn(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - a command's output


def add_node(p: argparse.ArgumentParser) -> None:
    """The flags that say which node's files are meant."""
    p.add_argument("--id", help="the node's name")
    p.add_argument("--data_dir", help="its data directory (default data/<id>)")
    p.add_argument("--master_key_file", help="its master key (default <data_dir>/master.key)")


def data_dir_of(args: argparse.Namespace) -> Path:
    if args.data_dir is not None:
        return Path(args.data_dir)
    if args.id is None:
        raise ConfigError("--id or --data_dir is needed")
    return Path("data") / valid_name(args.id, "--id")


def steady(data_dir: Path, work: Callable[[], T], is_bad: Callable[[T], bool]) -> T:
    """`work()`, once more if it went badly and the node has changed its keys meanwhile."""
    path = data_dir / "keyring.json"
    for _ in range(3):
        before = path.read_bytes()
        result = work()
        if not is_bad(result) or path.read_bytes() == before:
            break
    return result


def node_files(args: argparse.Namespace) -> tuple[Path, Keyring]:
    """The data directory that is meant, and its keys (nothing is written)."""
    data_dir = data_dir_of(args)
    keyring_path = data_dir / "keyring.json"
    if not keyring_path.exists():
        raise ConfigError(f"{data_dir} is not a node's data directory (no keyring.json)")
    master_path = Path(args.master_key_file or data_dir / "master.key")
    return data_dir, open_keyring(keyring_path, master_path, finish=False)
