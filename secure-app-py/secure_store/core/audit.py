"""The audit chain: canonical JSON lines, each MAC covering the one before; and its verification.

A line is the entry's fields as compact JSON with sorted keys, then `mac`:

    {"action":"set",…,"who":"…","mac":"<64 hex>"}

    mac = HMAC-SHA256(audit key, previous mac (32 bytes) + the JSON without `mac`)

Without the key no line can be made or changed. Someone who has the key (he owns the node) can still
rewrite the whole file; that is why the chain's *heads* are signed (Ed25519) and kept by the other
node: a head that does not fit the file proves a cut, a rewrite or a fork.

`verify` recomputes every MAC from the recomputed one before it, never from a stored one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from enum import IntEnum

import msgspec

FIRST_MAC = bytes(32)


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who did what, where, with what outcome. Fields in the order of their names: canonical."""

    action: str
    addr: str
    detail: str = ""
    epoch: int = 0  # of the record
    key: str = ""
    node: str
    outcome: str
    record: int = 0  # a write: the number of the record that holds it
    request_id: str
    seq: int
    status: int
    ts: str  # UTC, RFC 3339, milliseconds
    who: str


class Line(Entry, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """An entry as it stands in the file."""

    mac: str


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a chain at some moment, signed by the node that wrote it."""

    log_id: str
    mac: str
    node: str
    seq: int
    signature: str = ""

    def signed_text(self) -> bytes:
        """What the signature covers."""
        return b"secure-store/head/1\0" + b"\0".join(
            part.encode() for part in (self.log_id, self.mac, self.node, str(self.seq))
        )


class Told(msgspec.Struct, frozen=True, array_like=True):
    """How far the writes' lines are (ledger.py): all decided records up to `record` have a durable
    line, and the lines of later ones come after line `line`."""

    record: int = 0
    line: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Line).decode


def mac_of(key: bytes, previous: bytes, body: bytes) -> bytes:
    """The MAC of one line's JSON (without `mac`) after the line that ended in `previous`."""
    return hmac.digest(key, previous + body, "sha256")


class Chainer:
    """Makes lines under one key. `mac_of`, with the key's two hash states kept (RFC 2104, section
    4): OpenSSL 3 takes longer to set a key up than to hash a line."""

    def __init__(self, key: bytes) -> None:
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(b ^ 0x36 for b in block))
        self._outer = hashlib.sha256(bytes(b ^ 0x5C for b in block))

    def line(self, previous: bytes, entry: Entry) -> tuple[bytes, bytes]:
        """One line, newline included, and its MAC for the next."""
        body = _encode(entry)
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(previous + body)
        outer.update(inner.digest())
        mac = outer.digest()
        return b'%s,"mac":"%s"}\n' % (body[:-1], mac.hex().encode()), mac


def make_line(key: bytes, previous: bytes, entry: Entry) -> tuple[bytes, bytes]:
    """One line, newline included, and its MAC for the next."""
    return Chainer(key).line(previous, entry)


def read_line(raw: bytes) -> tuple[Line, bytes] | None:
    """A line (newline included) as its fields and its body; None unless it is canonical to the
    byte."""
    try:
        line = _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    fields = msgspec.structs.asdict(line)
    mac = fields.pop("mac")
    body = _encode(Entry(**fields))
    if raw != b'%s,"mac":"%s"}\n' % (body[:-1], mac.encode()):
        return None
    return line, body


class Code(IntEnum):
    """What `audit verify` found; the exit codes of the command."""

    OK = 0
    EDIT = 10
    DELETE = 11
    REORDER = 12
    CUT = 13
    REWRITE = 14
    FORK = 15
    TORN = 16


class Verdict(msgspec.Struct, frozen=True):
    """`seq` is the first entry that is wrong; `unanchored` entries follow the last head known."""

    code: Code
    seq: int
    reason: str
    entries: int
    unanchored: int


def verify(raw_lines: Iterable[bytes], key: bytes, heads: Iterable[Head] = ()) -> Verdict:
    """Judge a whole log: its lines (newlines included, oldest segment first) against key and heads.

    The heads' signatures are taken as checked.
    """
    anchors: dict[int, set[str]] = {}
    for head in heads:
        anchors.setdefault(head.seq, set()).add(head.mac)
    lines = iter(raw_lines)
    previous = FIRST_MAC
    count = 0
    rewritten: int | None = None
    for raw in lines:
        if not raw.endswith(b"\n"):
            if next(lines, None) is not None:
                return _bad(Code.EDIT, count + 1, "A line is torn, and others follow it", count)
            torn = Verdict(Code.TORN, count + 1, "The last line is torn", count, 0)
            return _against_heads(count, rewritten, anchors, torn)
        expected = count + 1
        parsed = read_line(raw)
        if parsed is None:
            return _bad(Code.EDIT, expected, "Not a canonical line", count)
        line, body = parsed
        if line.seq != expected:
            return _misplaced(line.seq, expected, lines, count)
        mac = mac_of(key, previous, body)
        if not hmac.compare_digest(mac.hex(), line.mac):
            return _bad(Code.EDIT, expected, "The line does not fit its MAC", count)
        previous = mac
        count = expected
        if rewritten is None and count in anchors and mac.hex() not in anchors[count]:
            rewritten = count
    return _against_heads(count, rewritten, anchors, None)


def _bad(code: Code, seq: int, reason: str, count: int) -> Verdict:
    return Verdict(code, seq, reason, count, 0)


def _misplaced(found: int, expected: int, rest: Iterable[bytes], count: int) -> Verdict:
    """A gap: if the missing entry stands further down the lines were reordered, else it is gone."""
    if found < expected:
        return _bad(Code.REORDER, expected, f"Entry {found} stands in its place", count)
    for raw in rest:
        parsed = read_line(raw)
        if parsed is not None and parsed[0].seq == expected:
            return _bad(Code.REORDER, expected, f"Entry {found} stands before it", count)
    return _bad(Code.DELETE, expected, f"Missing; entry {found} follows", count)


def _against_heads(
    count: int, rewritten: int | None, anchors: dict[int, set[str]], torn: Verdict | None
) -> Verdict:
    last = max(anchors, default=0)
    for seq in sorted(anchors):
        if len(anchors[seq]) > 1:
            return _bad(Code.FORK, seq, "Two different heads were signed for one entry", count)
    if rewritten is not None:
        return _bad(Code.REWRITE, rewritten, "The chain is not the one that was anchored", count)
    if last > count:
        return _bad(Code.CUT, count + 1, f"The log ended at entry {last} or later", count)
    if torn is not None:
        return torn
    return Verdict(Code.OK, 0, "", count, count - last if anchors else count)
