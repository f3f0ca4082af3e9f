"""What a request costs the queue's owner, over HTTP/1.1 and on `/stream`: CPU of its process, all
load from this one, 32 clients.

    python bench/requests_cost.py                             # this tree
    python bench/requests_cost.py --mains a/main.py,main.py   # two trees in turn
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path

import systems
from run import closed_loop, cpu_s, fill, median
from systems import Ours, Session

CLIENTS = 32
DEPTH = 12_000


async def _produce(session: Session) -> int:
    await session.produce(b"x" * 256)
    return 1


async def _take(session: Session) -> int:
    return len(await session.take(1, 0.3))


async def measure(
    ours: Ours, work: Callable[[Session], Awaitable[int]], clients: int, seconds: float
) -> tuple[float, float, float]:
    """(requests a second, CPU us of the owner each, of all nodes each) - or p50 in place of the
    rate, when there is one client."""
    await ours.fresh()
    if work is _take:
        await fill(ours, DEPTH)
    sessions = [await ours.connect() for _ in range(clients)]
    if work is _take:
        for session in sessions:
            await session.subscribe(4)
    owner, everybody = [ours.owner_pid()], ours.pids()
    before = cpu_s(owner), cpu_s(everybody)
    rate, latencies = await closed_loop(work, sessions, seconds)
    done = max(1, len(latencies)) / 1e6
    for session in sessions:
        session.close()
    shown = rate if clients > 1 else median(latencies)
    return shown, (cpu_s(owner) - before[0]) / done, (cpu_s(everybody) - before[1]) / done


async def run(mains: list[Path], root: Path, seconds: float, rounds: int) -> None:
    """All trees and ways in turn."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    clusters: list[tuple[str, Ours]] = []
    try:
        for number, main in enumerate(mains):
            systems.MAIN = main
            for http in (False, True):
                place = root / f"{number}{http}"
                place.mkdir()
                ours = Ours(place, http=http, port=18400 + 20 * number + 10 * http)
                clusters.append((f"{number} {ours.name}", ours))
                await ours.start()
        for _ in range(rounds):
            for what, work, clients in (
                ("produce, 32 clients", _produce, CLIENTS),
                ("consume+ack, 32 clients", _take, CLIENTS),
                ("produce, 1 client (p50 ms)", _produce, 1),
            ):
                for name, ours in clusters:
                    figures = await measure(ours, work, clients, seconds)
                    found.setdefault((what, name), []).append(figures)
    finally:
        for _, ours in clusters:
            ours.stop()
    print(f"{'':<28}{'':<14}{'/s or p50 ms':>14}{'owner us':>10}{'all us':>10}")
    for (what, name), rows in sorted(found.items()):
        rate, owner, everybody = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{what:<28}{name:<14}{rate:>14,.2f}{owner:>10.0f}{everybody:>10.0f}")


def main() -> None:
    """Parse, run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mains", default=str(systems.MAIN), help="main.py of each tree")
    parser.add_argument("--seconds", type=float, default=0.8, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where the data lies (default: the temporary directory)")
    args = parser.parse_args()
    factory = import_module("uvloop").new_event_loop if sys.platform != "win32" else None
    root = Path(tempfile.mkdtemp(prefix="queue-bench-", dir=args.dir))
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            mains = [Path(each).resolve() for each in args.mains.split(",")]
            runner.run(run(mains, root, args.seconds, args.rounds))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
