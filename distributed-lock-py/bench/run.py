"""How fast are three nodes on this machine? `python bench/run.py [--seconds 3] [--runs 3]`

Starts a durable three-node cluster on free ports, drives it with a lean client from a process of
its own, prints medians over the runs, and stops it. Figures from different machines or different
days do not compare; ratios within one run do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lean_client import LeanClient

MAIN = Path(__file__).resolve().parents[1] / "src" / "main.py"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def cluster(size: int, flags: list[str]) -> Iterator[list[str]]:
    """Yields the nodes' HTTP addresses, the leader's first."""
    ports = free_ports(2 * size)
    raft = [f"127.0.0.1:{port}" for port in ports[:size]]
    http = [f"127.0.0.1:{port}" for port in ports[size:]]
    with tempfile.TemporaryDirectory(prefix="lock-bench-", dir=Path.cwd()) as scratch:
        nodes = [
            subprocess.Popen(
                [sys.executable, str(MAIN), f"--id=node{i}", f"--raft_addr={raft[i]}",
                 f"--http_addr={http[i]}", f"--peers={','.join(raft)}",
                 f"--peer_http_addrs={','.join(http)}", f"--data_dir={scratch}/node{i}", *flags],
                stderr=subprocess.DEVNULL,
            )
            for i in range(size)
        ]  # fmt: skip
        try:
            leader = wait_for_leader(http)
            yield [leader, *(address for address in http if address != leader)]
        finally:
            for node in nodes:
                node.kill()
                node.wait()


def wait_for_leader(http: list[str]) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for address in http:
            with contextlib.suppress(urllib.error.URLError, OSError):
                status = json.load(urllib.request.urlopen(f"http://{address}/status", timeout=1))
                if status["state"] == "LEADER" and status["applied_index"] > 1:
                    return address
        time.sleep(0.05)
    raise SystemExit("no leader within 20 s")


class Load:
    """Counts what was done, and how long each took, until the time is over."""

    def __init__(self, address: str, seconds: float) -> None:
        self.address = address
        self.seconds = seconds
        self.took: list[float] = []

    async def drive(self, clients: int, work: Callable[[LeanClient, int], Awaitable[None]]) -> None:
        connections = [await LeanClient.connect(self.address) for _ in range(clients)]
        self._until = time.perf_counter() + self.seconds
        await asyncio.gather(*(self._loop(c, i, work) for i, c in enumerate(connections)))
        for connection in connections:
            connection.close()

    async def _loop(
        self, client: LeanClient, number: int, work: Callable[[LeanClient, int], Awaitable[None]]
    ) -> None:
        while (began := time.perf_counter()) < self._until:
            await work(client, number)
            self.took.append(time.perf_counter() - began)

    @property
    def per_second(self) -> float:
        return len(self.took) / self.seconds

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.took) * 1000


async def pair(client: LeanClient, number: int, lock: str | None = None) -> None:
    name = lock or f"lock-{number}"
    body = b'{"lock_name":"%s","client_id":"c%d"}' % (name.encode(), number)
    for path in (b"/acquire", b"/release"):
        status, answer = await client.post(path, body)
        if status != 200:
            raise SystemExit(f"{path.decode()}: {status} {answer.decode()}")


async def hand_over(client: LeanClient, number: int) -> None:
    await pair(client, number, "hot")


async def read(client: LeanClient, number: int) -> None:
    status, answer = await client.get(b"/locks/lock-%d" % number)
    if status != 200:
        raise SystemExit(f"/locks: {status} {answer.decode()}")


MEASURES = (
    ("acquire+release pairs/s, 32 clients, own locks", 32, pair, "per_second"),
    ("the same, 1 client, p50 ms", 1, pair, "p50_ms"),
    ("hand-overs/s, 8 clients, one lock", 8, hand_over, "per_second"),
    ("linearizable reads/s, 32 clients", 32, read, "per_second"),
)


def measure(seconds: float, runs: int, size: int, flags: list[str]) -> None:
    results: dict[str, list[float]] = {name: [] for name, *_ in MEASURES}
    for _ in range(runs):
        with cluster(size, flags) as addresses:
            for name, clients, work, figure in MEASURES:
                load = Load(addresses[0], seconds)
                with asyncio.Runner(loop_factory=fast_loop()) as runner:
                    runner.run(load.drive(clients, work))
                results[name].append(getattr(load, figure))
    for name, values in results.items():
        spread = f"({min(values):,.2f} to {max(values):,.2f})"
        print(f"{name:52} {statistics.median(values):10,.2f} {spread}")


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement (default 3)")
    parser.add_argument("--runs", type=int, default=3, help="clusters to measure (default 3)")
    parser.add_argument("--nodes", type=int, default=3, help="nodes in the cluster (default 3)")
    arguments, flags = parser.parse_known_args()
    measure(arguments.seconds, arguments.runs, arguments.nodes, flags)


if __name__ == "__main__":
    main()
