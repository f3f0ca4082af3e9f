"""Processes on virtual time: they sleep for nothing, stop, go on, and die without a last word."""

from __future__ import annotations

import asyncio
import time
from random import Random

import pytest

from testkit.sim.virtual_loop import Deadlock, VirtualLoop, current_process, run_virtually


async def beating(beats: list[float]) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            await asyncio.sleep(1)
            beats.append(loop.time())
    finally:
        beats.append(-1)


def test_an_hour_takes_no_time_and_blocking_calls_a_moment() -> None:
    async def main(loop: VirtualLoop) -> tuple[float, int]:
        await asyncio.sleep(3600)
        began_s = loop.time()
        assert await asyncio.to_thread(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        assert 0 < loop.time() - began_s < 0.01
        return loop.time(), loop.turns

    began_s = time.monotonic()
    now_s, turns = run_virtually(main, Random(1))
    assert now_s > 3600
    assert turns < 50
    assert time.monotonic() - began_s < 30


def test_a_paused_process_misses_its_time_and_a_killed_one_says_nothing() -> None:
    beats: list[float] = []

    async def main(loop: VirtualLoop) -> None:
        process = loop.process("p", offset_ms=500, drift=0.5)
        process.spawn(beating(beats))
        process.call(lambda: beats.append(-2 if current_process() is process else -3))
        await asyncio.sleep(2.5)
        assert beats == [-2, 1, 2]
        assert process.now_ms() == 500 + 3_750
        process.pause()
        await asyncio.sleep(5)
        assert beats == [-2, 1, 2]
        process.resume()
        await asyncio.sleep(1.2)
        assert beats == [-2, 1, 2, 7.5, 8.5]
        process.kill()
        await asyncio.sleep(5)

    run_virtually(main, Random(1))
    assert beats[:5] == [-2, 1, 2, 7.5, 8.5]
    assert -1 not in beats[:5]


def test_who_waits_for_ever_is_told() -> None:
    async def main(loop: VirtualLoop) -> None:
        await loop.create_future()

    with pytest.raises(Deadlock):
        run_virtually(main, Random(1))
