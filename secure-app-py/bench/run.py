"""Ours beside etcd with TLS and auth on, and beside a bare aiohttp TLS handler, in one run.

    python bench/run.py                 the table (about two minutes and a half)
    python bench/run.py --quick         one short round of it
    python bench/run.py --parts         what audit, encryption, replication … cost, each apart,
                                        and what express, gathering and loop commits save

Every contender is measured in turn, in each of several rounds; the table shows the medians. `cpu`
is the processor time of all of a contender's processes per operation, which a busy machine distorts
least. Compare figures of one run only: absolute ones drift from machine to machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import Any

from contenders import Contender, Etcd, Floor, Ours, certificate
from lean_tls import Sample, connections, requests

Work = Callable[[Contender, float], Coroutine[Any, Any, Sample] | None]


def gets(clients: int) -> Work:
    return lambda c, seconds: requests(c.port, c.pids, clients, seconds, c.get)


def sets(clients: int) -> Work:
    def work(c: Contender, seconds: float) -> Coroutine[Any, Any, Sample] | None:
        if c.set(0) is None:
            return None
        return requests(c.port, c.pids, clients, seconds, lambda n: c.set(n) or b"")

    return work


def handshakes(clients: int) -> Work:
    return lambda c, seconds: connections(c.port, c.pids, clients, seconds, c.hello())


WORK: dict[str, Work] = {
    "set, 32 clients": sets(32),
    "set, 1 client": sets(1),
    "get, 32 clients": gets(32),
    "get, 1 client": gets(1),
    "new TLS connection, 8 clients": handshakes(8),
}
PARTS = (
    "", "audit", "encryption", "authorisation", "tally", "cache", "replication",
    "express", "gathering", "loop",
)  # fmt: skip


def measure(work: Work, contender: Contender, seconds: float) -> Sample | None:
    coroutine = work(contender, seconds)
    if coroutine is None:
        return None
    try:
        factory = import_module("uvloop").new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine)


def median(samples: list[Sample]) -> Sample:
    def of(field: str) -> float:
        return statistics.median(getattr(sample, field) for sample in samples)

    return Sample(of("per_s"), of("p50_ms"), of("p99_ms"), of("cpu_us"))


def rounds(
    contenders: list[Contender], names: list[str], count: int, seconds: float
) -> dict[str, dict[str, Sample]]:
    """Medians by work and contender."""
    found: dict[str, dict[str, list[Sample]]] = {name: {} for name in names}
    for number in range(count):
        for name in names:
            for contender in contenders:
                sample = measure(WORK[name], contender, seconds)
                if sample is not None:
                    found[name].setdefault(contender.name, []).append(sample)
        print(f"round {number + 1} of {count} done", file=sys.stderr)
    return {
        name: {who: median(samples) for who, samples in row.items()} for name, row in found.items()
    }


def show(name: str, row: dict[str, Sample], baseline: str) -> None:
    print(f"\n{name}")
    base = row.get(baseline)
    for who, s in row.items():
        ratio = f"{s.per_s / base.per_s:6.2f}x {baseline}" if base and who != baseline else ""
        print(
            f"  {who:24} {s.per_s:9,.0f}/s  p50 {s.p50_ms:7.3f} ms  p99 {s.p99_ms:7.2f} ms  "
            f"cpu {s.cpu_us:6.0f} us  {ratio}"
        )


TARGETS = (
    ("get, 32 clients", "per_s", "etcd", 2.0, "gets/s, 32 clients, against etcd", ">="),
    ("get, 1 client", "p50_ms", "etcd", 0.6, "get p50, 1 client, against etcd", "<="),
    ("set, 32 clients", "per_s", "etcd", 1.25, "sets/s, 32 clients, against etcd", ">="),
    ("set, 1 client", "p50_ms", "etcd", 1.0, "set p50, 1 client, against etcd", "<="),
    ("new TLS connection, 8 clients", "per_s", "floor", 1.0, "connections/s, by the floor", ">="),
    ("get, 32 clients", "cpu_us", "floor", 1.25, "cpu of a get, against the floor", "<="),
)  # fmt: skip


def judge(table: dict[str, dict[str, Sample]]) -> None:
    """The targets of the design, each with what this run found. Under 25 % apart is a tie."""
    print("\ntargets")
    for name, field, other, wanted, text, sense in TARGETS:
        row = table.get(name, {})
        if other not in row or "ours" not in row:
            continue
        ratio = getattr(row["ours"], field) / getattr(row[other], field)
        good = ratio >= wanted if sense == ">=" else ratio <= wanted
        verdict = "met" if good else "missed"
        print(f"  {text:36} {ratio:5.2f}x  (wanted {sense} {wanted}x)  {verdict}")


def compare(args: argparse.Namespace, folder: Path) -> None:
    contenders: list[Contender] = [Ours(folder), Floor(folder)]
    if Etcd.installed():
        contenders.append(Etcd(folder))
    else:
        print("etcd is not installed: ours and the floor only", file=sys.stderr)
    try:
        for contender in contenders:
            contender.start()
        table = rounds(contenders, list(WORK), args.rounds, args.seconds)
    finally:
        for contender in contenders:
            contender.stop()
    for name, row in table.items():
        show(name, row, "etcd" if "etcd" in row else "floor")
    judge(table)


def parts(args: argparse.Namespace, folder: Path) -> None:
    """Ours whole, then with one part off, in turn; only one pair runs at a time."""
    names = ["set, 32 clients", "set, 1 client", "get, 32 clients"]
    found: dict[str, dict[str, list[Sample]]] = {name: {} for name in names}
    for _ in range(args.rounds):
        for part in PARTS:
            contender = Ours(folder, part)
            try:
                contender.start()
                for name in names:
                    sample = measure(WORK[name], contender, args.seconds)
                    if sample is not None:
                        label = f"without {part}" if part else "whole"
                        found[name].setdefault(label, []).append(sample)
            finally:
                contender.stop()
    for name, row in found.items():
        show(name, {who: median(samples) for who, samples in row.items()}, "whole")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--parts", action="store_true", help="each part's cost")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="per measurement")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick or args.parts else 3)
    args.seconds = args.seconds or (1.0 if args.quick else 2.5 if not args.parts else 2.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificate(folder)
        (parts if args.parts else compare)(args, folder)


if __name__ == "__main__":
    main()
