"""Every byte of what is stored, flipped; every cut: an error or what was there, nothing else.

SOAK=1 flips every byte of the database that is in use; without it, every eleventh.
"""

from __future__ import annotations

import io
import os
import sqlite3
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stored import contents, filled

from secure_store.config import ConfigError
from secure_store.core.audit import FIRST_MAC, Code, Entry, Head, make_line, verify
from secure_store.core.kv import Damaged
from secure_store.storage.anchors import AnchorError, Anchors, read_anchors
from secure_store.storage.audit_files import raw_lines
from secure_store.storage.database import Database
from secure_store.storage.keyring import Keyring

KEY = b"k" * 32
BROKEN = (Damaged, ConfigError, sqlite3.Error, UnicodeDecodeError)  # (a name SQLite quotes)
STRIDE = 1 if os.environ.get("SOAK") else 11


def chain(count: int) -> tuple[list[bytes], list[Head]]:
    mac, lines, heads = FIRST_MAC, [], []
    for seq in range(1, count + 1):
        entry = Entry(action="set_value", addr="127.0.0.1", key=f"k{seq}", node="n", record=seq,
                      outcome="allowed", request_id=f"r{seq}", seq=seq, status=200,
                      ts="2026-01-01T00:00:00.000Z", who="demo:admin")  # fmt: skip
        line, mac = make_line(KEY, mac, entry)
        lines.append(line)
        heads.append(Head("log", mac.hex(), "n", seq))
    return lines, heads


def judge(older: bytes | None, newer: bytes, *heads: Head) -> Code:
    """What is found in these two segments (their bytes; None: the file is gone), read as
    `raw_lines` reads files."""
    return verify([*io.BytesIO(older or b""), *io.BytesIO(newer)], KEY, heads).code


def test_every_flipped_byte_of_the_audit_files_is_found_anchored_or_not(tmp_path: Path) -> None:
    lines, heads = chain(6)
    whole = [b"".join(lines[:3]), b"".join(lines[3:])]
    for name, raw in zip(("audit.log.000001", "audit.log"), whole, strict=True):
        (tmp_path / name).write_bytes(raw)
    assert list(raw_lines(tmp_path / "audit.log")) == lines
    assert judge(*whole) is judge(*whole, *heads) is Code.OK
    for which, raw in enumerate(whole):
        for at in range(len(raw)):
            for bit in (0x01, 0x80) if at % 5 else (0x20, raw[at] ^ 0x0A or 0x04):
                flipped = bytearray(raw)
                flipped[at] ^= bit
                found = list(whole)
                found[which] = bytes(flipped)
                assert judge(*found) is not Code.OK, (which, at, bit)
                assert judge(*found, heads[-1]) is not Code.OK, (which, at, bit)


def test_every_cut_of_the_audit_files_is_found_up_to_the_last_anchor() -> None:
    lines, heads = chain(6)
    first, raw = b"".join(lines[:3]), b"".join(lines[3:])
    borders = {0, len(lines[3]), len(lines[3] + lines[4])}
    for keep in range(len(raw)):
        cut = raw[:keep]
        assert judge(first, cut, heads[-1]) is Code.CUT
        # Without an anchor beyond it, a tail that is gone whole is not missed: that is documented.
        assert judge(first, cut) is (Code.OK if keep in borders else Code.TORN)
        assert judge(first, cut, heads[2]) is (Code.OK if keep in borders else Code.TORN)
    for keep in range(len(first)):  # in the middle of the log no cut is only a torn line
        assert judge(first[:keep], raw) in (Code.DELETE, Code.EDIT), keep
    assert judge(None, raw) is Code.DELETE


def test_every_flipped_byte_of_the_anchors_is_refused_or_takes_nothing_away(tmp_path) -> None:
    keyring = Keyring.open_or_make(tmp_path / "keyring.json", b"m" * 32)
    anchors = Anchors(tmp_path, "n", keyring.signer.public_key().public_bytes_raw())
    for head in chain(3)[1]:
        signature = keyring.signer.sign(head.signed_text()).hex()
        anchors.keep(Head(head.log_id, head.mac, head.node, head.seq, signature))
    raw = anchors.path.read_bytes()
    _, known = read_anchors(anchors.path)
    for at in range(0, len(raw) - 1, 3):  # (the last line end: a torn line, passed over)
        flipped = bytearray(raw)
        flipped[at] ^= 0x04
        anchors.path.write_bytes(bytes(flipped))
        try:
            _, found = read_anchors(anchors.path)
        except (AnchorError, ValueError):
            continue
        assert [h.seq for h in found] == [h.seq for h in known], at


def test_a_flipped_byte_of_the_database_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    database, keyring = filled(tmp_path)
    expected = contents(database)
    database.close()
    raw = (tmp_path / "store.db").read_bytes()
    assert not (tmp_path / "store.db-wal").exists()
    used = [at for at, byte in enumerate(raw) if byte]
    copy = tmp_path / "copy.db"
    errors = 0
    for at in used[::STRIDE]:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        copy.write_bytes(bytes(flipped))
        try:
            opened = Database(copy, keyring)
            try:
                found = contents(opened)
            finally:
                opened.close()
        except BROKEN:
            errors += 1
            continue
        assert found == expected, f"byte {at}: other data was read"
    assert errors > len(used[::STRIDE]) // 2


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_truncated_database_is_an_error(tmp_path: Path, keep: float) -> None:
    database, keyring = filled(tmp_path)
    database.close()
    path = tmp_path / "store.db"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(BROKEN):
        contents(Database(path, keyring))
