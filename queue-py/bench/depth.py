"""What depth costs: `python bench/depth.py --messages 1000000`.

Fills one queue (one partition, one owner: the hardest case) with messages of 1 KiB, prints the
memory of every node, kills all of them with SIGKILL, and measures how long it takes from the start
of the processes until a message can be consumed; then kills the owner alone, and measures how
fast the queue is consumed at that depth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from lean_client import LeanClient
from systems import compiled

MAIN = Path(__file__).resolve().parents[1] / "main.py"
BATCH = 100


class Nodes:
    """Three nodes as users start them."""

    def __init__(self, root: Path, flags: list[str]) -> None:
        self.root = root
        self.flags = flags
        ports = [free_port() for _ in range(3)]
        self.addresses = [f"127.0.0.1:{port}" for port in ports]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        log = (self.root / f"node{number}.log").open("ab")
        self.processes[number] = subprocess.Popen(
            [
                sys.executable, str(MAIN), f"--id=node{number}", f"--addr={self.addresses[number]}",
                f"--peers={','.join(self.addresses)}", f"--dataDir={self.root / f'data{number}'}",
                *self.flags,
            ],
            stderr=log, env={**os.environ, **compiled(self.root)},
        )  # fmt: skip

    def kill(self, number: int) -> None:
        process = self.processes.pop(number)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for number in list(self.processes):
            self.kill(number)

    def memory(self) -> str:
        """Resident memory of every node."""
        found = []
        for number, process in sorted(self.processes.items()):
            text = Path(f"/proc/{process.pid}/status").read_text()
            rss = int(text.split("VmRSS:")[1].split()[0]) // 1024
            peak = int(text.split("VmHWM:")[1].split()[0]) // 1024
            index = self.status(number)["storage"]["index_bytes"] >> 20
            found.append(f"node{number} {rss} MB (peak {peak}, index {index})")
        return ", ".join(found)

    def status(self, number: int) -> dict[str, dict[str, int]]:
        with urllib.request.urlopen(f"http://{self.addresses[number]}/status") as reply:
            found: dict[str, dict[str, int]] = json.load(reply)
        return found

    def owner(self, queue: str) -> int:
        """The queue's owner, as any node knows it."""
        while True:
            for number in self.processes:
                with contextlib.suppress(OSError):
                    url = f"http://{self.addresses[number]}/ring?queue={queue}"
                    with urllib.request.urlopen(url) as reply:
                        owner = json.load(reply)["partitions"][0]["owner"]
                    if owner in self.addresses and self.addresses.index(owner) in self.processes:
                        return self.addresses.index(owner)
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def fill(address: str, count: int, body_bytes: int) -> float:
    clients = [await LeanClient.connect(address) for _ in range(8)]
    one = b'{"body":"%b"}' % (b"x" * body_bytes)
    body = b'{"queue":"depth","messages":[%b]}' % b",".join([one] * BATCH)
    left = count // BATCH
    began_s = time.perf_counter()

    async def producer(client: LeanClient) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            status, text = await client.post(b"/produce", body)
            while status == 429:
                await asyncio.sleep(0.1)
                status, text = await client.post(b"/produce", body)
            assert status == 201, (status, text)

    await asyncio.gather(*map(producer, clients))
    for client in clients:
        client.close()
    return count / (time.perf_counter() - began_s)


async def first_message(address: str) -> None:
    """Return when a message was consumed (and given back)."""
    while True:
        with contextlib.suppress(OSError):
            client = await LeanClient.connect(address)
            status, text = await client.get(b"/consume?queue=depth&wait_ms=0")
            if status == 200:
                message = json.loads(text)
                await client.post(
                    b"/nack",
                    b'{"message_id":"%b","receipt":"%b"}'
                    % (message["id"].encode(), message["receipt"].encode()),
                )
                client.close()
                return
            client.close()
        await asyncio.sleep(0.01)


async def drain(address: str, clients_count: int, batch: int, seconds: float, most: int) -> float:
    """Messages consumed and acked a second, of so many at most: some are left for what follows."""
    clients = [await LeanClient.connect(address) for _ in range(clients_count)]
    done = 0
    began_s = time.perf_counter()

    async def consumer(client: LeanClient) -> None:
        nonlocal done
        while time.perf_counter() - began_s < seconds and done < most:
            status, text = await client.get(b"/consume?queue=depth&max=%d" % batch)
            if status == 204:
                return
            ids = [message["id"] for message in json.loads(text)["messages"]]
            status, text = await client.post(b"/ack", json.dumps({"message_ids": ids}).encode())
            assert status == 200, (status, text)
            done += len(ids)

    await asyncio.gather(*map(consumer, clients))
    for client in clients:
        client.close()
    return done / (time.perf_counter() - began_s)


async def run(nodes: Nodes, count: int, body_bytes: int) -> None:
    for number in range(3):
        nodes.start(number)
    nodes.owner("depth")
    await asyncio.sleep(5)  # partitions go to their best owners
    owner = nodes.owner("depth")
    print(f"empty:      {nodes.memory()}")
    rate = await fill(nodes.addresses[owner], count, body_bytes)
    print(f"filled:     {rate:,.0f}/s in batches of {BATCH}")
    print(f"{count:,} deep: {nodes.memory()}")
    await asyncio.sleep(2.5)
    for number in range(3):
        nodes.kill(number)
    began_s = time.perf_counter()
    print(f"            (started at {datetime.now(UTC):%H:%M:%S.%f})")
    for number in range(3):
        nodes.start(number)
    await asyncio.wait_for(first_message(nodes.addresses[0]), 60)
    print(f"back after kill -9 of all: {time.perf_counter() - began_s:.2f} s until consumed")
    owner = nodes.owner("depth")
    address = nodes.addresses[owner]
    print(f"consume:    {await drain(address, 8, BATCH, 3, count // 2):,.0f}/s, 8 x {BATCH}")
    print(f"consume:    {await drain(address, 8, 1, 3, count // 4):,.0f}/s, 8 x 1")
    print(f"restarted:  {nodes.memory()}")
    await asyncio.sleep(3)
    owner = nodes.owner("depth")
    began_s = time.perf_counter()
    nodes.kill(owner)
    await asyncio.wait_for(first_message(nodes.addresses[(owner + 1) % 3]), 60)
    print(f"owner killed: {time.perf_counter() - began_s:.2f} s until consumed from the next")
    print(f"figures:    {nodes.status((owner + 1) % 3)['storage']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--body_bytes", type=int, default=1024)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        nodes = Nodes(Path(root), flags)
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(run(nodes, args.messages, args.body_bytes))
            for log in sorted(Path(root).glob("node*.log")):
                lines = [
                    x
                    for x in log.read_text().splitlines()
                    if "recovered" in x or "ERROR" in x or "WARN" in x or "listening" in x
                ]
                print(log.stem, *lines[-6:], sep="\n  ")
        finally:
            nodes.stop()


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        return import_module("uvloop").Loop  # type: ignore[no-any-return]
    except ImportError:
        return None


if __name__ == "__main__":
    main()
