"""One PySyncObj node with its lock manager; commands come on stdin, answers leave on stdout.

Its clients are threads inside the node (it has no network API), so they pay for no HTTP: an
advantage that the table should mention. Arguments: own address, the others, the data directory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import threaded

STEP_S = 5.0


def main() -> None:
    own, others, directory = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
    library: Any = import_module("pysyncobj")
    batteries: Any = import_module("pysyncobj.batteries")
    manager = batteries.ReplLockManager(autoUnlockTime=60, selfID=own)
    settings = library.SyncObjConf(
        journalFile=f"{directory}/journal", fullDumpFile=f"{directory}/dump",
        logCompactionMinEntries=10**9, logCompactionMinTime=10**9,
        # Tuned: by default it looks at its sockets and sends every 50 ms only.
        autoTickPeriod=0.001, appendEntriesPeriod=0.002,
    )  # fmt: skip
    node = library.SyncObj(own, others, consumers=[manager], conf=settings)
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "status":
                leads = str(node._getLeader()) == own
                answer: Any = {"ready": bool(node.isReady()), "leads": leads}
            case "load":
                works = _works(manager, own, command["clients"], command["lock"])
                answer = threaded.closed_loop(works, command["seconds"])
            case _:
                answer = _stream(manager, own, command["seconds"])
        print(json.dumps(answer), flush=True)


def _works(manager: Any, own: str, clients: int, lock: str) -> list[Callable[[], None]]:
    shared = manager._consumer()  # below tryAcquire, which names the client by the node

    def work_of(number: int) -> Callable[[], None]:
        name, client = lock or f"own-{own}-{number}", f"{own}-{number}"

        def pair() -> None:
            deadline = time.monotonic() + STEP_S
            # It has no queue: whoever wants a lock that is held asks again and again.
            while not shared.acquire(name, client, time.time(), sync=True, timeout=STEP_S):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} was not acquired")
            shared.release(name, client, sync=True, timeout=STEP_S)

        return pair

    return [work_of(number) for number in range(clients)]


def _stream(manager: Any, own: str, seconds: float) -> list[float]:
    """When pairs were completed, by four patient clients."""
    done: list[float] = []
    until = time.perf_counter() + seconds

    def work_of(number: int) -> Callable[[], None]:
        def pair() -> None:
            name = f"f-{own}-{number}"
            try:
                if manager.tryAcquire(name, sync=True, timeout=0.5):
                    manager.release(name, sync=True, timeout=0.5)
                    done.append(time.perf_counter())
            except import_module("pysyncobj").SyncObjException:
                time.sleep(min(0.01, max(0.0, until - time.perf_counter())))

        return pair

    threaded.closed_loop([work_of(number) for number in range(4)], seconds)
    return done


if __name__ == "__main__":
    main()
