"""`main.py quarantine`: what an old primary had alone, read from the copies that were set aside."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from secure_store.commands.terminal import add_node, node_files, say, warn
from secure_store.config import ConfigError
from secure_store.core.changes import Change, Destroy, MarkDeleted, PutValue, decode_changes
from secure_store.core.kv import Damaged
from secure_store.core.records import Record
from secure_store.storage.database import Database

PAGE_RECORDS = 256
PAGE_BYTES = 8 << 20


def add(commands: Any) -> None:
    """Add `quarantine` to main.py's commands."""
    p = commands.add_parser(
        "quarantine", help="show what an old primary had alone before it became a replica",
        description="Read the copies that a node set aside when another history replaced its own: "
        "one JSON object a\nline for each set, delete and destroy that the present store does not "
        "have. Values are shown\nin the clear. Tokens and policies are only counted.",
        examples=["main.py quarantine --id nodeA",
                  "main.py quarantine --id nodeA data/nodeA/quarantine-epoch1-seq40.db"],
    )  # fmt: skip
    add_node(p)
    p.add_argument("file", nargs="*", help="copies (default: all in the data directory)")
    p.set_defaults(run=_quarantine)


def _quarantine(args: argparse.Namespace) -> int:
    data_dir, keyring = node_files(args)
    files = [Path(f) for f in args.file] or sorted(data_dir.glob("quarantine-*.db"))
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist")
    others = 0
    try:
        present = Database(data_dir / "store.db", keyring)
        for path in files:
            copy = Database(path, keyring)
            for record in _records(copy):
                if present.position(record.seq) == record.position:
                    continue  # common history
                for change in decode_changes(record.payload):
                    row = _row(change, present)
                    others += row is None and not isinstance(change, PutValue)
                    if row is not None:
                        line = {"file": path.name, "epoch": record.epoch, "seq": record.seq, **row}
                        say(msgspec.json.encode(line).decode())
            copy.close()
        present.close()
    except (sqlite3.Error, Damaged, msgspec.MsgspecError) as e:
        warn(f"main.py: failed: {e}")
        return 1
    warn(f"{len(files)} copies, {others} other changes (tokens, policies, audit)")
    return 0


def _records(copy: Database) -> Iterator[Record]:
    """Every record that the copy's log still holds."""
    after = max(0, copy.log_size()[0] - 1)
    while page := copy.read_log(after, PAGE_RECORDS, PAGE_BYTES):
        yield from page
        after = page[-1].seq


def _row(change: Change, present: Database) -> dict[str, Any] | None:
    """What to show of a change; None: nothing, or the present store has the same."""
    match change:
        case PutValue(key, version, value, created_ms):
            if present.value(key, version) == value:
                return None
            return {"change": "set", "key": key, "version": version, "created_ms": created_ms,
                    "value": msgspec.Raw(value)}  # fmt: skip
        case MarkDeleted(key, version, deleted_ms):
            done = "delete" if deleted_ms else "undelete"
            return {"change": done, "key": key, "version": version}
        case Destroy(key, version):
            return {"change": "destroy", "key": key, "version": version}
        case _:
            return None
