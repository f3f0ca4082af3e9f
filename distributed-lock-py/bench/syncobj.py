"""PySyncObj as a contender: Raft in Python, its journal on. Not durable: it never syncs."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contender import Contender
from load import Sample, sample

from processes import Server, free_ports, wait_until

NODE = Path(__file__).resolve().parent / "syncobj_node.py"


def installed() -> bool:
    return find_spec("pysyncobj") is not None


class SpokenTo(Server):
    """A node that is driven over its standard input and output."""

    def tell(self, **command: object) -> None:
        pipe = self._process.stdin
        if pipe is not None:
            pipe.write(json.dumps(command).encode() + b"\n")
            pipe.flush()

    def hear(self) -> Any:
        pipe = self._process.stdout
        return json.loads(pipe.readline()) if pipe is not None else None

    def ask(self, **command: object) -> Any:
        self.tell(**command)
        return self.hear()


class SyncObj(Contender):
    name = "pysyncobj"
    note = "not durable (never syncs); clients are threads in the leader, no HTTP"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._addresses = [f"127.0.0.1:{port}" for port in free_ports(self.size)]
        self._spoken: list[SpokenTo | None] = [None] * self.size

    def start(self) -> None:
        for node in range(self.size):
            self._launch(node)
        wait_until("PySyncObj's leader", lambda: self.leader() is not None)

    def restart(self, node: int) -> None:
        self._launch(node)
        wait_until("the restarted PySyncObj", lambda: self._node(node).ask(do="status")["ready"])
        time.sleep(1)

    def leader(self) -> int | None:
        rows = [
            (i, node.ask(do="status")) for i, node in enumerate(self._spoken) if node is not None
        ]
        leading = [i for i, row in rows if row["leads"]]
        return leading[0] if len(leading) == 1 and all(row["ready"] for _, row in rows) else None

    def _node(self, node: int) -> SpokenTo:
        spoken = self._spoken[node]
        if spoken is None:
            raise RuntimeError(f"node {node} does not run")
        return spoken

    def _launch(self, node: int) -> None:
        directory = self.scratch / f"n{node}"
        directory.mkdir(exist_ok=True)
        others = ",".join(a for i, a in enumerate(self._addresses) if i != node)
        self.nodes[node] = self._spoken[node] = SpokenTo(
            [sys.executable, str(NODE), self._addresses[node], others, str(directory)],
            self.scratch / f"n{node}.log",
            spoken_to=True,
        )

    # ---------------------------------------------------------------------------------- measures

    def pairs(self, clients: int, seconds: float) -> Sample:
        return self._load(clients, seconds, "")

    def hand_overs(self, clients: int, seconds: float) -> Sample:
        return self._load(clients, seconds, "hot")

    def _load(self, clients: int, seconds: float, lock: str) -> Sample:
        wait_until("PySyncObj's leader", lambda: self.leader() is not None)
        before = self.cpu_s()
        took, elapsed = self._node(self.leader() or 0).ask(
            do="load", clients=clients, seconds=seconds, lock=lock
        )
        return sample(took, elapsed, self.cpu_s() - before)

    def successes_around_kill(self, before_s: float, after_s: float) -> tuple[float, list[float]]:
        wait_until("PySyncObj's leader", lambda: self.leader() is not None)
        leader = self.leader() or 0
        survivors = [n for i, n in enumerate(self._spoken) if n is not None and i != leader]
        for node in survivors:
            node.tell(do="stream", seconds=before_s + after_s)
        time.sleep(before_s)
        at = time.perf_counter()  # one clock for all processes of a machine
        self._node(leader).kill()
        self.nodes[leader] = self._spoken[leader] = None
        return at, sorted(moment for node in survivors for moment in node.hear())
