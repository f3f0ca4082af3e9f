"""`@cache.memoize`: computed once for all nodes, and never kept beyond an invalidation."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesi_cache import CacheNode
from mesi_cache.core.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))

from embedded_nodes import key_at, nodes, until, until_it


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memoize")


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[list[CacheNode]]:
    async with nodes(2, tmp_path, lease_ms=500) as started:
        yield started


class Source:
    """What is memoized: counts its calls, and may be held up."""

    def __init__(self) -> None:
        self.calls = 0
        self.value: Any = "first"
        self.go = asyncio.Event()
        self.go.set()
        self.begun = asyncio.Event()

    async def load(self, name: str) -> Any:
        self.calls += 1
        value = self.value
        self.begun.set()
        await self.go.wait()
        if isinstance(value, Exception):
            raise value
        return value


async def test_a_stampede_is_one_call_whatever_the_node(pair: list[CacheNode]) -> None:
    source = Source()
    on = [node.memoize(ttl=60, prefix="one")(source.load) for node in pair]
    source.go.clear()
    calls = [asyncio.ensure_future(on[n % 2]("x")) for n in range(100)]
    await source.begun.wait()
    source.go.set()
    assert await asyncio.gather(*calls) == ["first"] * 100
    assert source.calls == 1
    assert [await load("x") for load in on] == ["first"] * 2
    await on[0]("y")
    assert source.calls == 2


async def test_a_result_computed_before_an_invalidation_is_not_kept(pair: list[CacheNode]) -> None:
    for at in (0, 1):  # invalidated where it is computed, and elsewhere
        source = Source()
        on = [node.memoize(prefix=f"old{at}")(source.load) for node in pair]
        source.go.clear()
        before = asyncio.ensure_future(on[0]("x"))
        await source.begun.wait()
        source.value = "second"
        assert await on[at].invalidate("x") is True
        after = [asyncio.ensure_future(load("x")) for load in on]
        await until(lambda s=source: s.calls == 2, "a new computation has begun")
        source.go.set()
        assert await before == "first"  # it asked before
        assert await asyncio.gather(*after) == ["second"] * 2
        assert [await load("x") for load in on] == ["second"] * 2
        assert source.calls == 2


async def test_none_is_kept_like_any_result(pair: list[CacheNode]) -> None:
    source = Source()
    source.value = None
    load = pair[0].memoize()(source.load)
    assert [await load("x") for _ in range(3)] == [None] * 3
    assert source.calls == 1


async def test_an_exception_goes_to_those_who_waited_and_is_not_kept(
    pair: list[CacheNode],
) -> None:
    source = Source()
    source.value = LookupError("no such thing")
    load = pair[0].memoize()(source.load)
    source.go.clear()
    calls = [asyncio.ensure_future(load("x")) for _ in range(5)]
    await source.begun.wait()
    await asyncio.sleep(0)
    source.go.set()
    failed = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(each, LookupError) for each in failed)
    source.value = "now there"
    assert await load("x") == "now there"


async def test_a_caller_that_leaves_does_not_take_the_result_with_it(
    pair: list[CacheNode],
) -> None:
    source = Source()
    load = pair[0].memoize()(source.load)
    source.go.clear()
    first = asyncio.ensure_future(load("x"))
    await source.begun.wait()
    second = asyncio.ensure_future(load("x"))
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.wait((first,))
    source.go.set()
    assert await second == "first"
    assert source.calls == 1


async def test_a_result_is_forgotten_when_its_time_is_over(pair: list[CacheNode]) -> None:
    source = Source()
    load = pair[0].memoize(ttl=0.2)(source.load)
    assert await load("x") == "first"
    source.value = "second"

    async def forgotten() -> bool:
        return await load("x") == "second"

    await until_it(forgotten, "it is computed anew")
    assert source.calls == 2


async def test_a_function_that_takes_longer_than_a_claim_keeps_it(
    pair: list[CacheNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesi_cache.memoize.CLAIM_S", 3.0)
    source = Source()
    on = [node.memoize(prefix="long")(source.load) for node in pair]
    source.go.clear()
    calls = [asyncio.ensure_future(load("x")) for load in on]
    await source.begun.wait()

    async def renewed() -> bool:
        marker = await pair[1].entry(on[1].key("x"))
        return bool(marker and marker.version > 1 and marker.ttl and marker.ttl > 2.1)

    await until_it(renewed, "the claim lives longer than it was made for")
    source.go.set()
    assert await asyncio.gather(*calls) == ["first"] * 2
    assert source.calls == 1


async def test_while_the_home_is_away_the_function_is_called_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesi_cache.node.Settings", partial(Settings, call_ms=1_000))
    async with nodes(2, tmp_path, lease_ms=300) as (a, b):
        source = Source()
        text = key_at([a, b], 1, prefix="away:").removeprefix("away:")
        load = a.memoize(prefix="away", key=lambda name: name)(source.load)
        assert load.key(text) == f"away:{text}"
        await b.stop()
        assert await asyncio.gather(load(text), load(text)) == ["first"] * 2
        assert source.calls == 2


def test_equal_calls_have_one_key_and_different_ones_have_not() -> None:
    cache = CacheNode(addr="127.0.0.1:9000")

    async def f(a: Any, b: Any = 2, *, c: Any = 3) -> None:
        """Never called."""

    g = cache.memoize()(f)
    same = {g.key(1), g.key(a=1), g.key(1, 2), g.key(1, b=2, c=3), g.key(c=3, a=1)}
    assert len(same) == 1
    different = [1, 1.0, "1", True, None, [1], {"a": 1}, "x" * 300, "x" * 301, "\x00"]
    assert len({g.key(each) for each in different}) == len(different)
    assert all(len(g.key(each).encode()) <= 256 for each in different)
    with pytest.raises(TypeError, match="key="):
        g.key(object())
    with pytest.raises(TypeError):
        cache.memoize()(print)  # type: ignore[arg-type]  # no coroutine function


async def test_a_result_may_have_a_type(pair: list[CacheNode]) -> None:
    class City(msgspec.Struct):
        name: str

    calls = 0

    @pair[0].memoize(type=City, prefix="typed")
    async def city(name: str) -> City:
        nonlocal calls
        calls += 1
        return City(name)

    assert [await city("x") for _ in range(2)] == [City("x")] * 2
    assert calls == 1
    await pair[1].set(city.key("x"), {"value": 7})  # what an older program may have left
    assert await city("x") == City("x")
    assert calls == 2


async def test_a_result_that_json_cannot_carry_is_said(pair: list[CacheNode]) -> None:
    source = Source()
    source.value = object()
    load = pair[0].memoize()(source.load)
    for _ in range(2):
        with pytest.raises(TypeError):
            await load("x")
    source.value = "fine"
    assert await load("x") == "fine"


async def test_a_claim_whose_owner_died_is_taken_over_when_its_time_is_over(
    pair: list[CacheNode],
) -> None:
    source = Source()
    load = pair[0].memoize(prefix="dead")(source.load)
    await pair[1].set(load.key("x"), {"pending": "of a process that is no more"}, ttl=0.5)
    assert await load("x") == "first"
    assert source.calls == 1


async def test_who_asks_after_an_invalidation_never_gets_what_is_older(tmp_path: Path) -> None:
    """Three nodes, a source that changes all the time, calls of all lengths."""
    rng = random.Random(11)
    async with nodes(3, tmp_path, capacity=2) as started:
        newest, invalidated, calls, kept = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0), 0, 0

        async def compute(name: str) -> int:
            nonlocal calls
            calls += 1
            value = newest[name]
            await asyncio.sleep(rng.choice((0, 0, 0.001, 0.01)))
            return value

        on = [
            node.memoize(prefix="stress", ttl=rng.choice((None, 0.05)))(compute) for node in started
        ]

        async def writer() -> None:
            for _ in range(120):
                name = rng.choice("abc")
                newest[name] += 1
                mine = newest[name]
                await rng.choice(on).invalidate(name)
                invalidated[name] = max(invalidated[name], mine)
                await asyncio.sleep(rng.choice((0, 0.002, 0.02)))

        async def reader() -> None:
            nonlocal kept
            while not writing.done():
                name = rng.choice("abc")
                before = invalidated[name]
                assert await rng.choice(on)(name) >= before
                kept += 1
                await asyncio.sleep(rng.choice((0, 0.001)))

        writing = asyncio.ensure_future(asyncio.gather(writer(), writer()))
        await asyncio.gather(writing, *(reader() for _ in range(12)))
        assert kept > calls > 0  # it is a cache after all
