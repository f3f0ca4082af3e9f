"""What every lock service under measurement can do for the bench."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from lean_client import LeanClient
from load import Sample, closed_loop, fast_loop, sample

from processes import Server


class Contender(ABC):
    """Three nodes (or `size`) on this machine, started by `start`, ended by `stop`."""

    name = ""
    note = ""  # what a reader of the table must know

    def __init__(self, scratch: Path, size: int = 3) -> None:
        self.scratch = scratch / self.name
        self.scratch.mkdir(parents=True)
        self.size = size
        self.nodes: list[Server | None] = [None] * size

    @abstractmethod
    def start(self) -> None:
        """Starts all nodes and returns when they serve."""

    @abstractmethod
    def leader(self) -> int | None:
        """Which node leads; None: nobody, or not known."""

    @abstractmethod
    def restart(self, node: int) -> None:
        """Starts a killed node again and returns when it takes part."""

    @abstractmethod
    def pairs(self, clients: int, seconds: float) -> Sample:
        """Acquire and release, each client its own lock."""

    @abstractmethod
    def hand_overs(self, clients: int, seconds: float) -> Sample:
        """Acquire and release, all clients the same lock."""

    def reads(self, clients: int, seconds: float) -> Sample | None:
        """Linearizable reads of one lock (or key); None: it has no such thing."""
        del clients, seconds
        return None

    @abstractmethod
    def successes_around_kill(self, before_s: float, after_s: float) -> tuple[float, list[float]]:
        """Clients at work on the other nodes; the leader is killed. Returns when that was and
        when pairs were completed, on time.perf_counter's clock."""

    def stop(self) -> None:
        for node in self.nodes:
            if node is not None and node.alive:
                node.kill()

    def cpu_s(self) -> float:
        return sum(node.cpu_s() for node in self.nodes if node is not None)


class HttpContender(Contender):
    """A service driven by lean HTTP clients on its leader."""

    def run_on(
        self,
        addresses: Sequence[str],
        clients: int,
        seconds: float,
        work_of: Callable[[LeanClient, int], Awaitable[Callable[[], Awaitable[None]]]],
    ) -> Sample:
        """Drives `clients` connections, spread over `addresses`; `work_of(connection, number)`
        prepares what one of them repeats."""

        async def drive() -> Sample:
            connections = [
                await LeanClient.connect(addresses[i % len(addresses)]) for i in range(clients)
            ]
            works = [await work_of(c, i) for i, c in enumerate(connections)]
            cpu_before = self.cpu_s()
            took, elapsed = await closed_loop(works, seconds)
            cpu = self.cpu_s() - cpu_before
            for connection in connections:
                connection.close()
            return sample(took, elapsed, cpu)

        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            return runner.run(drive())


def expect_ok(answer: tuple[int, bytes], what: str) -> bytes:
    """The body of a 200; a bench that measures failures measures nothing."""
    status, body = answer
    if status != 200:
        raise RuntimeError(f"{what}: {status} {body.decode(errors='replace')[:300]}")
    return body
