"""The short way answers as aiohttp's way does, byte for byte, and takes only what is plain."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from express_calls import FakeNode, assert_alike, seen, serving
from express_requests import LONG, SHORT

from message_queue.api import express
from message_queue.api.express import plain_headers


def _figures(node: FakeNode) -> list[object]:
    metrics = node.metrics
    return [node.asked, metrics.requests, metrics.errors, metrics.acked, node.leased]


async def test_both_ways_give_the_same_bytes_and_count_the_same(tmp_path: Path) -> None:
    async with (
        serving(tmp_path / "0") as short,
        serving(tmp_path / "1", short=False) as long,
    ):
        for name, request in {**SHORT, **LONG}.items():
            for each in (short, long):
                each.forget()
            one, other = await asyncio.gather(seen(short, [request]), seen(long, [request]))
            assert one == other, name
            assert one.startswith(b"HTTP/1."), name
            assert _figures(short.node) == _figures(long.node), name
            took = [each for each in short.taken if each.request_id != b"last"]
            assert len(took) == (name in SHORT), name
            assert not long.taken


# ── broken requests ─────────────────────────────────────────────────────────────────────────────

PIECES = (
    b"\r\n", b"\n", b"\r", b" ", b":", b"%", b"%41", b"?", b"&", b"=", b"#", b"\0", b"\xff", b"\t",
    b"/", b"..", b"+", b"HTTP/1.0", b"Content-Length: 3\r\n", b"content-length:0\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Host: y\r\n", b"Connection: close\r\n", b"Accept: a\r\n",
    b"X-Request-Id:\r\n", b"x-request-id: a b\r\n", b"Accept: application/problem+json\r\n",
    b"Origin: http://evil\r\n", b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n",
    b"content-type: text/plain; charset=x\r\n", b'"', b"{", b"]", b"9", b"\\u0000", b"\xc3\xa4",
)  # fmt: skip


def _broken(rng: random.Random) -> Sequence[bytes]:
    """A request with a few mistakes, in one piece or two."""
    request = bytearray(rng.choice(list(rng.choice((SHORT, SHORT, LONG)).values())))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at = rng.choice((rng.randrange(len(request)), request.find(b"\r\n") + 2))
        match rng.randrange(3):
            case 0:
                request[at:at] = rng.choice(PIECES)
            case 1:
                del request[at : at + rng.choice((1, 2, 5))]
            case _:
                request[at : at + 1] = bytes((rng.randrange(256),))
    cut = rng.choice((0, rng.randrange(len(request))))
    return (bytes(request[:cut]), bytes(request[cut:])) if cut else (bytes(request),)


async def test_broken_requests_are_answered_alike(tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("FUZZ_SEED", "5")))
    at_once = asyncio.Semaphore(16)
    async with (
        serving(tmp_path / "0") as short,
        serving(tmp_path / "1", short=False) as long,
    ):

        async def compare(chunks: Sequence[bytes]) -> None:
            async with at_once:
                await assert_alike(short, long, chunks)

        cases = int(os.environ.get("FUZZ", "100"))
        await asyncio.gather(*(compare(_broken(rng)) for _ in range(cases)))
        assert sum(each.request_id != b"last" for each in short.taken) > cases // 8
        assert not long.taken


@pytest.mark.parametrize(
    "line",
    [
        (b"Origin", b"http://x"), (b"Expect", b"100-continue"), (b"Colour", b"red"),
        (b"Content-Encoding", b"gzip"), (b"Transfer-Encoding", b"chunked"), (b"Upgrade", b"h2c"),
        (b"Connection", b"close"), (b"Connection", b"keep-alive, upgrade"), (b"TE", b"trailers"),
        (b"Accept", b"application/problem+json"), (b"X-Request-Id", b"a b"),
        (b"X-Request-Id", b""), (b"X-Request-Id", b"r-2"), (b"content-length", b"+3"),
        (b"Content-Length", b""), (b"host ", b"y"),
    ],
)  # fmt: skip
def test_a_header_that_may_mean_something_is_aiohttps(line: tuple[bytes, bytes]) -> None:
    plain = [(b"Host", b"a"), (b"X-Request-Id", b"r-1"), (b"Content-Length", b"12")]
    assert plain_headers(plain) == (b"r-1", 12)
    assert plain_headers([*plain, line]) is None
    assert plain_headers([*plain, (b"X-Colour", b"red")]) == (b"r-1", 12)


def test_no_x_header_but_the_request_id_means_anything_to_aiohttps_way() -> None:
    """The short way takes requests with other ones: whoever adds one tells it."""
    api = Path(express.__file__).parent
    named = {
        header
        for file in api.glob("*.py")
        for header in re.findall(r"(?i)\bx-[a-z][a-z-]+", file.read_text(encoding="utf-8"))
    }
    assert {header.lower() for header in named} == {"x-request-id", "x-content-type-options"}
