"""Frames: every byte of a small log cut, flipped, and followed by more."""

from __future__ import annotations

import pytest

from message_queue.storage.framing import HEADER, MAX_PAYLOAD, Damage, Frame, frame, scan

PAYLOADS = [b"first", b"x", bytes(range(256)), b"last one"]
LOG = HEADER + b"".join(frame(p) for p in PAYLOADS)
ENDS = [len(HEADER) + sum(len(frame(p)) for p in PAYLOADS[:n]) for n in range(len(PAYLOADS) + 1)]


def payloads(data: bytes) -> list[bytes]:
    return [item.payload for item in scan(data) if isinstance(item, Frame)]


def damages(data: bytes) -> list[Damage]:
    return [item for item in scan(data) if isinstance(item, Damage)]


def test_what_was_framed_is_scanned_in_order() -> None:
    assert payloads(LOG) == PAYLOADS
    assert damages(LOG) == []


def test_a_cut_at_every_byte_keeps_every_whole_frame_and_names_a_torn_end() -> None:
    for size in range(len(LOG)):
        data = LOG[:size]
        whole = sum(end <= size for end in ENDS[1:])
        assert payloads(data) == PAYLOADS[:whole]
        if size in ENDS:
            assert damages(data) == []
        else:
            start = ENDS[whole] if size >= len(HEADER) else 0
            assert damages(data) == [Damage(start, size, torn=True)]


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flip_of_every_byte_costs_that_frame_only_and_never_goes_unseen(mask: int) -> None:
    for at in range(len(LOG)):
        data = bytearray(LOG)
        data[at] ^= mask
        hit = sum(end <= at for end in ENDS) - 1
        expected = PAYLOADS if hit < 0 else PAYLOADS[:hit] + PAYLOADS[hit + 1 :]
        assert payloads(bytes(data)) == expected
        [damage] = damages(bytes(data))
        assert damage.start <= at < damage.end
        assert damage.torn == (hit == len(PAYLOADS) - 1)


def test_a_hole_of_zeros_is_damage_and_what_follows_is_kept() -> None:
    data = LOG[: ENDS[1]] + bytes(4096) + LOG[ENDS[1] :]
    assert payloads(data) == PAYLOADS
    assert damages(data) == [Damage(ENDS[1], ENDS[1] + 4096, torn=False)]


def test_a_tail_of_zeros_is_torn() -> None:
    assert damages(LOG + bytes(100)) == [Damage(len(LOG), len(LOG) + 100, torn=True)]


def test_a_large_stretch_of_garbage_is_stepped_over_quickly() -> None:
    garbage = b"\xd6Q\xff\xff\x00\x00" * 100_000
    assert payloads(LOG + garbage + LOG[len(HEADER) :]) == PAYLOADS * 2


def test_an_empty_and_an_oversized_payload_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        frame(b"")
    with pytest.raises(ValueError, match="bytes"):
        frame(bytes(MAX_PAYLOAD + 1))
