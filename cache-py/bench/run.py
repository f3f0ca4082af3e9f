"""Load three nodes of this service on loopback, print what they do: `python bench/run.py --help`.

Durable defaults in a scratch directory, a lean client, medians of several rounds. The floor beside
the hits is an aiohttp handler that answers a constant, measured in the same run by the same client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from lean_client import LeanClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mesi_cache.core.machine import Machine
from mesi_cache.core.records import Write
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Step

MAIN = Path(__file__).resolve().parents[1] / "main.py"
FLOOR = """
import sys
from aiohttp import web
try:
    import uvloop; uvloop.install()
except ImportError: pass
async def hello(request):
    return web.Response(body=b'{"key":"k","value":"x","state":"M","hit":true}',
                        content_type="application/json")
app = web.Application(); app.router.add_get("/read", hello)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """Three nodes and the floor, for the time of a `with`."""

    def __init__(self, root: Path, flags: list[str]) -> None:
        *ports, floor = free_ports(4)
        self.addresses = [f"127.0.0.1:{port}" for port in ports]
        self.floor = f"127.0.0.1:{floor}"
        self._children = [
            subprocess.Popen(
                [sys.executable, str(MAIN), f"--addr={address}", f"--id=node{name}",
                 "--capacity=10000", f"--data_dir={root / name}", "--log_level=warning",
                 "--peers=" + ",".join(f"http://{a}" for a in self.addresses if a != address),
                 *flags],
            )
            for name, address in zip("ABC", self.addresses, strict=True)
        ]  # fmt: skip
        self._children.append(subprocess.Popen([sys.executable, "-c", FLOOR, str(floor)]))

    def __enter__(self) -> Cluster:
        for address in self.addresses:
            _wait(lambda a=address: len(_json(a, "/status")["peers_connected"]) == 2)
        _wait(lambda: urllib.request.urlopen(f"http://{self.floor}/read").status == 200)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait()

    def keys_at(self, node: int, count: int, prefix: str) -> list[str]:
        """Keys whose home is `node`."""
        placement = Machine(Settings("x", 1), [f"http://{a}" for a in self.addresses], 1).placement
        member = f"http://{self.addresses[node]}"
        names = (f"{prefix}{number}" for number in range(1_000_000))
        return [key for key in names if placement.home(key) == member][:count]


def _json(address: str, path: str) -> dict[str, list[str]]:
    with urllib.request.urlopen(f"http://{address}{path}") as reply:
        answer: dict[str, list[str]] = json.load(reply)
        return answer


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.05)
    raise SystemExit("a node does not come up")


async def closed_loop(
    operation: Callable[[int], Awaitable[None]], clients: int, seconds: float
) -> tuple[float, float, float]:
    """`clients` callers, each waiting for its answer: (operations a second, p50 ms, p99 ms)."""
    latencies: list[float] = []
    stop = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        while (began := time.perf_counter()) < stop:
            await operation(number)
            latencies.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(caller(n) for n in range(clients)))
    rate = len(latencies) / (time.perf_counter() - began)
    latencies.sort()
    return rate, latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]


async def connect(address: str, count: int) -> list[LeanClient]:
    return [await LeanClient.connect(address) for _ in range(count)]


async def write(client: LeanClient, key: str, value: str = "x" * 64) -> None:
    status, body = await client.post(
        b"/write", b'{"key":"%b","value":"%b"}' % (key.encode(), value.encode())
    )
    if status != 200:
        raise SystemExit(f"write: {status} {body!r}")


async def read(client: LeanClient, key: str) -> None:
    status, body = await client.get(b"/read?key=" + key.encode())
    if status != 200:
        raise SystemExit(f"read: {status} {body!r}")


async def measure(cluster: Cluster, seconds: float, rounds: int) -> None:
    a = await connect(cluster.addresses[0], 64)
    b = await connect(cluster.addresses[1], 1)
    c = await connect(cluster.addresses[2], 1)
    floor = await connect(cluster.floor, 64)
    away = cluster.keys_at(1, 64, "away")  # node A's clients use keys of node B
    for client, key in zip(a, away, strict=True):
        await write(client, key)

    async def show(name: str, operation: Callable[[int], Awaitable[None]], clients: int) -> None:
        results = [await closed_loop(operation, clients, seconds) for _ in range(rounds)]
        rate, p50, p99 = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"{name:<58} {rate:>9,.0f}/s   p50 {p50:7.3f} ms   p99 {p99:7.3f} ms", flush=True)

    await show("aiohttp floor, 64 connections", lambda n: read(floor[n], "k"), 64)
    await show("read hit, 64 connections", lambda n: read(a[n], away[n]), 64)
    await show("aiohttp floor, 1 connection", lambda n: read(floor[n], "k"), 1)
    await show("read hit, 1 connection", lambda n: read(a[n], away[n]), 1)
    await show("write of an owned line (M), home elsewhere, 64 clients",
               lambda n: write(a[n], away[n]), 64)  # fmt: skip
    await show("write of an owned line (M), home elsewhere, 1 client",
               lambda n: write(a[n], away[n]), 1)  # fmt: skip
    fresh = iter(cluster.keys_at(1, 40_000, "miss"))
    batch: list[str] = [next(fresh) for _ in range(9_000)]
    for start in range(0, len(batch), 500):
        items = [{"key": key, "value": "x"} for key in batch[start : start + 500]]
        await b[0].post(b"/mwrite", json.dumps({"items": items}).encode())
    await asyncio.sleep(1.5)  # let it be stored
    todo = iter(batch)
    await show_once("read miss, remote home, owned by the home's own node",
                    lambda n: read(a[n], next(todo)), 4_000)  # fmt: skip
    key = away[0]

    async def shared(sharers: list[LeanClient], times: int) -> None:
        latencies = []
        for _ in range(times):
            for sharer in sharers:
                await read(sharer, key)
            began = time.perf_counter()
            await write(a[0], key)
            latencies.append((time.perf_counter() - began) * 1000)
        latencies.sort()
        print(f"write that invalidates {len(sharers)} sharer(s){'':<29} "
              f"{'':>9}     p50 {latencies[times // 2]:7.3f} ms   p99 "
              f"{latencies[times * 99 // 100]:7.3f} ms", flush=True)  # fmt: skip

    await shared([c[0]], 1_000)
    await shared([b[0], c[0]], 1_000)


async def show_once(name: str, operation: Callable[[int], Awaitable[None]], times: int) -> None:
    """A section that uses up its keys."""
    latencies = []
    for _ in range(times):
        began = time.perf_counter()
        await operation(0)
        latencies.append((time.perf_counter() - began) * 1000)
    latencies.sort()
    print(f"{name:<58} {1000 * times / sum(latencies):>9,.0f}/s   p50 {latencies[times // 2]:7.3f}"
          f" ms   p99 {latencies[times * 99 // 100]:7.3f} ms", flush=True)  # fmt: skip


def in_process() -> None:
    """What a hit costs inside the process: one dictionary look-up, the lease, the LRU order."""
    machine = Machine(Settings("x", 100_000), ["x"], 1)
    for number in range(100_000):
        step = Step(0.0, 0.0)
        machine.cache.submit(step, f"k{number}", Write(b"1"))
        while step.send or step.load:
            after = Step(0.0, 0.0)
            for _, message in step.send:
                machine.receive(after, "x", 1, message)
            for key in step.load:
                machine.loaded(after, key, None)
            step = after
    keys = [f"k{number}" for number in range(0, 100_000, 7)]
    began = time.perf_counter()
    for key in keys:
        machine.cache.lookup(key, 1.0)
    print(f"{'look-up of a hit in the core, 100,000 lines':<58} "
          f"{(time.perf_counter() - began) / len(keys) * 1e6:.2f} µs")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round (2)")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many (3)")
    parser.add_argument("flags", nargs="*", help="more flags for the nodes, after --")
    args = parser.parse_args()
    in_process()
    with tempfile.TemporaryDirectory() as root, Cluster(Path(root), args.flags) as cluster:
        work = measure(cluster, args.seconds, args.rounds)
        try:
            runner = asyncio.Runner(loop_factory=import_module("uvloop").new_event_loop)
        except ImportError:
            runner = asyncio.Runner()
        with runner:
            runner.run(work)


if __name__ == "__main__":
    main()
