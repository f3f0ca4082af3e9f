"""ZooKeeper as a contender: Debian's package (forceSync as by default), kazoo's Lock recipe."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import threaded
from contender import Contender
from load import Sample, sample

from processes import Server, free_ports, listens, wait_until

JAR = Path("/usr/share/java/zookeeper.jar")


def installed() -> bool:
    return JAR.exists() and shutil.which("java") is not None and find_spec("kazoo") is not None


class ZooKeeper(Contender):
    name = "zookeeper"
    note = "durable defaults, kazoo"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        ports = free_ports(3 * self.size)
        self._clients = ports[: self.size]
        self._cluster = "".join(
            f"server.{i + 1}=127.0.0.1:{ports[3 + i]}:{ports[6 + i]}\n" for i in range(self.size)
        )

    def start(self) -> None:
        (self.scratch / "log4j.properties").write_text("log4j.rootLogger=OFF\n")
        for node in range(self.size):
            data = self.scratch / f"n{node}" / "data"
            data.mkdir(parents=True)
            (data / "myid").write_text(str(node + 1))
            (self.scratch / f"n{node}" / "zoo.cfg").write_text(
                "tickTime=2000\ninitLimit=10\nsyncLimit=5\nmaxClientCnxns=0\n"
                f"dataDir={data}\nclientPort={self._clients[node]}\n"
                f"clientPortAddress=127.0.0.1\n{self._cluster}"
            )
            self._launch(node)
        for port in self._clients:
            wait_until("ZooKeeper", lambda port=port: listens(port))  # type: ignore[misc]  # mypy: a default in a lambda
        wait_until("ZooKeeper's leader", lambda: self.leader() is not None)
        self.pairs(8, 3.0)  # a JVM is slow until it has compiled what is hot

    def restart(self, node: int) -> None:
        self._launch(node)
        wait_until("the restarted ZooKeeper", lambda: listens(self._clients[node]))
        time.sleep(3)  # it is asked for nothing while it joins

    def leader(self) -> int | None:
        for node, server in enumerate(self.nodes):
            if server is not None and server.alive:
                try:
                    if b"Mode: leader" in _ask(self._clients[node], b"srvr"):
                        return node
                except OSError:
                    continue
        return None

    def _launch(self, node: int) -> None:
        self.nodes[node] = Server(
            ["java", "-Xmx768m", "-cp", f"{self.scratch}:{JAR}",
             "-Dzookeeper.admin.enableServer=false",
             "org.apache.zookeeper.server.quorum.QuorumPeerMain",
             f"{self.scratch}/n{node}/zoo.cfg"],
            self.scratch / f"n{node}.log",
        )  # fmt: skip

    # ---------------------------------------------------------------------------------- measures

    def pairs(self, clients: int, seconds: float) -> Sample:
        return self._locks([f"/own{i}" for i in range(clients)], seconds)

    def hand_overs(self, clients: int, seconds: float) -> Sample:
        return self._locks(["/hot"] * clients, seconds)

    def _locks(self, paths: list[str], seconds: float) -> Sample:
        wait_until("ZooKeeper's leader", lambda: self.leader() is not None)
        leader = self.leader() or 0
        sessions = _sessions(len(paths), [self._clients[leader]])
        locks = [
            s.Lock(path, str(i)) for i, (s, path) in enumerate(zip(sessions, paths, strict=True))
        ]

        def pair_of(lock: Any) -> Any:
            def pair() -> None:
                lock.acquire()
                lock.release()

            return pair

        try:
            for lock in locks:
                lock.acquire()
                lock.release()
            before = self.cpu_s()
            took, elapsed = threaded.closed_loop([pair_of(lock) for lock in locks], seconds)
            return sample(took, elapsed, self.cpu_s() - before)
        finally:
            _end(sessions)

    def successes_around_kill(self, before_s: float, after_s: float) -> tuple[float, list[float]]:
        wait_until("ZooKeeper's leader", lambda: self.leader() is not None)
        leader = self.leader() or 0
        sessions = _sessions(8, [p for i, p in enumerate(self._clients) if i != leader])
        done: list[float] = []
        until = time.perf_counter() + before_s + after_s
        known = import_module("kazoo.exceptions").KazooException
        late = import_module("kazoo.handlers.threading").KazooTimeoutError

        def persist(number: int) -> None:
            attempt = 0
            while time.perf_counter() < until:
                try:
                    lock = sessions[number].Lock(f"/f{number}_{attempt % 2}", "x")
                    lock.acquire(timeout=3)
                    lock.release()
                    done.append(time.perf_counter())
                except (known, late):
                    attempt += 1
                    time.sleep(0.02)

        threads = [threading.Thread(target=persist, args=(i,), daemon=True) for i in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(before_s)
        at = time.perf_counter()
        server = self.nodes[leader]
        if server is not None:
            server.kill()
        self.nodes[leader] = None
        for thread in threads:
            thread.join(after_s + 10)
        _end(sessions)
        return at, sorted(done)


def _sessions(count: int, ports: list[int]) -> list[Any]:
    logging.getLogger("kazoo").setLevel(logging.CRITICAL)  # it tells of every lost connection
    patient = {"max_tries": -1, "delay": 0.05, "max_delay": 0.2}
    hosts = [f"127.0.0.1:{port}" for port in ports]
    client = import_module("kazoo.client").KazooClient
    sessions = [
        client(hosts=",".join(hosts), timeout=10, connection_retry=patient, command_retry=patient)
        for _ in range(count)
    ]
    for session in sessions:
        session.start(20)
    return sessions


def _end(sessions: list[Any]) -> None:
    for session in sessions:
        session.stop()
        session.close()


def _ask(port: int, word: bytes) -> bytes:
    """One of ZooKeeper's four-letter words."""
    with socket.create_connection(("127.0.0.1", port), 1) as connection:
        connection.sendall(word)
        answer = b""
        while more := connection.recv(4096):
            answer += more
        return answer
