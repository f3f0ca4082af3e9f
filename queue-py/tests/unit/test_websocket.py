"""The reading half of a WebSocket: frames in any pieces, and what a hostile peer may not do."""

from __future__ import annotations

import random

import pytest
from aiohttp import WSCloseCode

from message_queue.websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    TEXT,
    FrameReader,
    ProtocolError,
    frame,
)


def masked(
    payload: bytes, opcode: int, mask: bytes = b"\x01\xfe\x00\x99", last: bool = True
) -> bytes:
    """A frame as a client sends it."""
    plain = frame(payload, opcode)
    head = plain[: len(plain) - len(payload)]
    first = head[0] if last else head[0] & 0x7F
    text = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((first, head[1] | 0x80)) + head[2:] + mask + text


def test_frames_of_all_sizes_are_read_whatever_pieces_they_come_in() -> None:
    draw = random.Random(7)
    sent = []
    for size in (0, 1, 2, 125, 126, 127, 300, 65_535, 65_536, 70_001):
        mask = draw.choice((b"\0\0\0\0", draw.randbytes(4)))
        sent.append((draw.choice((TEXT, BINARY)), draw.randbytes(size), mask))
    stream = b"".join(masked(payload, opcode, mask) for opcode, payload, mask in sent)
    for most in (1, 3, 7, 1000, 1 << 20):
        reader, got, at = FrameReader(1 << 20), [], 0
        while at < len(stream):
            step = draw.randint(1, most) if most > 1 or at < 3000 else 5000
            got += reader.feed(stream[at : at + step])
            at += step
        assert got == [(opcode, payload) for opcode, payload, _ in sent]


def test_a_continued_message_is_put_together_and_a_ping_may_come_between() -> None:
    reader = FrameReader(10)
    assert reader.feed(masked(b"abc", TEXT, last=False)) == []
    assert reader.feed(masked(b"now", PING)) == [(PING, b"now")]
    assert reader.feed(masked(b"", CONTINUATION, last=False)) == []
    assert reader.feed(masked(b"def", CONTINUATION) + masked(b"x", BINARY)) == [
        (TEXT, b"abcdef"),
        (BINARY, b"x"),
    ]


def test_a_peer_may_close_with_a_code_and_a_reason_or_without() -> None:
    for payload in (b"", b"\x03\xe8", b"\x0f\xa1" + "é".encode()):
        reader = FrameReader(10)
        assert reader.feed(masked(payload, CLOSE)) == [(CLOSE, payload)]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"plain", TEXT) + b"....", WSCloseCode.PROTOCOL_ERROR),
        (b"\xc1\x80....", WSCloseCode.PROTOCOL_ERROR),
        (b"\x83\x80....", WSCloseCode.PROTOCOL_ERROR),
        (masked(b"x" * 126, PING), WSCloseCode.PROTOCOL_ERROR),
        (masked(b"", CLOSE, last=False), WSCloseCode.PROTOCOL_ERROR),
        (masked(b"\x03", CLOSE), WSCloseCode.PROTOCOL_ERROR),
        *(
            (masked(code.to_bytes(2, "big"), CLOSE), WSCloseCode.PROTOCOL_ERROR)
            for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000)
        ),
        (masked(b"\x03\xe8\xff", CLOSE), WSCloseCode.INVALID_TEXT),
        (masked(b"", CONTINUATION), WSCloseCode.PROTOCOL_ERROR),
        (masked(b"a", TEXT, last=False) + masked(b"b", TEXT), WSCloseCode.PROTOCOL_ERROR),
        (masked(b"x" * 101, TEXT), WSCloseCode.MESSAGE_TOO_BIG),
        (b"\x81\xff" + b"\x7f" * 12, WSCloseCode.MESSAGE_TOO_BIG),
        (
            masked(b"x" * 60, TEXT, last=False) + masked(b"x" * 60, CONTINUATION),
            WSCloseCode.MESSAGE_TOO_BIG,
        ),
    ],
)
def test_what_breaks_the_protocol_is_named(data: bytes, code: int) -> None:
    reader = FrameReader(100)
    with pytest.raises(ProtocolError) as refused:
        reader.feed(data)
    assert refused.value.code == code
