"""N nodes of one service, started as users start them, with a breakable link per ordered pair."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testkit.cluster.http import HttpClient, unverified
from testkit.cluster.ports import Reservation
from testkit.cluster.process import DEADLINE_S, NodeProcess
from testkit.cluster.proxy import LinkProxy

HTTP: Final = "http"


@dataclass(frozen=True, slots=True)
class NodeView:
    """What one node is told: its own addresses, and how it reaches the others."""

    index: int
    size: int
    data_dir: Path
    _real: Mapping[tuple[int, str], str]
    _dial: Mapping[tuple[int, str], str]

    def bind(self, channel: str = HTTP) -> str:
        """This node's own `host:port` of a channel."""
        return self._real[self.index, channel]

    def real(self, other: int, channel: str = HTTP) -> str:
        """The address that node `other` announces."""
        return self._real[other, channel]

    def dial(self, other: int, channel: str = HTTP) -> str:
        """Where this node reaches `other`: the link's proxy if the channel is proxied."""
        return self._dial.get((other, channel), self._real[other, channel])

    def reals(self, channel: str = HTTP) -> list[str]:
        """All nodes' real addresses, in order."""
        return [self.real(other, channel) for other in range(self.size)]

    def dials(self, channel: str = HTTP) -> list[str]:
        """All nodes in order as this one reaches them; its own real address at its own place."""
        return [self.dial(other, channel) for other in range(self.size)]

    def others(self) -> list[int]:
        """The indices of the other nodes."""
        return [other for other in range(self.size) if other != self.index]


class Cluster:
    """`async with Cluster(argv, 3, root=tmp_path) as cluster`: ready when entered, gone when left.

    argv: the command line of one node, from its NodeView.
    channels: the ports each node has; the first one serves clients (and `ready_path`).
    proxied: the channels whose links between nodes pass a LinkProxy per ordered pair. Clients (and
    what a test asks through `client`) never pass a proxy.
    cwd, env: for the processes; env may depend on the node.
    tls: the clients' context when `scheme` is "https" (default: do not verify).
    """

    def __init__(
        self,
        argv: Callable[[NodeView], Sequence[str]],
        size: int,
        *,
        root: Path,
        channels: Sequence[str] = (HTTP,),
        proxied: Iterable[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | Callable[[NodeView], Mapping[str, str]] | None = None,
        scheme: str = "http",
        tls: ssl.SSLContext | None = None,
        ready_path: str = "/readyz",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.size = size
        self.root = root
        self.scheme = scheme
        self.tls = tls or (unverified() if scheme == "https" else None)
        self._argv = argv
        self._channels = tuple(channels)
        self._proxied = tuple(proxied)
        self._cwd = cwd
        self._env = env
        self._ready_path = ready_path
        self._headers = dict(headers or {})
        self._reservations: dict[tuple[int, str], Reservation] = {}
        self._links: dict[tuple[int, int, str], LinkProxy] = {}
        self.views: list[NodeView] = []
        self.nodes: list[NodeProcess] = []

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Cluster:
        self.prepare()
        try:
            await self.start_all()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def prepare(self) -> None:
        """Reserve ports, open proxies, write command lines; start nothing."""
        for index in range(self.size):
            for channel in self._channels:
                self._reservations[index, channel] = Reservation()
        real = {key: reservation.address for key, reservation in self._reservations.items()}
        for index in range(self.size):
            dial = {}
            for other in range(self.size):
                for channel in self._proxied if other != index else ():
                    link = LinkProxy(real[other, channel])
                    self._links[index, other, channel] = link
                    dial[other, channel] = link.address
            view = NodeView(index, self.size, self.root / f"data{index}", real, dial)
            self.views.append(view)
            self.nodes.append(
                NodeProcess(
                    f"node{index}",
                    self._argv(view),
                    log=self.root / f"node{index}.log",
                    cwd=self._cwd,
                    env=self._env(view) if callable(self._env) else self._env,
                )
            )

    def close(self) -> None:
        """Kill every node, close proxies, give ports back."""
        self.power_cut()
        for link in self._links.values():
            link.close()
        for reservation in self._reservations.values():
            reservation.release()

    def start(self, index: int) -> None:
        """Start one node (not waiting for readiness)."""
        for channel in self._channels:
            self._reservations[index, channel].about_to_bind()
        self.nodes[index].start()

    async def start_all(self, timeout_s: float = DEADLINE_S) -> None:
        """Start every node that does not run, and wait until all are ready."""
        for index in range(self.size):
            if not self.nodes[index].running:
                self.start(index)
        await asyncio.gather(*(self.ready(index, timeout_s) for index in range(self.size)))

    async def ready(self, index: int, timeout_s: float = DEADLINE_S) -> None:
        """Wait until one node answers 200 on the ready path."""
        url = self.url(index, self._ready_path)
        await self.nodes[index].wait_url(url, timeout_s=timeout_s, tls=self.tls)

    async def terminate_all(self) -> list[int]:
        """SIGTERM to all at once; their exit codes in order."""
        return list(await asyncio.gather(*(node.terminate() for node in self.nodes)))

    # -- talking ---------------------------------------------------------------------------------

    def url(self, index: int, path: str = "") -> str:
        """The client URL of one node."""
        return f"{self.scheme}://{self.views[index].bind(self._channels[0])}{path}"

    @property
    def urls(self) -> list[str]:
        """The client URLs of all nodes."""
        return [self.url(index) for index in range(self.size)]

    def client(self, index: int, headers: Mapping[str, str] | None = None) -> HttpClient:
        """A new HTTP client for one node (use `async with`, or close it)."""
        merged = {**self._headers, **(headers or {})}
        return HttpClient.of_url(self.url(index), tls=self.tls, headers=merged)

    # -- faults: processes -----------------------------------------------------------------------

    def kill(self, index: int) -> None:
        """kill -9 one node."""
        self.nodes[index].kill()

    def power_cut(self) -> None:
        """kill -9 all nodes at one moment."""
        for node in self.nodes:
            node.kill_later()
        for node in self.nodes:
            node.kill()

    def pause(self, index: int) -> None:
        """SIGSTOP one node."""
        self.nodes[index].pause()

    def resume(self, index: int) -> None:
        """SIGCONT one node."""
        self.nodes[index].resume()

    # -- faults: links ---------------------------------------------------------------------------

    def _between(self, source: int, target: int, *, one_way: bool) -> list[LinkProxy]:
        assert self._proxied, "this cluster has no proxied channel"
        pairs = [(source, target)] if one_way else [(source, target), (target, source)]
        return [self._links[a, b, channel] for a, b in pairs for channel in self._proxied]

    def cut(self, source: int, target: int, *, one_way: bool = False) -> None:
        """Reset and refuse what `source` dials to `target` (and back, unless `one_way`)."""
        for link in self._between(source, target, one_way=one_way):
            link.cut()

    def blackhole(self, source: int, target: int, *, one_way: bool = False) -> None:
        """Accept and forward nothing of what `source` dials to `target` (and back)."""
        for link in self._between(source, target, one_way=one_way):
            link.blackhole()

    def delay(self, source: int, target: int, delay_ms: float, *, one_way: bool = False) -> None:
        """Delay both directions of what `source` dials to `target` (and back)."""
        for link in self._between(source, target, one_way=one_way):
            link.delay(delay_ms)

    def partition(self, *groups: Iterable[int], silent: bool = False) -> None:
        """Only nodes of one group reach each other. `silent`: blackhole instead of reset."""
        side = {index: number for number, group in enumerate(groups) for index in group}
        for a in range(self.size):
            for b in range(self.size):
                if a != b and side.get(a, -1 - a) != side.get(b, -1 - b):
                    (self.blackhole if silent else self.cut)(a, b, one_way=True)

    def heal(self) -> None:
        """Every link works again."""
        for link in self._links.values():
            link.heal()
