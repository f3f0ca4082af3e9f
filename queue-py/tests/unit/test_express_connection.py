"""A connection whose requests take either way: their order, hanging up, slow readers, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from express_calls import Served, Wire, assert_alike, connected, serving, until
from express_requests import HEAD, LONG, NEXT, SHORT, WAIT, ack, get, post, produce

from message_queue.core.operations import Answer, Produce, Results

STORED = Answer(201, b'{"id":"i","queue":"wait","status":"created"}')
SETTLED = Answer(200, msgspec.msgpack.encode(Results((200,))))
READY = get(b"/consume?queue=ready")
POLL = get(b"/consume?queue=wait&wait_ms=20000")


async def _begun(served: Served, wire: Wire, request: bytes) -> Callable[[Answer], None]:
    """Send a request that waits; what answers it."""
    wire.writer.write(request)
    async with asyncio.timeout(20):
        return await served.node.waiting.get()


# ── order ───────────────────────────────────────────────────────────────────────────────────────


async def test_pipelined_requests_of_all_kinds_are_answered_alike_however_they_are_cut(
    tmp_path: Path,
) -> None:
    rng = random.Random(int(os.environ.get("FUZZ_SEED", "7")))
    kept = [each for each in LONG.values() if b"chunked" not in each and b"Expect" not in each]
    async with (
        serving(tmp_path / "0") as short,
        serving(tmp_path / "1", short=False) as long,
    ):
        for _ in range(int(os.environ.get("FUZZ", "20"))):
            several = [rng.choice(list(SHORT.values())) for _ in range(rng.randrange(2, 9))]
            if rng.random() < 0.5:
                several[rng.randrange(len(several))] = rng.choice(kept)
            raw = b"".join(several)
            cut = rng.choice((0, rng.randrange(len(raw))))
            chunks = [raw[:cut], raw[cut:]] if cut else [raw]
            await assert_alike(short, long, chunks)
        assert len(short.taken) > len(short.connections)
        assert not long.taken


async def test_what_comes_while_a_request_waits_is_asked_after_its_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, connected(served) as wire:
        answer = await _begun(served, wire, produce("wait"))
        wire.writer.write(READY + produce("q") + get(b"/status"))
        await until(lambda: len(served.connections[0]._messages) == 3)
        assert [type(op) for op in served.node.asked] == [Produce]
        answer(STORED)
        # An owner in the middle of telling its answers is not asked the next thing.
        assert len(served.node.asked) == 1
        heads = [(await wire.answer())[0] for _ in range(4)]
        assert heads == [b"HTTP/1.1 201 Created", b"HTTP/1.1 200 OK", b"HTTP/1.1 201 Created",
                         b"HTTP/1.1 200 OK"]  # fmt: skip
        assert [each.path for each in served.taken] == ["/produce", "/consume?queue=ready",
                                                        "/produce"]  # fmt: skip


async def test_a_body_in_pieces_is_asked_when_it_is_whole_and_no_piece_is_a_request(
    tmp_path: Path,
) -> None:
    inner = produce("smuggled")
    request = post(b"/produce", {"queue": "q", "body": inner.decode()})
    outer = b"POST /produce HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (HEAD, len(inner))
    async with serving(tmp_path) as served, connected(served) as wire:
        for cut in (len(request) - 300, len(request) - 1, request.find(b"POST", 9)):
            assert (await wire.ask(request[:cut], request[cut:]))[0] == b"HTTP/1.1 201 Created"
        assert len(served.taken) == len(served.node.asked) == 3
        assert (await wire.ask(outer, inner))[0] == b"HTTP/1.1 400 Bad Request"
        assert (await wire.ask(READY))[0] == b"HTTP/1.1 200 OK"
        assert [getattr(op, "queue", "") for op in served.node.asked] == ["q"] * 3 + ["ready"]


async def test_who_goes_away_in_the_middle_of_a_body_has_asked_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with connected(served) as wire:
            wire.writer.write(produce("q")[:-4])
            await until(lambda: served.taken)
        await until(lambda: served.connections[0].transport is None)
        assert served.node.asked == []


# ── hanging up ──────────────────────────────────────────────────────────────────────────────────


async def test_a_poll_whose_client_is_gone_is_over_and_has_leased_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with connected(served) as wire:
            await _begun(served, wire, POLL)
            assert served.node.polls == 1
        await until(lambda: not served.node.polls)
        assert served.node.leased == 0
        assert served.node.metrics.errors == 0


async def test_a_message_granted_in_the_moment_of_hanging_up_goes_back(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with connected(served) as wire:
            answer = await _begun(served, wire, POLL)
            transport = served.connections[0].transport
            assert transport is not None
            answer(Answer(200))
            transport.abort()  # nobody was told yet
            assert served.node.polls == 1
            await until(lambda: not served.node.polls)
            await until(lambda: served.connections[0].transport is None)
            assert served.node.leased == 0
        async with connected(served) as wire:
            answer = await _begun(served, wire, ack((WAIT, 1), next=NEXT))
            transport = served.connections[1].transport
            assert transport is not None
            answer(SETTLED)
            transport.abort()
            await until(lambda: served.connections[1].transport is None)
            assert served.node.leased == 0
            assert served.node.metrics.acked == 1


async def test_an_answer_for_who_is_gone_is_dropped_and_the_next_client_is_served(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served:
        async with connected(served) as wire:
            answer = await _begun(served, wire, produce("wait"))
            wire.writer.write(READY)
        await until(lambda: served.connections[0].transport is None)
        answer(STORED)
        async with connected(served) as wire:
            assert (await wire.ask(READY))[0] == b"HTTP/1.1 200 OK"
        assert len(served.node.asked) == 2


# ── who does not read ───────────────────────────────────────────────────────────────────────────


async def test_a_client_that_does_not_read_is_not_written_to_without_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.node.body = b'"%b"' % (b"x" * 300_000)
        async with connected(served) as wire:
            mine = served.connections[0]
            assert mine.transport is not None
            mine.transport.set_write_buffer_limits(high=100_000)
            wire.writer.write(READY * 120)
            await until(lambda: mine._paused)
            await asyncio.sleep(0.05)
            assert len(served.node.asked) < 80
            assert mine.transport.get_write_buffer_size() < 500_000
            assert len(mine._messages) <= 64
            for _ in range(120):
                assert (await wire.answer())[0] == b"HTTP/1.1 200 OK"
            assert len(served.taken) == 120, "all of them took the short way"


# ── mistakes of ours ────────────────────────────────────────────────────────────────────────────


async def test_an_unexpected_exception_is_a_logged_500_and_the_connection_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as served, connected(served) as wire:
        for request in ("a crash", "consume crashes", "ack and fetch crashes", "ack, nonsense",
                        "acks, one nonsense", "an owner that answers nonsense"):  # fmt: skip
            caplog.clear()
            first, headers, body = await wire.ask(SHORT[request])
            assert first == b"HTTP/1.1 500 Internal Server Error"
            assert headers[b"x-request-id"] == b"r-1"
            assert body == b'{"error":"Internal error","definite":false}'
            (told,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
            assert "unexpected error in" in told.getMessage()
            assert "(request r-1)" in told.getMessage()
            assert told.exc_info is not None
        assert served.node.metrics.errors == 6
        assert (await wire.ask(READY))[0] == b"HTTP/1.1 200 OK"
        assert len(served.taken) == 7


# ── its end ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_idle_connection_is_closed_and_one_that_waits_for_its_answer_is_not(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served, connected(served) as wire:
        (mine,) = served.connections

        def time_is_over() -> None:
            mine._next_keepalive_close_time = 0.0
            mine._process_keepalive()

        answer = await _begun(served, wire, produce("wait"))
        time_is_over()
        answer(STORED)
        assert (await wire.answer())[0] == b"HTTP/1.1 201 Created"
        mine._process_keepalive()  # it counts from the answer on
        assert (await wire.ask(READY))[0] == b"HTTP/1.1 200 OK"
        time_is_over()
        async with asyncio.timeout(20):
            assert await wire.reader.read() == b""


async def test_a_node_that_stops_answers_what_is_under_way_and_closes(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as served,
        connected(served) as one,
        connected(served) as idle,
        connected(served) as half,
    ):
        answer = await _begun(served, one, produce("wait"))
        one.writer.write(produce("q"))
        half.writer.write(produce("q")[:-5])
        await until(lambda: len(served.taken) == 2)
        stopping = asyncio.ensure_future(served.runner.cleanup())
        await until(lambda: all(each._close for each in served.connections))
        answer(STORED)
        assert (await one.answer())[0] == b"HTTP/1.1 201 Created"
        async with asyncio.timeout(20):
            for each in (one, idle, half):
                assert await each.reader.read() == b"", "and no more"
            await stopping
        assert len(served.node.asked) == 1


async def test_a_poll_that_outlasts_a_stop_is_cut_off_and_has_leased_nothing(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served, connected(served) as wire:
        await _begun(served, wire, POLL)
        await served.connections[0].shutdown(0.05)
        async with asyncio.timeout(20):
            assert await wire.reader.read() == b""
        await until(lambda: not served.node.polls)
        assert served.node.leased == 0
