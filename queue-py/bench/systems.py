"""Ours, behind the interface that the load drives, and what all systems share."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lean_client import LeanClient
from lean_stream import LeanStream

MAIN = Path(os.environ.get("QUEUE_MAIN", Path(__file__).resolve().parents[1] / "main.py"))
QUEUE = b"bench"
START_WITHIN_S = 90.0
ON_THEIR_WAY = 8
"""Acks of batches that a consumer does not wait for."""


class Session(ABC):
    """One client."""

    arrived_s = 0.0
    """When the last `take` had its messages (their acks follow)."""

    @abstractmethod
    async def produce(self, body: bytes) -> None:
        """Store one message, and wait for the confirmation."""

    @abstractmethod
    async def produce_many(self, bodies: list[bytes]) -> None:
        """Store several, and wait for all confirmations."""

    async def subscribe(self, prefetch: int, batch: int = 1) -> None:  # noqa: B027 - a system may have no use for it
        """Before `take`: hold up to `prefetch` messages, which come `batch` at a time."""

    @abstractmethod
    async def take(self, most: int, wait_s: float) -> list[bytes]:
        """Fetch up to `most` messages (more, if that is how they come) and ack them; as soon as
        there is one. What is returned is
        acked, and its ack confirmed where the system confirms acks at all: see `Acks`. [] after
        the wait, or while only acks that are on their way keep this from returning any."""

    @abstractmethod
    def close(self) -> None:
        """Hang up."""


class Acks:
    """Acks of batches on their way. A consumer of batches need not stand still for the confirmation
    of one while it has the next: it goes on as long as no more than `ON_THEIR_WAY` are. (One of
    single messages waits for each.) The same for every system that confirms acks."""

    def __init__(self, check: Callable[[Any], None] = lambda _: None) -> None:
        self._check = check
        self._under_way: deque[tuple[Awaitable[object], list[bytes]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    async def add(self, confirmed: Awaitable[object], messages: list[bytes]) -> list[bytes]:
        """One more; the messages of the oldest, confirmed, if it had to be waited for."""
        self._under_way.append((confirmed, messages))
        if len(messages) == 1 or len(self._under_way) > ON_THEIR_WAY:
            return await self.oldest()
        return []

    async def oldest(self) -> list[bytes]:
        """Wait for the oldest: its messages. [] if there is none."""
        if not self._under_way:
            return []
        confirmed, messages = self._under_way.popleft()
        self._check(await confirmed)
        return messages


class System(ABC):
    """A queueing system that runs in a scratch directory."""

    name: str
    durable = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    async def start(self) -> None:
        """Start it, return when it takes messages and everything is in its place."""

    async def restart(self) -> None:
        """Start it again, on what it has stored, return when it may take messages."""
        await self.start()

    @abstractmethod
    async def fresh(self) -> None:
        """Make the queue anew and empty."""

    @abstractmethod
    async def connect(self) -> Session:
        """A client."""

    @abstractmethod
    async def stored(self) -> int:
        """How many messages are ready."""

    def run(self, command: list[str], log: str, env: dict[str, str] | None = None) -> None:
        """Start a process of it."""
        with (self.root / log).open("ab") as output:
            self.processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, cwd=self.root,
                                 env={**os.environ, **(env or {})}, start_new_session=True)
            )  # fmt: skip

    def pids(self) -> list[int]:
        """Of all its processes, for their CPU time."""
        return [process.pid for process in self.processes]

    def kill(self) -> None:
        """kill -9, all at once."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End it."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        # Each has a session of its own: what it started goes with it.
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)
        self.processes.clear()


def cpu_s(pids: list[int]) -> float:
    """CPU seconds used by processes (0 where that cannot be known)."""
    if not sys.platform.startswith("linux"):
        return 0.0
    used = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def compiled(root: Path) -> dict[str, str]:
    """The environment of a node of ours: its modules are compiled once, as where it is installed,
    even if this shell forbids that (PYTHONDONTWRITEBYTECODE costs 0.25 s at each start)."""
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(root / "pycache")}


def installed(*commands: str) -> bool:
    """Whether all of them are there."""
    places = os.environ.get("PATH", "") + ":/usr/sbin:/usr/lib/rabbitmq/bin"
    return all(shutil.which(command, path=places) for command in commands)


async def listening(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens there."""
    give_up = time.monotonic() + START_WITHIN_S
    while True:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"{process.args} does not listen on {port}")
        await asyncio.sleep(0.01)


class Ours(System):
    """Three nodes with durable defaults; clients on `/stream` (or HTTP) at the queue's owner, or,
    with `forwarded`, at another node."""

    def __init__(
        self, root: Path, *, nodes: int = 3, http: bool = False, forwarded: bool = False,
        port: int = 18400,
    ) -> None:  # fmt: skip
        super().__init__(root)
        self.http = http
        self.forwarded = forwarded
        self.addresses = [f"127.0.0.1:{port + n}" for n in range(nodes)]
        self.name = "ours, HTTP" if http else "ours, forwarded" if forwarded else "ours"
        self.queue = QUEUE
        self.owner = self.addresses[0]

    async def start(self) -> None:
        await self._start(settled=True)

    async def restart(self) -> None:
        await self._start(settled=False)

    async def _start(self, settled: bool) -> None:
        for n, address in enumerate(self.addresses):
            self.run([sys.executable, str(MAIN), f"--id=node{n}", f"--addr={address}",
                      f"--peers={','.join(self.addresses)}", f"--dataDir={self.root}/data{n}"],
                     f"node{n}.log", compiled(self.root))  # fmt: skip
        for address, process in zip(self.addresses, self.processes, strict=True):
            await listening(int(address.rpartition(":")[2]), process)
        await self.find_owner(settled)

    async def find_owner(self, settled: bool = True) -> None:
        """Wait for an owner; `settled`: the preferred one, who takes over soon after a start."""
        give_up = time.monotonic() + START_WITHIN_S
        while time.monotonic() < give_up:
            for address in self.addresses:
                place = _get(address, f"/ring?queue={self.queue.decode()}")
                if place is None:
                    continue
                at = place["partitions"][0]
                if at["owner"] and (not settled or at["owner"] == at["replicas"][0]):
                    self.owner = at["owner"]
                    return
            await asyncio.sleep(0.005)
        raise RuntimeError("no owner")

    async def fresh(self) -> None:
        client = await LeanClient.connect(self.owner)
        status, text = await client.request(b"DELETE", b"/queues/%b/messages" % self.queue)
        assert status == 200, (status, text)
        client.close()

    async def connect(self) -> Session:
        others = [a for a in self.addresses if a != self.owner]
        address = others[0] if self.forwarded and others else self.owner
        if self.http:
            return _HttpSession(await LeanClient.connect(address), self.queue)
        return _StreamSession(await LeanStream.connect(address), self.queue)

    async def stored(self) -> int:
        shown = _get(self.owner, f"/queues/{self.queue.decode()}")
        return int(shown["ready"]) if shown else -1

    def owner_pid(self) -> int:
        """The process that owns the queue."""
        return self.processes[self.addresses.index(self.owner)].pid


class _StreamSession(Session):
    def __init__(self, stream: LeanStream, queue: bytes) -> None:
        self.stream = stream
        self.queue = queue
        self._acks = Acks(_acked)

    async def produce(self, body: bytes) -> None:
        status = await self.stream.ask(
            b'{"op":"produce","queue":"%b","body":"%b"' % (self.queue, body)
        )
        assert status == 201, status

    async def produce_many(self, bodies: list[bytes]) -> None:
        messages = b",".join([b'{"body":"%b"}' % body for body in bodies])
        status = await self.stream.ask(
            b'{"op":"produce","queue":"%b","messages":[%b]' % (self.queue, messages)
        )
        assert status == 201, status

    async def subscribe(self, prefetch: int, batch: int = 1) -> None:
        status = await self.stream.ask(
            b'{"op":"subscribe","queue":"%b","credit":%d'
            % (self.queue, max(batch, prefetch % batch))
        )
        assert status == 200, status
        self._subscription = self.stream.asked
        for _ in range(prefetch // batch - 1):
            self.stream.say(self._credit(batch))

    def _credit(self, count: int) -> bytes:
        return b'{"op":"credit","subscription":%d,"credit":%d}' % (self._subscription, count)

    async def take(self, most: int, wait_s: float) -> list[bytes]:
        stream = self.stream
        if self._acks and not stream.deliveries:
            return await self._acks.oldest()
        if not await stream.some(wait_s):
            return []
        self.arrived_s = time.perf_counter()
        receipt, messages = stream.deliveries.popleft()
        if len(messages) > most and (most == 1 or receipt is None):
            stream.deliveries.appendleft((None, messages[most:]))
            receipt, messages = None, messages[:most]
        if len(messages) == 1:
            one = messages[0]
            item = b'{"op":"ack","message_id":"%b","receipt":"%b"' % (
                one.id.encode(), one.receipt.encode())  # fmt: skip
        elif receipt is not None:
            item = b'{"op":"ack","delivery":"%b"' % receipt.encode()
        else:
            ids, receipts = [m.id for m in messages], [m.receipt for m in messages]
            fields = json.dumps({"op": "ack", "message_ids": ids, "receipts": receipts})
            item = fields[:-1].encode()
        acked = stream.ask(item, self._credit(len(messages)))
        return await self._acks.add(acked, [m.body.encode() for m in messages])

    def close(self) -> None:
        self.stream.close()


def _acked(status: int) -> None:
    assert status == 200, status


class _HttpSession(Session):
    def __init__(self, client: LeanClient, queue: bytes) -> None:
        self.client = client
        self.queue = queue
        self._held: list[dict[str, str]] = []

    async def produce(self, body: bytes) -> None:
        text = b'{"queue":"%b","body":"%b"}' % (self.queue, body)
        status, answer = await self.client.post(b"/produce", text)
        assert status == 201, (status, answer)

    async def produce_many(self, bodies: list[bytes]) -> None:
        messages = b",".join([b'{"body":"%b"}' % body for body in bodies])
        text = b'{"queue":"%b","messages":[%b]}' % (self.queue, messages)
        status, answer = await self.client.post(b"/produce", text)
        assert status == 201, (status, answer)

    async def take(self, most: int, wait_s: float) -> list[bytes]:
        if not self._held:
            path = b"/consume?queue=%b&max=%d&wait_ms=%d" % (self.queue, most, int(wait_s * 1000))
            self._keep(*await self.client.get(path))
        if not self._held:
            return []
        taken = self._held
        # One request settles these and fetches what is ready behind them.
        settle = {"message_ids": [m["id"] for m in taken],
                  "next": {"queue": self.queue.decode(), "max": most}}  # fmt: skip
        self._keep(*await self.client.post(b"/ack", json.dumps(settle).encode()))
        return [message["body"].encode() for message in taken]

    def _keep(self, status: int, text: bytes) -> None:
        assert status in (200, 204), (status, text)
        self._held = json.loads(text)["messages"] if status == 200 else []
        self.arrived_s = time.perf_counter()

    def close(self) -> None:
        self.client.close()


def _get(address: str, path: str) -> dict[str, object] | None:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=2) as reply:
            found: dict[str, object] = json.load(reply)
            return found
    except OSError:
        return None
