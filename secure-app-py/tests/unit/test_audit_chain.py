"""The audit chain: every tampering is told apart, and no byte of the log can be changed unseen."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secure_store.core.audit import (
    FIRST_MAC,
    Chainer,
    Code,
    Entry,
    Head,
    Verdict,
    mac_of,
    make_line,
    read_line,
    verify,
)

KEY = b"k" * 32


def entry(seq: int, who: str) -> Entry:
    return Entry(
        action="set", addr="127.0.0.1", key=f"key-{seq}", node="nodeA", outcome="allowed",
        request_id=f"r{seq}", seq=seq, status=200, ts="2026-11-22T22:43:00.000Z", who=who,
    )  # fmt: skip


def chain(count: int, key: bytes = KEY, who: str = "demo:admin") -> list[bytes]:
    lines: list[bytes] = []
    mac = FIRST_MAC
    for seq in range(1, count + 1):
        line, mac = make_line(key, mac, entry(seq, who))
        lines.append(line)
    return lines


def head(lines: list[bytes], seq: int) -> Head:
    parsed = read_line(lines[seq - 1])
    assert parsed is not None
    return Head("log", parsed[0].mac, "nodeA", seq)


def judge(lines: list[bytes], *heads: Head) -> Verdict:
    return verify(lines, KEY, heads)


def test_an_untouched_log_is_ok_and_the_unanchored_tail_is_counted() -> None:
    lines = chain(10)
    assert judge(lines) == Verdict(Code.OK, 0, "", 10, 10)
    assert judge(lines, head(lines, 4), head(lines, 7)) == Verdict(Code.OK, 0, "", 10, 3)
    assert judge([]).code is Code.OK


def test_an_edited_line_is_an_edit() -> None:
    lines = chain(10)
    lines[4] = lines[4].replace(b'"status":200', b'"status":403')
    verdict = judge(lines)
    assert (verdict.code, verdict.seq) == (Code.EDIT, 5)


def test_a_removed_line_is_a_deletion_also_at_the_beginning() -> None:
    for gone in (1, 5, 9):
        lines = chain(10)
        del lines[gone - 1]
        verdict = judge(lines)
        assert (verdict.code, verdict.seq) == (Code.DELETE, gone)


def test_swapped_lines_are_a_reordering() -> None:
    lines = chain(10)
    lines[3], lines[6] = lines[6], lines[3]
    verdict = judge(lines)
    assert (verdict.code, verdict.seq) == (Code.REORDER, 4)
    repeated = chain(5)
    repeated.insert(3, repeated[1])
    assert judge(repeated).code is Code.REORDER


def test_a_missing_tail_is_a_cut_if_a_head_beyond_it_is_known() -> None:
    lines = chain(10)
    verdict = judge(lines[:6], head(lines, 8))
    assert (verdict.code, verdict.seq) == (Code.CUT, 7)
    assert judge([], head(lines, 8)).code is Code.CUT
    assert judge(lines[:6]).code is Code.OK, "without a head a cut cannot be seen"


def test_a_log_made_anew_with_the_key_is_a_rewrite() -> None:
    lines = chain(10)
    forged = chain(10, who="nobody")
    verdict = judge(forged, head(lines, 3), head(lines, 8))
    assert (verdict.code, verdict.seq) == (Code.REWRITE, 3)


def test_changing_one_entry_with_the_key_moves_every_later_head() -> None:
    lines = chain(10)
    forged = [*lines[:1]]
    mac = bytes.fromhex(read_line(lines[0])[0].mac)
    for seq in range(2, 11):
        who = "nobody" if seq == 2 else "demo:admin"
        line, mac = make_line(KEY, mac, entry(seq, who))
        forged.append(line)
    assert judge(forged).code is Code.OK
    assert judge(forged, head(lines, 8)).code is Code.REWRITE


def test_two_signed_heads_of_one_entry_are_a_fork() -> None:
    lines, other = chain(10), chain(10, who="nobody")
    verdict = judge(lines, head(lines, 4), head(lines, 8), head(other, 8))
    assert (verdict.code, verdict.seq) == (Code.FORK, 8)


def test_half_a_line_at_the_end_is_torn_and_anchors_come_first() -> None:
    lines = chain(10)
    torn = [*lines[:9], lines[9][:40]]
    assert (judge(torn).code, judge(torn).seq) == (Code.TORN, 10)
    assert judge(torn, head(lines, 9)).code is Code.TORN
    assert judge(torn, head(lines, 10)).code is Code.CUT


def test_the_chain_rests_on_recomputed_macs_and_not_on_stored_ones() -> None:
    """Re-keying one line with a wrong key, and everything after it from the stored MAC, is seen."""
    lines = chain(6)
    parsed = [read_line(line) for line in lines]
    body = parsed[2][1].replace(b"key-3", b"key-X")
    forged = mac_of(b"wrong", bytes.fromhex(parsed[1][0].mac), body)
    lines[2] = body[:-1] + b',"mac":"' + forged.hex().encode() + b'"}\n'
    body4 = parsed[3][1]
    mac4 = mac_of(KEY, forged, body4)
    lines[3] = body4[:-1] + b',"mac":"' + mac4.hex().encode() + b'"}\n'
    assert judge(lines).code is Code.EDIT
    assert judge(lines).seq == 3


def test_without_the_key_nothing_verifies() -> None:
    assert verify(chain(3), b"other" * 6, ()).code is Code.EDIT


def test_every_flipped_byte_is_found() -> None:
    raw = b"".join(chain(4))
    rng = random.Random(7)
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << rng.randrange(8)
        verdict = judge(bytes(flipped).splitlines(keepends=True))
        assert verdict.code is not Code.OK, f"byte {at}"


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 12), st.data())
def test_any_rearrangement_but_a_cut_is_found_without_anchors(count: int, data) -> None:
    lines = chain(count)
    picked = data.draw(st.lists(st.sampled_from(range(count)), max_size=count + 2))
    verdict = judge([lines[i] for i in picked])
    assert (verdict.code is Code.OK) is (picked == list(range(len(picked))))


@pytest.mark.parametrize(
    "text",
    [b"{}\n", b"not json\n", b"\xff\n", b'{"seq":1}\n', chain(1)[0].replace(b",", b", ", 1)],
)
def test_only_the_canonical_form_of_a_line_is_a_line(text: bytes) -> None:
    assert read_line(text) is None


@given(st.binary(max_size=100), st.binary(max_size=32), st.text(max_size=20))
def test_a_kept_key_state_gives_the_same_mac_as_hmac(key: bytes, previous: bytes, who: str) -> None:
    entry = Entry(action="get", addr="", node="n", outcome="allowed", request_id="r", seq=1,
                  status=200, ts="", who=who)  # fmt: skip
    line, mac = Chainer(key).line(previous, entry)
    parsed = read_line(line)
    assert parsed is not None
    assert mac == mac_of(key, previous, parsed[1]) == bytes.fromhex(parsed[0].mac)
