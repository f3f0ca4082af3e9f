"""The four services as start.sh knows them: which nodes, on which ports, with which flags.

Alone, a service sits on the seed's ports (HTTP 8000…, Raft 7000…); `all` moves the queue, the
cache and the secure store up by 100, 200 and 300, so that the four fit beside each other. PORT_BASE
in the environment moves everything (default 8000; Raft is always 1000 below).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / ".run"
HOST = "127.0.0.1"
RAFT_BELOW = 1000


@dataclass(frozen=True)
class Node:
    """One process: what follows main.py, and every port that it listens on, HTTP first."""

    name: str
    ports: tuple[int, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Service:
    """One cluster; `nodes(base, data)` lays it out from the HTTP port `base`, data under `data`."""

    name: str
    title: str
    main: Path
    offset: int
    scheme: str
    nodes: Callable[[int, Path], list[Node]]
    first_try: Callable[[int], str]

    @property
    def run(self) -> Path:
        """Pid files, logs and data of this service."""
        return RUN / self.name


def port_base() -> int:
    """PORT_BASE, or the seed's 8000."""
    text = os.environ.get("PORT_BASE", "8000")
    if not text.isdigit() or not 2000 <= int(text) <= 65000:
        raise SystemExit(f"error: PORT_BASE must be a port from 2000 to 65000, not {text!r}")
    return int(text)


def _addresses(base: int, count: int) -> list[str]:
    return [f"{HOST}:{base + place}" for place in range(count)]


def _lock(base: int, data: Path) -> list[Node]:
    http, raft = _addresses(base, 3), _addresses(base - RAFT_BELOW, 3)
    return [
        Node(
            f"node{place + 1}",
            (base + place, base - RAFT_BELOW + place),
            (
                f"--id=node{place + 1}",
                f"--raft_addr={raft[place]}",
                f"--http_addr={http[place]}",
                f"--peers={','.join(raft)}",
                f"--peer_http_addrs={','.join(http)}",
                f"--data_dir={data / f'node{place + 1}'}",
            ),
        )
        for place in range(3)
    ]


def _queue(base: int, data: Path) -> list[Node]:
    every = _addresses(base, 3)
    return [
        Node(
            name,
            (base + place,),
            (
                f"--id={name}",
                f"--addr={every[place]}",
                f"--peers={','.join(every)}",
                f"--dataDir={data / name}",
            ),
        )
        for place, name in enumerate(("nodeA", "nodeB", "nodeC"))
    ]


def _cache(base: int, data: Path) -> list[Node]:
    every = _addresses(base, 3)
    return [
        Node(
            name,
            (base + place,),
            (
                f"--addr={every[place]}",
                "--peers=" + ",".join(f"http://{each}" for each in every if each != every[place]),
                "--capacity=10",
                f"--id={name}",
                f"--data_dir={data / name}",
            ),
        )
        for place, name in enumerate(("nodeA", "nodeB", "nodeC"))
    ]


def _secure(base: int, data: Path) -> list[Node]:
    primary, replica = _addresses(base, 2)
    # server.crt and server.key: made by the first node in its working directory, .run/secure.
    return [
        Node(
            "nodeA",
            (base,),
            (
                "--id=nodeA",
                f"--addr={primary}",
                f"--replica=https://{replica}",
                f"--data_dir={data / 'nodeA'}",
            ),
        ),
        Node(
            "nodeB",
            (base + 1,),
            ("--id=nodeB", f"--addr={replica}", f"--data_dir={data / 'nodeB'}"),
        ),
    ]


SERVICES = (
    Service(
        "lock",
        "distributed lock manager (Raft)",
        ROOT / "distributed-lock-py" / "src" / "main.py",
        0,
        "http",
        _lock,
        lambda port: f"curl http://{HOST}:{port}/status",
    ),
    Service(
        "queue",
        "message queue (consistent hashing)",
        ROOT / "queue-py" / "main.py",
        100,
        "http",
        _queue,
        lambda port: (
            f"curl -X POST http://{HOST}:{port}/produce"
            ' -d \'{"queue": "nama-antrean", "body": "isi pesan baru"}\''
        ),
    ),
    Service(
        "cache",
        "coherent cache (MESI)",
        ROOT / "cache-py" / "main.py",
        200,
        "http",
        _cache,
        lambda port: (
            f"curl -X POST http://{HOST}:{port}/write"
            ' -d \'{"key": "nama-kota", "value": "Balikpapan"}\''
        ),
    ),
    Service(
        "secure",
        "secure key-value store (TLS, roles, audit)",
        ROOT / "secure-app-py" / "main.py",
        300,
        "https",
        _secure,
        lambda port: (
            f"curl -k -X POST https://{HOST}:{port}/set -H 'Authorization: Bearer token-admin-123'"
            ' -d \'{"key": "kunci1", "value": "berhasil"}\''
        ),
    ),
)


def chosen(word: str) -> list[Service] | None:
    """The services that `word` (a name or "all") stands for, or None."""
    if word == "all":
        return list(SERVICES)
    return [service for service in SERVICES if service.name == word] or None
