"""The short way answers as aiohttp's way does, in order, and takes nothing that is not plain."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from express_wire import HEAD, REQUESTS, Address, FakeNode, Wire, connected, get, listening, post

from mesi_cache.api import connection
from mesi_cache.api.express import Express, plain_request
from mesi_cache.core.records import Outcome, Write
from mesi_cache.core.step import Changed

SHORT = {
    "hit", "punctuation", "escaped", "escaped twice", "longest key", "miss", "absent", "read 503",
    "write", "write 503", "cas", "cas 409", "delete", "incr", "incr 409",
}  # fmt: skip


@asynccontextmanager
async def serving(node: FakeNode, tmp_path: Path) -> AsyncIterator[Wire]:
    async with listening(node, tmp_path, short=True) as address, connected(address) as wire:
        yield wire


async def test_both_ways_give_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    begin = Express.begin

    def noted(self: Express, *arguments: Any) -> bool:
        taken.append(begin(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(Express, "begin", noted)
    nodes = FakeNode(), FakeNode()
    async with (
        listening(nodes[0], tmp_path / "0", short=True) as short,
        listening(nodes[1], tmp_path / "1", short=False) as long,
    ):
        for name, request in REQUESTS.items():
            taken.clear()
            one, other = await asyncio.gather(_asked(short, request), _asked(long, request))
            assert one == other, name
            assert nodes[0].begun == nodes[1].begun, name
            assert (taken == [True]) == (name in SHORT), name


async def _asked(address: Address, request: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Status line, headers, body; without what differs from request to request."""
    async with connected(address) as wire:
        if request.startswith(b"HEAD"):
            wire.writer.write(request)
            return (await wire.reader.readuntil(b"\r\n")), {}, b""
        first, headers, body = await wire.ask(request)
        assert re.fullmatch(rb"\w+, \d\d \w+ \d{4} [\d:]+ GMT", headers.pop(b"date"))
        if b"X-Request-Id" not in request:
            assert headers.pop(b"x-request-id")
        return first, headers, body


async def test_answers_come_in_the_order_of_requests(tmp_path: Path) -> None:
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        for key in (b"miss", b"hit-1"):
            wire.writer.write(get(b"/read?key=" + key))
            await asyncio.sleep(0.01)
        wire.writer.write(REQUESTS["status"] + post(b"/incr", b'{"key":"two"}'))
        answers = [await wire.answer() for _ in range(4)]
    assert [b'"miss"' in answers[0][2], b'"hit-1"' in answers[1][2]] == [True, True]
    assert [b'"id"' in answers[2][2], b'"two"' in answers[3][2]] == [True, True]


async def test_what_comes_while_a_request_waits_is_held_back_and_then_answered(
    tmp_path: Path,
) -> None:
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        wire.writer.write(post(b"/write", b'{"key":"wait","value":1}'))
        listener = await asyncio.wait_for(node.waiting.get(), 20)
        wire.writer.write(get(b"/read?key=hit"))
        await asyncio.sleep(0.05)
        assert node.begun == [("wait", Write(b"1"))]
        listener.set_result(Changed(Outcome("done", 9)))
        assert b'"version":9' in (await wire.answer())[2]
        assert b'"hit":true' in (await wire.answer())[2]


async def test_a_client_that_hangs_up_is_told_nothing_and_nothing_breaks(tmp_path: Path) -> None:
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        wire.writer.write(post(b"/write", b'{"key":"wait","value":1}'))
        listener = await asyncio.wait_for(node.waiting.get(), 20)
    listener.set_result(Changed(Outcome("done", 9)))
    assert listener.done()


async def test_a_body_that_comes_after_its_head_is_waited_for(tmp_path: Path) -> None:
    """Python's http.client and all that is built on it send them apart."""
    request = post(b"/write", b'{"key":"a","value":"in pieces"}')
    nodes = FakeNode(), FakeNode()
    async with (
        listening(nodes[0], tmp_path / "0", short=True) as short,
        listening(nodes[1], tmp_path / "1", short=False) as long,
    ):
        for cut in (len(request) - 31, len(request) - 1):
            answers = []
            for address in (short, long):
                async with connected(address) as wire:
                    first, headers, body = await wire.ask(request[:cut], request[cut:])
                    del headers[b"date"]
                    again = await wire.ask(get(b"/read?key=hit"))
                    answers.append((first, headers, body, again[2]))
            assert answers[0] == answers[1]
    assert nodes[0].begun == nodes[1].begun
    assert (nodes[0].short, nodes[1].short) == ([True, True], [False, False])


async def test_a_body_too_long_to_be_held_goes_to_aiohttp(tmp_path: Path) -> None:
    value = b'"%s"' % (b"x" * connection.MAX_HELD_BYTES)
    request = post(b"/write", b'{"key":"a","value":%s}' % value)
    node = FakeNode()
    async with serving(node, tmp_path) as wire:
        answer = await wire.ask(request[:300], request[300:70_000], request[70_000:])
    assert answer[0] == b"HTTP/1.1 200 OK"
    assert node.begun == [("a", Write(value))]
    assert node.short == [False]


async def test_a_request_in_pieces_never_begins_in_the_middle(tmp_path: Path) -> None:
    """A piece that looks like a request of its own is still a piece."""
    inner = post(b"/write", b'{"key":"smuggled","value":1}')
    outer = b"POST /write HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (HEAD, len(inner))
    for pieces in ((outer, inner), (b"GET /status HTTP/1.1\r\nHost: x\r\nX-A: ", inner)):
        node = FakeNode()
        async with serving(node, tmp_path) as wire:
            await wire.ask(*pieces)
            assert node.begun == []


# --- broken requests ------------------------------------------------------------------------------

PIECES = (
    b"\r\n", b"\n", b"\r", b" ", b":", b"%", b"%41", b"?", b"&", b"=", b"#", b"\0", b"\xff", b"\t",
    b"/", b"..", b"+", b"HTTP/1.0", b"Content-Length: 3\r\n", b"content-length:0\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Host: y\r\n", b"Connection: close\r\n",
    b"X-Request-Id:\r\n", b"x-request-id: a b\r\n", b"Accept:\t*/*\r\n",
    b"content-type: text/plain; charset=x\r\n",
)  # fmt: skip
LAST = get(b"/read?key=hit", b"Host: a\r\nX-Request-Id: last\r\n")


def _broken(rng: random.Random) -> Sequence[bytes]:
    """A request with a few mistakes, in one piece or two."""
    request = bytearray(rng.choice(list(REQUESTS.values())))
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


async def _seen(address: Address, chunks: Sequence[bytes]) -> list[list[bytes]]:
    """All that comes back for `chunks` and one more request, as lines without order."""
    seen = b""
    async with connected(address) as wire:
        try:
            for chunk in (*chunks, LAST):
                wire.writer.write(chunk)
                await wire.writer.drain()
                await asyncio.sleep(0.01)
            async with asyncio.timeout(0.5):
                while piece := await wire.reader.read(65_536):
                    seen += piece
                    if b"X-Request-Id: last" in seen and seen.endswith(b"}"):
                        break
                else:
                    seen += b"closed"
        except TimeoutError:
            seen += b"it waits for more"
        except ConnectionError:
            seen += b"closed"
    seen = re.sub(rb"Date: [^\r]*|X-Request-Id: [0-9a-f]{12}-[0-9a-f]+", b"", seen)
    return [sorted(part.split(b"\r\n")) for part in seen.split(b"\r\n\r\n")]


async def test_broken_requests_are_answered_alike(tmp_path: Path) -> None:
    nodes, rng = (FakeNode(), FakeNode()), random.Random(int(os.environ.get("FUZZ_SEED", "5")))
    at_once = asyncio.Semaphore(8)
    async with (
        listening(nodes[0], tmp_path / "0", short=True) as short,
        listening(nodes[1], tmp_path / "1", short=False) as long,
    ):

        async def compare(chunks: Sequence[bytes]) -> None:
            async with at_once:
                for _ in range(3):  # how bytes arrive, and when, is not quite in our hands
                    one, other = await asyncio.gather(_seen(short, chunks), _seen(long, chunks))
                    if one == other:
                        return
            assert one == other, chunks

        cases = int(os.environ.get("FUZZ", "64"))
        await asyncio.gather(*(compare(_broken(rng)) for _ in range(cases)))
    assert any(nodes[0].short)
    assert not any(nodes[1].short)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        post(b"/write", b"{}") + b"x",
        post(b"/write", b"{}") * 2,
        post(b"/write", b"{}", HEAD + b"Content-Length: 2\r\n"),
        post(b"/write", b"{}", HEAD + b"host: x\r\n"),
        post(b"/write", b"{}", b""),
        post(b"/write", b"{}", HEAD + b"Transfer-Encoding: chunked\r\n"),
        post(b"/write", b"{}", HEAD + b"Content-Encoding: gzip\r\n"),
        post(b"/write", b"{}", HEAD + b"Expect: 100-continue\r\n"),
        post(b"/write", b"{}", HEAD + b"Connection: close\r\n"),
        post(b"/write", b"{}", HEAD + b"Idempotency-Key: a\r\n"),
        post(b"/write", b"{}", b"Host : x\r\n"),
        post(b"/write", b"{}", b"Host: x\r\nAccept: */*\r\n folded\r\n"),
        post(b"/write", b"{}", b"Host: x\nOrigin: y\r\n"),
        post(b"/write", b"{}").replace(b"1.1", b"1.0"),
        b"POST /write HTTP/1.1\r\nHost: x\r\n\r\n",
        get(b"/read?key=%c3%a4"),
        get(b"/read?key=%0a"),
        get(b"/read?key=%6"),
        get(b"/read?key=a&key=b"),
        get(b"/read?key=a#b"),
        get(b"/read?key=a?b"),
        get(b"/read?key=a", b""),
        get(b"/read?key=a")[:-2],
    ],
)
def test_only_whole_and_plain_requests_are_taken(data: bytes) -> None:
    assert plain_request(data) is None


def test_a_hostile_head_costs_no_more_than_its_length() -> None:
    assert plain_request(b"GET / HTTP/1.1\r\n" + b"host:  \r\n" * 20_000 + b"!") is None
