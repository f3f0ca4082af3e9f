"""Our nodes and the aiohttp floor, for the time of a `with`: free ports, scratch directories."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lean_client import LeanClient

from mesi_cache.core.placement import Placement

MAIN = Path(__file__).resolve().parents[1] / "main.py"
FLOOR = """
import sys
from aiohttp import web
try:
    import uvloop; uvloop.install()
except ImportError: pass
BODY = b'{"key":"k","value":"x","state":"M","hit":true}'
async def hello(request):
    await request.read()
    return web.Response(body=BODY, content_type="application/json")
app = web.Application()
app.router.add_get("/read", hello)
app.router.add_post("/write", hello)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Children:
    """Processes that end with the block, by their own ids."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str]) -> None:
        self._children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait()


class Floor(Children):
    """What an aiohttp handler does that answers a constant."""

    def __init__(self) -> None:
        super().__init__()
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.start([sys.executable, "-c", FLOOR, str(port)])

    def __enter__(self) -> Floor:
        wait(lambda: _get(self.address, "/read") is not None, "the floor")
        return self


class Nodes(Children):
    """A cluster of this service with durable defaults."""

    def __init__(self, root: Path, count: int = 3, flags: Sequence[str] = ()) -> None:
        super().__init__()
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self.members = [f"http://{address}" for address in self.addresses]
        for number, address in enumerate(self.addresses):
            others = ",".join(f"http://{other}" for other in self.addresses if other != address)
            self.start(
                [sys.executable, str(MAIN), f"--addr={address}", f"--id=node{number}",
                 "--capacity=20000", f"--data_dir={root / str(number)}", "--log_level=warning",
                 *([f"--peers={others}"] if others else []), *flags]
            )  # fmt: skip

    def __enter__(self) -> Nodes:
        for address in self.addresses:
            wait(lambda a=address: self._linked(a), f"the node at {address}")
        return self

    def _linked(self, address: str) -> bool:
        status = _get(address, "/status")
        return status is not None and len(status["peers_connected"]) == len(self.addresses) - 1

    def keys_at(self, node: int, count: int, prefix: str) -> list[str]:
        """Keys whose home is `node`."""
        placement, found = Placement(self.members), list[str]()
        number = 0
        while len(found) < count:
            key = f"{prefix}{number}"
            if placement.home(key) == self.members[node]:
                found.append(key)
            number += 1
        return found


def _get(address: str, path: str) -> dict[str, list[str]] | None:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as reply:
        answer: dict[str, list[str]] = json.load(reply)
        return answer


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.05)
    raise SystemExit(f"{what} does not come up")


async def connect(address: str, count: int) -> list[LeanClient]:
    return [await LeanClient.connect(address) for _ in range(count)]


async def write(client: LeanClient, key: str, value: str = "x" * 64) -> None:
    body = b'{"key":"%b","value":"%b"}' % (key.encode(), value.encode())
    status, answer = await client.post(b"/write", body)
    if status != 200:
        raise SystemExit(f"write: {status} {answer!r}")


async def read(client: LeanClient, key: str) -> None:
    status, answer = await client.get(b"/read?key=" + key.encode())
    if status != 200:
        raise SystemExit(f"read: {status} {answer!r}")
