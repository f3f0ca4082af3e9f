"""What the contract's checks must know about a service, and a ready cluster of it to check."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from testkit.cluster import Cluster, HttpClient, NodeView, Outcome, Reply

ELSEWHERE: Final = (307, 421, 503)  # not here, not now: ask another node
DEADLINE_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Service:
    """One service, as the checks see it.

    folder, main: the service's folder and its main.py inside (`src/main.py` for the lock manager).
    flags: a node's command line after `main.py`; must use `view.data_dir`.
    post: path and body of a POST that succeeds (2xx) again and again on the right node.
    required: fields of that body that must be there; strings: those that must be strings.
    get: a GET path that succeeds after that POST.
    headers: sent with every request (authorization); public: paths that need none.
    skip: documented paths that must not be called at random (they reconfigure the cluster).
    peers_flag: the flag whose list must name the node itself (None where it names the others).
    file_flag: a flag that takes the path of a file which must be readable.
    link_path: where peers dial their WebSocket, on the last channel (None: not of that kind).
    """

    name: str
    folder: Path
    flags: Callable[[NodeView], Sequence[str]]
    post: tuple[str, Mapping[str, Any]]
    required: tuple[str, ...]
    strings: tuple[str, ...]
    get: str
    main: str = "main.py"
    size: int = 3
    channels: tuple[str, ...] = ("http",)
    scheme: str = "http"
    env: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    public: tuple[str, ...] = ("/", "/healthz", "/readyz")
    skip: tuple[str, ...] = ()
    max_body_bytes: int = 1 << 20
    peers_flag: str | None = None
    file_flag: str = "--cluster_secret_file"
    link_path: str | None = "/peer/link"

    def command(self, view: NodeView) -> list[str]:
        """The whole command line of a node."""
        return [sys.executable, str(self.folder / self.main), *self.flags(view)]

    def cluster(self, root: Path) -> Cluster:
        """A cluster in `root`, which is also the nodes' working directory."""
        return Cluster(
            self.command,
            self.size,
            root=root,
            channels=self.channels,
            cwd=root,
            env={"CLUSTER_SECRET": "", **self.env},
            scheme=self.scheme,
            headers=self.headers,
        )


class Target:
    """A ready cluster, and the node of it that takes the service's POST."""

    def __init__(self, service: Service, cluster: Cluster) -> None:
        self.service = service
        self.cluster = cluster
        self.writer = 0

    async def find_writer(self) -> Reply:
        """Try the valid POST on every node until one takes it; its answer."""
        path, body = self.service.post
        deadline = time.monotonic() + DEADLINE_S
        last: Outcome | None = None
        while time.monotonic() < deadline:
            for index in range(self.service.size):
                async with self.cluster.client(index) as client:
                    last = await client.post(path, body)
                if isinstance(last, Reply) and 200 <= last.status < 300:
                    self.writer = index
                    return last
            await asyncio.sleep(0.05)
        raise AssertionError(f"no node takes POST {path} {body}: last {last}")

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        authorized: bool = True,
    ) -> Reply:
        """One request to the writer; asks again elsewhere when leadership moved meanwhile."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            async with self.client(authorized=authorized) as client:
                outcome = await client.request(method, path, body=body, headers=dict(headers or {}))
            assert isinstance(outcome, Reply), f"{method} {path}: {outcome}"
            if outcome.status not in ELSEWHERE or time.monotonic() > deadline:
                return outcome
            await self.find_writer()

    async def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
        """The service's POST with another body."""
        return await self.request("POST", self.service.post[0], body=body, headers=headers)

    def client(self, *, authorized: bool = True) -> HttpClient:
        """A client of the writer."""
        if authorized:
            return self.cluster.client(self.writer)
        return HttpClient.of_url(self.cluster.url(self.writer), tls=self.cluster.tls)

    @property
    def origin(self) -> str:
        """The writer's own origin, as a browser would send it."""
        return self.cluster.url(self.writer)

    @asynccontextmanager
    async def stream(self, path: str) -> AsyncIterator[tuple[int, dict[str, str]]]:
        """GET a stream that never ends: its status and headers; closed on leaving."""
        parts = urlsplit(self.cluster.url(self.writer))
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port, ssl=self.cluster.tls
        )
        try:
            lines = [f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", "Accept: text/event-stream"]
            lines += [f"{name}: {value}" for name, value in self.service.headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode())
            async with asyncio.timeout(DEADLINE_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {}
            for line in head[1:]:
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            yield int(head[0].split()[1]), headers
        finally:
            writer.close()


@contextmanager
def running(service: Service, root: Path) -> Iterator[Target]:
    """A ready cluster for a module-scoped fixture (no event loop is kept open)."""
    cluster = service.cluster(root)
    cluster.prepare()
    target = Target(service, cluster)

    async def begin() -> None:
        await cluster.start_all()
        await target.find_writer()

    try:
        asyncio.run(begin())
        yield target
    finally:
        cluster.close()
