"""Who is measured: our pair, a bare aiohttp TLS handler (the floor), etcd with TLS and auth on."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from itertools import count
from os import getpid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAIN = HERE.parent / "main.py"
VALUE = "x" * 100
_ports = count(21_000 + getpid() % 5_000)


def free_port() -> int:
    """One that nobody listens on, below the range from which the system takes its own."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def certificate(folder: Path) -> None:
    """The same P-256 certificate for everybody, made by our own command."""
    subprocess.run(
        [sys.executable, str(MAIN), "cert", "--host", "localhost", "--host", "127.0.0.1"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


class Contender:
    """Started in `folder`, which holds server.crt and server.key."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def start(self) -> None:
        raise NotImplementedError

    def get(self, number: int) -> bytes:
        raise NotImplementedError

    def set(self, number: int) -> bytes | None:
        """None: it stores nothing."""
        raise NotImplementedError

    def hello(self) -> bytes:
        """The cheapest request, for new connections."""
        return b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    def launch(self, *words: str) -> None:
        with (self.folder / f"{self.name.split()[0]}.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(words, cwd=self.folder, stdout=log, stderr=log)
            )  # fmt: skip

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(10)
        self.processes.clear()


def wait_for(port: int, path: str = "/healthz", seconds: float = 30.0) -> None:
    """Until something answers 200 there."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{port}{path}", timeout=2, context=tls):
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


class Ours(Contender):
    """Primary and replica as a user starts them. `without`: a part switched off, in the bench only
    (parts_node.py); "replication": the primary alone."""

    name = "ours"

    def __init__(self, folder: Path, without: str = "") -> None:
        super().__init__(folder)
        self.without = without

    def start(self) -> None:
        main = [str(MAIN)] if not self.without else [str(HERE / "parts_node.py"), self.without]
        primary = [f"--id=A{self.port}", f"--addr=127.0.0.1:{self.port}"]
        if self.without != "replication":
            replica = free_port()
            primary.append(f"--replica=https://127.0.0.1:{replica}")
        self.launch(sys.executable, *main, *primary)
        wait_for(self.port)
        if self.without != "replication":
            words = [f"--id=B{self.port}", f"--addr=127.0.0.1:{replica}"]
            self.launch(sys.executable, *main, *words)
            wait_for(replica)
        wait_for(self.port, "/readyz")
        time.sleep(1.2)  # a link is being made, or the wait for one has run out

    def get(self, number: int) -> bytes:
        return (
            f"GET /get?key=bench-{number} HTTP/1.1\r\nHost: x\r\n"
            "Authorization: Bearer token-admin-123\r\n\r\n"
        ).encode()

    def set(self, number: int) -> bytes:
        body = json.dumps({"key": f"bench-{number}", "value": VALUE}).encode()
        return (
            f"POST /set HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-admin-123\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body


class Floor(Contender):
    """The same answers from a bare aiohttp handler: no audit, no authorisation, no store."""

    name = "floor"

    def start(self) -> None:
        self.launch(sys.executable, str(HERE / "floor_tls.py"), str(self.port), VALUE)
        wait_for(self.port)

    def get(self, number: int) -> bytes:
        return (
            f"GET /get?key=bench-{number} HTTP/1.1\r\nHost: x\r\n"
            "Authorization: Bearer token-admin-123\r\n\r\n"
        ).encode()

    def set(self, number: int) -> None:
        return None


class Etcd(Contender):
    """Two members, TLS for clients and between them, auth on, durable defaults, JSON gateway."""

    name = "etcd"

    @staticmethod
    def installed() -> bool:
        return shutil.which("etcd") is not None

    def start(self) -> None:
        self._clients = [self.port, free_port()]
        peers = [free_port(), free_port()]
        cluster = ",".join(f"n{i}=https://127.0.0.1:{port}" for i, port in enumerate(peers))
        files = [str(self.folder / "server.crt"), str(self.folder / "server.key")]
        for i in (0, 1):
            client, peer = f"https://127.0.0.1:{self._clients[i]}", f"https://127.0.0.1:{peers[i]}"
            self.launch(
                "etcd", "--name", f"n{i}", "--data-dir", str(self.folder / f"etcd{i}"),
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--cert-file", files[0], "--key-file", files[1],
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--peer-cert-file", files[0], "--peer-key-file", files[1],
                "--peer-trusted-ca-file", files[0],
                "--initial-cluster", cluster, "--logger", "zap", "--log-outputs", "stderr",
            )  # fmt: skip
        for port in self._clients:
            wait_for(port, "/health")
        self._turn_auth_on()

    def _turn_auth_on(self) -> None:
        leader = self._leader()
        for path, body in (
            ("user/add", {"name": "root", "password": "pw"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("user/add", {"name": "u", "password": "pw"}),
            ("role/add", {"name": "r"}),
            ("role/grant", {"name": "r", "perm": {"permType": "READWRITE", "key": _b64("k"),
                                                  "range_end": _b64("l")}}),
            ("user/grant", {"user": "u", "role": "r"}),
            ("enable", {}),
        ):  # fmt: skip
            self._call(leader, f"auth/{path}", body)
        answer = self._call(leader, "auth/authenticate", {"name": "u", "password": "pw"})
        self._token = answer["token"]
        self.port = leader

    def _leader(self) -> int:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for port in self._clients:
                status = self._call(port, "maintenance/status", {})
                if status.get("leader") == status["header"]["member_id"]:
                    return port
            time.sleep(0.1)
        raise TimeoutError("etcd has no leader")

    def _call(self, port: int, path: str, body: dict[str, Any]) -> Any:
        tls = ssl.create_default_context()
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
        request = urllib.request.Request(
            f"https://127.0.0.1:{port}/v3/{path}", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=10, context=tls) as answer:  # noqa: S310 - always https
            return json.load(answer)

    def _post(self, path: str, body: dict[str, str]) -> bytes:
        raw = json.dumps(body).encode()
        return (
            f"POST /v3/kv/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {self._token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        ).encode() + raw

    def get(self, number: int) -> bytes:
        return self._post("range", {"key": _b64(f"k{number}")})

    def set(self, number: int) -> bytes:
        return self._post("put", {"key": _b64(f"k{number}"), "value": _b64(VALUE)})

    def hello(self) -> bytes:
        return b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
