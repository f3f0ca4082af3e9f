"""Load a cluster of this service on loopback and print what it does: `python bench/run.py --help`.

Starts three nodes with durable defaults in a scratch directory (or uses `--url`), runs each section
several times with a lean client, and prints medians: operations a second, p50 and p99 of a request,
and the CPU that a request costs on the queue's owner.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from lean_client import LeanClient

MAIN = Path(__file__).resolve().parents[1] / "main.py"
BATCH = 100


@dataclass
class Target:
    """The owner of a queue, and its process (None: not ours)."""

    address: str
    pid: int | None


def cpu_s(pid: int | None) -> float:
    """CPU seconds that a process has used (0 where that cannot be known)."""
    if pid is None or not sys.platform.startswith("linux"):
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def closed_loop(
    operation: Callable[[int], Awaitable[int]], clients: int, seconds: float
) -> tuple[float, list[float]]:
    """`clients` callers, each waiting for its answer; (messages a second, latencies in ms)."""
    latencies: list[float] = []
    done = 0
    stop = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        nonlocal done
        while (began := time.perf_counter()) < stop:
            count = await operation(number)
            done += count
            latencies.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(caller(n) for n in range(clients)))
    return done / (time.perf_counter() - began), latencies


class Load:
    """The sections. One queue, so one partition and one owner: the hardest case."""

    def __init__(self, target: Target, body_bytes: int) -> None:
        self.target = target
        self.body = "x" * body_bytes
        self.clients: list[LeanClient] = []

    async def connect(self, count: int) -> None:
        while len(self.clients) < count:
            self.clients.append(await LeanClient.connect(self.target.address))

    async def produce(self, number: int) -> int:
        body = b'{"queue":"bench","body":"%b"}' % self.body.encode()
        status, text = await self.clients[number].post(b"/produce", body)
        assert status == 201, (status, text)
        return 1

    async def produce_batch(self, number: int) -> int:
        one = b'{"body":"%b"}' % self.body.encode()
        body = b'{"queue":"bench","messages":[%b]}' % b",".join([one] * BATCH)
        status, text = await self.clients[number].post(b"/produce", body)
        assert status == 201, (status, text)
        return BATCH

    async def consume_ack(self, number: int) -> int:
        client = self.clients[number]
        status, text = await client.get(b"/consume?queue=bench")
        if status == 204:
            return 0
        message = json.loads(text)
        status, text = await client.post(
            b"/ack",
            b'{"message_id":"%b","receipt":"%b"}'
            % (message["id"].encode(), message["receipt"].encode()),
        )
        assert status == 200, (status, text)
        return 1

    async def consume_ack_batch(self, number: int) -> int:
        client = self.clients[number]
        status, text = await client.get(b"/consume?queue=bench&max=%d" % BATCH)
        if status == 204:
            return 0
        ids = [message["id"] for message in json.loads(text)["messages"]]
        status, text = await client.post(b"/ack", json.dumps({"message_ids": ids}).encode())
        assert status == 200, (status, text)
        return len(ids)

    async def end_to_end(self, number: int) -> int:
        await self.produce(number)
        return await self.consume_ack(number)

    async def measure(self, name: str, clients: int, seconds: float) -> tuple[str, list[float]]:
        operation: Callable[[int], Awaitable[int]] = getattr(self, name)
        await self.connect(clients)
        before = cpu_s(self.target.pid)
        rate, latencies = await closed_loop(operation, clients, seconds)
        used_us = (cpu_s(self.target.pid) - before) / max(1, len(latencies)) * 1e6
        latencies.sort()
        p50, p99 = latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]
        return name, [rate, p50, p99, used_us]


SECTIONS = (
    ("produce", 1),
    ("produce", 32),
    ("consume_ack", 32),
    ("end_to_end", 1),
    ("produce_batch", 8),
    ("consume_ack_batch", 8),
)


async def run(url: str, pids: dict[str, int], args: argparse.Namespace) -> None:
    """Every section, `--runs` times; the medians."""
    with urllib.request.urlopen(f"http://{url}/ring?queue=bench") as reply:  # noqa: ASYNC210 - once, before the load
        owner = json.load(reply)["partitions"][0]["owner"]
    load = Load(Target(owner, pids.get(owner)), args.body_bytes)
    print(f"{'section':<20}{'clients':>8}{'messages/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}")
    for name, clients in SECTIONS:
        if args.only and name not in args.only:
            continue
        rows = [(await load.measure(name, clients, args.seconds))[1] for _ in range(args.runs)]
        rate, p50, p99, used = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:<20}{clients:>8}{rate:>12,.0f}{p50:>9.2f}{p99:>9.2f}{used:>9.0f}")


def start(root: Path, port: int) -> tuple[list[subprocess.Popen[bytes]], list[str]]:
    """Three nodes with durable defaults."""
    addresses = [f"127.0.0.1:{port + n}" for n in range(3)]
    nodes = []
    for n, address in enumerate(addresses):
        with (root / f"node{n}.log").open("wb") as output:
            command = [sys.executable, str(MAIN), f"--id=node{n}", f"--addr={address}",
                       f"--peers={','.join(addresses)}", f"--dataDir={root}/data{n}"]  # fmt: skip
            nodes.append(subprocess.Popen(command, stderr=output))
    return nodes, addresses


def wait_ready(addresses: list[str]) -> None:
    """All nodes answer 200 on /readyz, within 20 s."""
    give_up = time.monotonic() + 20
    for address in addresses:
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}/readyz"):
                    break
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)


def main() -> None:
    """Start, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="host:port of a running node (default: start three)")
    parser.add_argument("--port", type=int, default=18400)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--body_bytes", type=int, default=256)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    factory = None
    if sys.platform != "win32":
        factory = import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        if args.url:
            runner.run(run(args.url, {}, args))
            return
        with tempfile.TemporaryDirectory(prefix="queue-bench-") as root:
            nodes, addresses = start(Path(root), args.port)
            try:
                wait_ready(addresses)
                pids = {a: node.pid for a, node in zip(addresses, nodes, strict=True)}
                runner.run(run(addresses[0], pids, args))
            finally:
                for node in nodes:
                    node.terminate()
                for node in nodes:
                    node.wait(10)


if __name__ == "__main__":
    main()
