"""How fast is the lock manager on this machine, beside its peers? See README.md here.

Starts three nodes of ours and of each peer that is installed, drives them in turn with the same
work, prints medians and ratios, and stops everything. Figures of different machines or days do not
compare; ratios within one run do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import etcd
import growth
import side_by_side
import syncobj
import zookeeper
from contender import Contender
from ours import Ours
from outage import after_hang
from report import figure, median_of, table

PEERS: dict[str, tuple[Callable[[], bool], type[Contender]]] = {
    "etcd": (etcd.installed, etcd.Etcd),
    "zookeeper": (zookeeper.installed, zookeeper.ZooKeeper),
    "pysyncobj": (syncobj.installed, syncobj.SyncObj),
}
PARTS = ("speed", "outage", "nodes", "locks")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="which to compare with, or none")
    parser.add_argument("--parts", default="speed,outage", help=f"of {','.join(PARTS)}, or all")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement (3)")
    parser.add_argument("--runs", type=int, default=3, help="rounds; medians are shown (3)")
    parser.add_argument("--kills", type=int, default=20, help="leaders to kill, ours (20)")
    parser.add_argument("--peer_kills", type=int, default=3, help="of each peer (3)")
    parser.add_argument("--held", default="1000,10000,100000", help="steps of --parts locks")
    parser.add_argument("--nodes", default="3,5,7", help="sizes of --parts nodes")
    return parser.parse_args()


def chosen_peers(names: str) -> list[type[Contender]]:
    found: list[type[Contender]] = []
    for name in () if names == "none" else names.split(","):
        if name not in PEERS:
            raise SystemExit(f"--peers: expected some of {','.join(PEERS)}, or none; got {name!r}")
        installed, contender = PEERS[name]
        if installed():
            found.append(contender)
        else:
            print(f"{name} is not installed: left out", file=sys.stderr)
    return found


def compare(options: argparse.Namespace, parts: set[str], scratch: Path) -> None:
    """Ours and one peer at a time: a third cluster would take processor time even when idle."""
    peers: list[type[Contender] | None] = [*chosen_peers(options.peers)]
    for number, make in enumerate(peers or [None]):
        directory = scratch / (make.name if make else "alone")
        directory.mkdir()
        contenders = [Ours(directory), *([make(directory)] if make else [])]
        with contextlib.ExitStack() as stack:
            for contender in contenders:
                stack.callback(contender.stop)
                contender.start()
            for contender in contenders[1:] or contenders:
                print(f"{contender.name}: {contender.note}")
            if "speed" in parts:
                results = side_by_side.measure(contenders, scratch, options.seconds, options.runs)
                print("\n" + side_by_side.as_table(contenders, results) + "\n", flush=True)
            if "outage" in parts:
                show_outages(options, contenders, is_first=number == 0)


def show_outages(
    options: argparse.Namespace, contenders: list[Contender], *, is_first: bool
) -> None:
    """Ours is measured once, beside the first peer."""
    ours = contenders[0]
    measured = contenders if is_first else contenders[1:]
    rows = side_by_side.outages(
        measured, lambda one: options.kills if one is ours else options.peer_kills
    )
    named = [(f"{name}, kill -9 of the leader", found) for name, found in rows]
    if is_first and isinstance(ours, Ours) and sys.platform != "win32":
        hangs = [after_hang(ours) for _ in range(min(5, options.kills))]
        named.append(("ours, leader hung (SIGSTOP)", hangs))
    shown = [[name, str(len(found)), median_of(found), figure(max(found))] for name, found in named]
    print(table(["seconds without service", "times", "median (spread)", "worst"], shown) + "\n")


def show_nodes(options: argparse.Namespace, scratch: Path) -> None:
    sizes = tuple(int(size) for size in options.nodes.split(","))
    rows = [
        [str(size), figure(alone.p50_ms), figure(many.per_second), figure(many.server_cpu_us)]
        for size, alone, many in growth.by_nodes(scratch, sizes, options.seconds)
    ]
    heads = ["nodes", "pair p50 alone, ms", "pairs/s, 32 clients", "CPU of all a pair, us"]
    print(table(heads, rows) + "\n", flush=True)


def show_locks(options: argparse.Namespace, scratch: Path) -> None:
    steps = tuple(int(step) for step in options.held.split(","))
    rows = [
        [
            f"{row.locks:,}", figure(row.bytes_a_lock), figure(row.pair_p50_ms),
            figure(row.pairs_per_second), figure(row.snapshots_ms),
            figure(row.longest_ms), figure(row.calm_longest_ms),
        ]
        for row in growth.by_locks(scratch, steps, options.seconds)
    ]  # fmt: skip
    heads = [
        "locks held", "bytes a lock", "pair p50 alone, ms", "pairs/s, 32 clients",
        "all snapshots within, ms", "longest request meanwhile, ms", "and in calm, ms",
    ]  # fmt: skip
    print(table(heads, rows) + "\n", flush=True)


def main() -> None:
    options = arguments()
    parts = set(PARTS if options.parts == "all" else options.parts.split(","))
    if unknown := parts - set(PARTS):
        raise SystemExit(f"--parts: expected some of {','.join(PARTS)}; got {','.join(unknown)}")
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, load before {load[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="lock-bench-", dir=Path.cwd()) as directory:
        scratch = Path(directory)
        if parts & {"speed", "outage"}:
            compare(options, parts, scratch)
        if "nodes" in parts:
            show_nodes(options, scratch)
        if "locks" in parts:
            show_locks(options, scratch)


if __name__ == "__main__":
    main()
