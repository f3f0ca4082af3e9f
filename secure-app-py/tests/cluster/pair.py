"""Two real nodes started as the seed starts them, in a folder of their own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from secure_store import cli
from testkit.cluster import Cluster, HttpClient, NodeView, Reply

MAIN = Path(__file__).resolve().parents[2] / "main.py"
ADMIN = {"Authorization": "Bearer token-admin-123"}
USER = {"Authorization": "Bearer token-user-ABC"}
DEADLINE_S = 20.0


class Pair(Cluster):
    """Ready means in step here: a machine that is slow to start the replica must not turn a test of
    something else into a test of a lone primary."""

    async def start_all(self, timeout_s: float = DEADLINE_S) -> None:
        await super().start_all(timeout_s)
        await self.linked()

    async def link(self, index: int = 0) -> str:
        """What /status of a node says of its link; "unknown" if it does not say."""
        async with self.client(index) as client:
            reply = await client.get("/status")
        if not isinstance(reply, Reply):
            return "unknown"
        return "unknown" if reply.status != 200 else str(reply.json["link"])

    async def linked(self, index: int = 0) -> None:
        """Wait until the primary (`index`) has its replica in step."""
        await eventually(lambda: self._says(index, "live", "following"))

    async def unlinked(self, index: int = 0) -> None:
        """Wait until a node has noticed that the other one is away: a write that arrives before
        that is begun, and its outcome is rightly unknown."""
        await eventually(lambda: self._says(index, "down"))

    async def _says(self, index: int, *links: str) -> bool:
        return await self.link(index) in links


def pair(
    root: Path,
    *flags: str,
    proxied: bool = False,
    certificates: tuple[str, str] | None = None,
    headers: dict[str, str] = ADMIN,
) -> Pair:
    """nodeA (primary) and nodeB (replica); `proxied`: A reaches B through a proxy that can be
    cut; `certificates`: each node's own (NAME.crt, NAME.key). Ready when in step."""

    def argv(view: NodeView) -> list[str]:
        name = f"node{'AB'[view.index]}"
        line = [sys.executable, str(MAIN), f"--id={name}", f"--addr={view.bind()}"]
        if view.index == 0:
            replica = view.dial(1, "http") if proxied else view.real(1)
            line.append(f"--replica=https://{replica}")
        if certificates is not None:
            own = certificates[view.index]
            line += [f"--cert={own}.crt", f"--key={own}.key"]
        return [*line, *flags]

    return Pair(
        argv, 2, root=root, cwd=root, channels=("http",), proxied=("http",) if proxied else (),
        scheme="https", headers=headers, env={"CLUSTER_SECRET": ""},
    )  # fmt: skip


@contextmanager
def running(root: Path) -> Iterator[Cluster]:
    """A pair in step, for a fixture that serves a whole module."""
    cluster = pair(root)
    cluster.prepare()
    try:
        asyncio.run(cluster.start_all())
        yield cluster
    finally:
        cluster.close()


async def set_value(client: HttpClient, key: str, value: Any, **fields: Any) -> Reply:
    reply = await client.post("/set", {"key": key, "value": value, **fields}, timeout_s=10)
    assert isinstance(reply, Reply), reply
    return reply


async def call(
    client: HttpClient, method: str, path: str, body: Any = None, **headers: str
) -> Reply:
    raw = None if body is None else json.dumps(body).encode()
    reply = await client.request(method, path, body=raw, headers=headers)
    assert isinstance(reply, Reply), reply
    return reply


async def get(client: HttpClient, path: str, **headers: str) -> Reply:
    reply = await client.request("GET", path, headers=headers)
    assert isinstance(reply, Reply), reply
    return reply


async def eventually(what: Callable[[], Awaitable[bool]]) -> None:
    """Poll until `what` holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not await what():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


def command(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """An operator's command in the nodes' folder, in this process: a new one costs a second. A node
    (whose words begin with a flag) is a process of its own; here it is one that does not start."""
    if words[0].startswith("-"):
        return subprocess.run(
            [sys.executable, str(MAIN), *words],
            cwd=root, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, environment), chdir(root):
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = cli.main(words)
        except SystemExit as e:  # --help
            code = int(e.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def json_body(value: Any) -> bytes:
    return json.dumps(value).encode()


def remove_tree(path: Path) -> None:
    shutil.rmtree(path)


def files_under(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()]


def seeds_certificate(path: Path) -> None:
    """server.crt and server.key by the seed's own command, Enter pressed for every question."""
    words = "req -x509 -newkey rsa:4096 -nodes -keyout server.key -out server.crt -days 365"
    subprocess.run(
        ["openssl", *words.split()], cwd=path, input="\n" * 7, text=True, check=True,
        capture_output=True,
    )  # fmt: skip
