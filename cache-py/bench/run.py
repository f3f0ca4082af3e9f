"""Our nodes beside Redis and memcached, in one run on this machine: `python bench/run.py --help`.

Parts: hits, writes, misses, invalidation, inside (the same process), zipf, growth. Every round does
each line of a part once; printed are medians of the rounds, and ratios. The floor is an aiohttp
handler that answers a constant, asked by the same lean client. Without a peer its lines are left
out. Ours are durable (every change is logged at its home); Redis and memcached write no disk here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from importlib import import_module
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from figures import Figure, Table, closed_loop, median, of, show, show_latency
from lean_client import LeanClient
from nodes import Floor, Nodes, connect, free_ports, read, write
from peers import Memcached, RawMemcached, RawRedis, Redis

from mesi_cache import CacheNode

VALUE = b"x" * 64


class Bench:
    """What all parts share."""

    def __init__(self, seconds: float, rounds: int, flags: list[str]) -> None:
        self.seconds = seconds
        self.rounds = rounds
        self.flags = flags

    def table(self) -> Table:
        return Table(self.seconds, self.rounds)


def root_of(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def redis_py() -> Any:
    """The redis package with hiredis, or None."""
    try:
        import_module("hiredis")
        return import_module("redis")
    except ImportError:
        return None


# --- hits and writes beside the peers -------------------------------------------------------------


async def beside(
    bench: Bench, stack: ExitStack, operation: Callable[[LeanClient, str], Awaitable[None]],
    verb: str, what: str,
) -> None:  # fmt: skip
    """One operation by 64 clients and by one: floor, ours, Redis, memcached."""
    nodes = stack.enter_context(Nodes(root_of(stack), 3, bench.flags))
    keys = nodes.keys_at(1, 64, "away")  # node 0's clients use keys whose home is node 1
    clients = await connect(nodes.addresses[0], 64)
    for client, key in zip(clients, keys, strict=True):
        await write(client, key)
    base = stack.enter_context(Floor())
    floors = await connect(base.address, 64)
    peers: dict[str, list[Any]] = {}
    if Redis.available():
        server = stack.enter_context(Redis(root_of(stack)))
        peers["Redis, raw RESP"] = list(await RawRedis.connect(server.port, 64))
        package = redis_py()
        if package is not None:
            peers["Redis, redis-py + hiredis"] = [
                package.asyncio.Redis(port=server.port, single_connection_client=True)
                for _ in range(64)
            ]
    if Memcached.available():
        server_m = stack.enter_context(Memcached())
        peers["memcached, raw"] = list(await RawMemcached.connect(server_m.port, 64))
    for of_peer in peers.values():
        for number, client in enumerate(of_peer):
            await client.set(f"k{number}", VALUE)
    for many in (64, 1):
        table = bench.table()
        table.add("aiohttp floor", lambda n: operation(floors[n], "k"), many)
        table.add(what, lambda n: operation(clients[n], keys[n]), many)
        for name, of_peer in peers.items():
            table.add(f"{name} {verb}", _peer(of_peer, verb), many)
        figures = await table.measure()
        base_figure, mine = figures["aiohttp floor"], figures[what]
        print(f"-- {many} client{'s' if many > 1 else ''}")
        for name, figure in figures.items():
            show(name, figure, {"floor": base_figure} if figure is mine else {"ours": mine})
    for client in peers.get("Redis, redis-py + hiredis", ()):
        await client.aclose()


def _peer(clients: list[Any], verb: str) -> Callable[[int], Awaitable[object]]:
    if verb == "GET":
        return lambda n: clients[n].get(f"k{n}")
    return lambda n: clients[n].set(f"k{n}", VALUE)


async def hits(bench: Bench, stack: ExitStack) -> None:
    await beside(bench, stack, read, "GET", "read hit")


async def writes(bench: Bench, stack: ExitStack) -> None:
    await beside(bench, stack, write, "SET", "write of an owned line (M), home elsewhere")


# --- what only a coherent cache does --------------------------------------------------------------


async def one_by_one(operation: Callable[[str], Awaitable[None]], keys: list[str]) -> Figure:
    """A section that uses up its keys."""
    latencies = []
    for key in keys:
        began = time.perf_counter()
        await operation(key)
        latencies.append((time.perf_counter() - began) * 1000)
    return of(latencies)


async def fill(client: LeanClient, keys: list[str]) -> None:
    for start in range(0, len(keys), 500):
        items = [{"key": key, "value": "x"} for key in keys[start : start + 500]]
        status, _ = await client.post(b"/mwrite", json.dumps({"items": items}).encode())
        assert status == 200


class Beside:
    """The floor for one client, measured anew before each line: what the machine does just now."""

    def __init__(
        self,
        bench: Bench,
        stack: ExitStack,
        operation: Callable[[LeanClient, str], Awaitable[None]],
    ) -> None:
        self._address = stack.enter_context(Floor()).address
        self._seconds = bench.seconds / 2
        self._operation = operation
        self._client: LeanClient | None = None

    async def floor(self) -> Figure:
        client = self._client = self._client or (await connect(self._address, 1))[0]
        return await closed_loop(lambda _: self._operation(client, "k"), 1, self._seconds)

    async def show(self, name: str, figure: Awaitable[Figure]) -> None:
        base, mine = await self.floor(), await figure
        times = mine.p50_ms / base.p50_ms
        show_latency(name, mine, f"{times:4.1f}x floor ({base.p50_ms:.3f} ms)")


async def misses(bench: Bench, stack: ExitStack) -> None:
    count = int(600 * bench.seconds) + 100
    root = root_of(stack)
    nodes = stack.enter_context(Nodes(root, 3, ["--capacity=100", *bench.flags]))
    a, b, c = [(await connect(address, 1))[0] for address in nodes.addresses]
    clean = nodes.keys_at(1, count, "clean")
    await fill(b, clean)
    await fill(b, nodes.keys_at(1, 200, "other"))  # puts the first ones back
    await asyncio.sleep(1.5)  # and lets them be stored
    beside = Beside(bench, stack, read)
    await beside.show("miss, home elsewhere, clean", one_by_one(_by(read, a), clean))
    await beside.show("miss, home elsewhere, another sharer", one_by_one(_by(read, c), clean[-60:]))
    owned = nodes.keys_at(1, count, "owned")

    async def taken_over() -> Figure:
        parts: list[Figure] = []
        for start in range(0, count, 50):
            part = owned[start : start + 50]
            await fill(c, part)
            parts.append(await one_by_one(_by(read, a), part))
        return median(parts)

    await beside.show("miss, home elsewhere, owned by a third node (M)", taken_over())
    absent = nodes.keys_at(1, count, "absent")
    await beside.show(
        "miss, absent: the store's file is asked", one_by_one(_by(_read_none, a), absent)
    )


async def _read_none(client: LeanClient, key: str) -> None:
    status, _ = await client.get(b"/read?key=" + key.encode())
    assert status == 404


def _by(
    operation: Callable[[LeanClient, str], Awaitable[None]], client: LeanClient
) -> Callable[[str], Awaitable[None]]:
    return lambda key: operation(client, key)


async def invalidation(bench: Bench, stack: ExitStack) -> None:
    """Write → gone from the other caches. Ours is gone before the answer; redis-py's is not."""
    times = int(400 * bench.seconds) + 50
    nodes = stack.enter_context(Nodes(root_of(stack), 5, bench.flags))
    clients = [(await connect(address, 1))[0] for address in nodes.addresses]
    (key,) = nodes.keys_at(4, 1, "shared")
    writer = clients[0]
    await write(writer, key)
    beside = Beside(bench, stack, write)

    async def gone_from(sharers: int) -> Figure:
        latencies = []
        for _ in range(times):
            for sharer in clients[1 : 1 + sharers]:
                await read(sharer, key)
            began = time.perf_counter()
            await write(writer, key)
            latencies.append((time.perf_counter() - began) * 1000)
        return of(latencies)

    for sharers in (0, 1, 2, 4):
        await beside.show(f"write, gone from {sharers} other caches", gone_from(sharers))
    package = redis_py()
    if Redis.available() and package is not None:
        server = stack.enter_context(Redis(root_of(stack)))
        show("Redis SET → seen by redis-py's client-side cache",
             _client_side_invalidation(package, server.port, times))  # fmt: skip


def _client_side(package: Any, port: int, most: int) -> Any:
    # redis-py asks for 7.4 before it caches; what it needs, RESP3's CLIENT TRACKING, is in 7.0.
    connection = import_module("redis.connection")
    connection.CacheProxyConnection.MIN_ALLOWED_VERSION = "6.0.0"
    config = import_module("redis.cache").CacheConfig(max_size=most)
    return package.Redis(port=port, protocol=3, cache_config=config)


def _client_side_invalidation(package: Any, port: int, times: int) -> Figure:
    caching, plain = _client_side(package, port, 10_000), package.Redis(port=port)
    plain.set("h", b"0")
    latencies = []
    for number in range(times):
        caching.get("h")
        value = b"v%d" % number
        began = time.perf_counter()
        plain.set("h", value)
        while caching.get("h") != value:
            pass
        latencies.append((time.perf_counter() - began) * 1000)
    return of(latencies)


# --- inside one process ---------------------------------------------------------------------------


async def inside(bench: Bench, stack: ExitStack) -> None:
    times = int(20_000 * bench.seconds)
    (port,) = free_ports(1)
    lines: dict[str, Figure] = {}
    async with CacheNode(f"127.0.0.1:{port}", data_dir=root_of(stack) / "in") as cache:
        await cache.set("h", "x" * 64)
        get = cache.get
        latencies = []
        for _ in range(times):
            began = time.perf_counter()
            await get("h")
            latencies.append((time.perf_counter() - began) * 1000)
        lines["await cache.get(k), a hit"] = of(latencies)
    package = redis_py()
    if Redis.available() and package is not None:
        server = stack.enter_context(Redis(root_of(stack)))
        caching = _client_side(package, server.port, 10_000)
        caching.set("h", VALUE)
        latencies = []
        for _ in range(times):
            began = time.perf_counter()
            caching.get("h")
            latencies.append((time.perf_counter() - began) * 1000)
        lines["redis-py client-side cache, a hit"] = of(latencies)
        plain = package.asyncio.Redis(port=server.port, single_connection_client=True)
        latencies = []
        for _ in range(times // 10):
            began = time.perf_counter()
            await plain.get("h")
            latencies.append((time.perf_counter() - began) * 1000)
        await plain.aclose()
        lines["redis-py asyncio GET"] = of(latencies)
    mine = next(iter(lines.values()))
    for name, figure in lines.items():
        show_latency(name, figure, f"{figure.p50_ms / mine.p50_ms:.1f}x ours", unit="µs")


async def zipf(bench: Bench, stack: ExitStack) -> None:
    """Hit ratios on one Zipf trace (s = 0.9): 10,000 keys, 1,000 lines."""
    keys, slots = 10_000, 1_000
    rng = random.Random(5)
    weights = list(accumulate(1 / rank**0.9 for rank in range(1, keys + 1)))
    trace = rng.choices(range(keys), cum_weights=weights, k=int(30_000 * bench.seconds))
    exact: OrderedDict[int, None] = OrderedDict()
    found = 0
    for key in trace:
        if key in exact:
            found += 1
            exact.move_to_end(key)
        else:
            exact[key] = None
            if len(exact) > slots:
                exact.popitem(last=False)
    print(f"{'exact LRU, by a model':<52} {100 * found / len(trace):6.1f} % hits")
    for policy in ("lru", "s3fifo"):
        (port,) = free_ports(1)
        async with CacheNode(
            f"127.0.0.1:{port}", data_dir=root_of(stack) / policy, capacity=slots, policy=policy
        ) as cache:
            for start in range(0, keys, 500):
                await cache.set_many({f"z{key}": key for key in range(start, start + 500)})
            before = _hits_of(cache)
            for key in trace:
                await cache.get(f"z{key}")
            got = _hits_of(cache) - before
            print(f"{f'ours, --policy={policy}':<52} {100 * got / len(trace):6.1f} % hits")


def _hits_of(cache: CacheNode) -> int:
    hits = cache.metrics()["hits"]
    assert isinstance(hits, int)
    return hits


async def growth(bench: Bench, stack: ExitStack) -> None:
    """The same work on 1, 3 and 5 nodes, all on this machine's cores."""
    for size in (1, 3, 5):
        with ExitStack() as inner:
            nodes = inner.enter_context(Nodes(root_of(inner), size, bench.flags))
            figures = await _grown(bench, nodes, 1 % size)
        for name, figure in figures.items():
            show(f"{size} node{'s' if size > 1 else ''}: {name}", figure)


async def _grown(bench: Bench, nodes: Nodes, home: int) -> dict[str, Figure]:
    keys = nodes.keys_at(home, 64, "grow")
    clients = await connect(nodes.addresses[0], 64)
    for client, key in zip(clients, keys, strict=True):
        await write(client, key)
    numbers = count()
    table = bench.table()
    table.add("read hit, 64 clients", lambda n: read(clients[n], keys[n]), 64)
    table.add("write M, 64 clients", lambda n: write(clients[n], keys[n]), 64)
    table.add("write M, 1 client", lambda n: write(clients[n], keys[n]), 1)
    table.add("first write, 64 clients", lambda n: write(clients[n], f"n{next(numbers)}"), 64)
    return await table.measure()


PARTS: dict[str, Callable[[Bench, ExitStack], Awaitable[None]]] = {
    "hits": hits,
    "writes": writes,
    "misses": misses,
    "invalidation": invalidation,
    "inside": inside,
    "zipf": zipf,
    "growth": growth,
}


async def main_async(parts: list[str], bench: Bench) -> None:
    for part in parts:
        print(f"\n{part}", flush=True)
        with ExitStack() as stack:
            await PARTS[part](bench, stack)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, by comma")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round (1)")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many (3)")
    parser.add_argument("--quick", action="store_true", help="one round of 0.3 s")
    parser.add_argument("flags", nargs="*", help="more flags for our nodes, after --")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    seconds, rounds = (0.3, 1) if arguments.quick else (arguments.seconds, arguments.rounds)
    try:
        runner = asyncio.Runner(loop_factory=import_module("uvloop").new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        runner.run(main_async(parts, Bench(seconds, rounds, arguments.flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
