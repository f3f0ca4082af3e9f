"""Litmus tests: outcomes that sequential consistency forbids must never be seen.

`python litmus.py FILE.json… [--runs 10000] [--seed N] [--cluster]`

Each test is played `--runs` times in the simulation, by seed: delays, reordering, losses,
evictions, leases that run out. With --cluster, 200 times on three real processes instead. Prints
`NAME ok` or `NAME FAILED seed N: what was seen`, then `N passed, M failed`; exit code 0 only if all
passed, 2 for a file that is no litmus file. The format is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # testkit
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mesi_cache
sys.path.insert(0, str(Path(__file__).resolve().parent))

from litmus_table import Inconclusive, Table, Test, WatchedTable

MAIN = Path(__file__).resolve().parents[2] / "main.py"
CHUNK = 500
CLUSTER_RUNS = 200


class BadFile(Exception):
    """Not a litmus file; the text says where."""


@dataclass
class Verdict:
    """`seen` is empty if the forbidden outcome never was."""

    runs: int = 0
    inconclusive: int = 0
    seed: int = -1
    seen: str = ""


def load(path: str) -> list[Test]:
    """The tests of one file; raises BadFile."""
    try:
        tests = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadFile(f"{path}: {e}") from e
    if not isinstance(tests, list):
        raise BadFile(f"{path}: expected a list of tests")
    for test in tests:
        _check(path, test)
    return tests


def _check(path: str, test: Any) -> None:
    if not isinstance(test, dict) or not {"name", "threads", "forbidden"} <= test.keys():
        raise BadFile(f"{path}: a test needs name, threads and forbidden")
    name, threads, forbidden = test["name"], test["threads"], test["forbidden"]
    if not isinstance(name, str) or not name or not name.isprintable():
        raise BadFile(f"{path}: a test's name is a printable text, not {name!r}")
    where = f"{path}: {name}"
    if not isinstance(threads, list) or not all(isinstance(thread, list) for thread in threads):
        raise BadFile(f"{where}: threads is a list of lists")
    keys: set[str] = set()
    registers: set[str] = set()
    for operation in (operation for thread in threads for operation in thread):
        match operation:
            case ["w", str(key), int(value)] if _is_value(value):
                keys.add(key)
            case ["r", str(key), str(register)]:
                keys.add(key)
                registers.add(register)
            case _:
                raise BadFile(
                    f'{where}: expected ["w",key,integer] or ["r",key,register], not {operation!r}'
                )
    if not isinstance(forbidden, dict) or not all(map(_is_value, forbidden.values())):
        raise BadFile(f"{where}: forbidden gives an integer for each of its names")
    if unknown := forbidden.keys() - keys - registers:
        raise BadFile(f"{where}: forbidden names no register or key of the test: {sorted(unknown)}")
    if both := forbidden.keys() & keys & registers:
        raise BadFile(f"{where}: a key or a register? {sorted(both)}")


def _is_value(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def judge(test: Test, outcome: dict[str, int]) -> str:
    """What was seen, if it is forbidden. Where nothing is, the test only has to come to an end."""
    forbidden = test["forbidden"]
    if forbidden and all(outcome.get(name) == value for name, value in forbidden.items()):
        return " ".join(f"{name}={value}" for name, value in sorted(outcome.items()))
    return ""


def simulate(test: Test, seeds: range) -> Verdict:
    """Play `test` for each seed; stops at the first forbidden outcome."""
    verdict = Verdict()
    gc.disable()  # a chunk leaves little behind, and looking for it all the time takes a tenth
    gc.collect()
    for seed in seeds:
        try:
            outcome = Table(test, seed).play()
        except Inconclusive:
            verdict.inconclusive += 1
            continue
        except AssertionError as stuck:
            verdict.runs, verdict.seed, verdict.seen = verdict.runs + 1, seed, str(stuck)
            break
        verdict.runs += 1
        seen = judge(test, outcome)
        if seen:
            verdict.seed, verdict.seen = seed, seen
            break
    return verdict


def watch(test: Test, seeds: range) -> tuple[set[int], Counter[str]]:
    """The orders of events that these seeds lead to, and what they met."""
    orders: set[int] = set()
    met: Counter[str] = Counter()
    for seed in seeds:
        table = WatchedTable(test, seed)
        table.play()
        orders.add(table.order)
        met.update(table.met)
    return orders, met


def coverage(tests: list[Test], seeds: range) -> None:
    """Print, for each test, how many orders of events these seeds lead to, and what they met."""
    for test in tests:
        orders, met = watch(test, seeds)
        met = Counter({name: n for name, n in met.items() if n})
        told = " ".join(f"{name}={n}" for name, n in sorted(met.items()))
        print(f"{test['name']} runs={len(seeds)} orders={len(orders)} {told}")


def in_simulation(tests: list[Test], seeds: range) -> list[Verdict]:
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts: list[list[Future[Verdict]]] = [
            [pool.submit(simulate, test, chunk) for chunk in chunks] for test in tests
        ]
        return [_sum(part.result() for part in of_test) for of_test in parts]


def _sum(parts: Iterable[Verdict]) -> Verdict:
    total = Verdict()
    for part in parts:
        total.runs += part.runs
        total.inconclusive += part.inconclusive
        if part.seen and not total.seen:
            total.seed, total.seen = part.seed, part.seen
    return total


# --- on real processes --------------------------------------------------------------------------


async def on_processes(tests: list[Test], runs: int) -> list[Verdict]:
    from testkit.cluster import Cluster, NodeView

    def argv(view: NodeView) -> list[str]:
        members = ",".join(f"http://{view.real(other)}" for other in view.others())
        return [
            sys.executable, str(MAIN), f"--addr={view.bind()}", f"--peers={members}",
            f"--id=node{view.index}", "--capacity=4", f"--data_dir={view.data_dir}",
            "--log_level=warning",
        ]  # fmt: skip

    with tempfile.TemporaryDirectory() as root:
        async with Cluster(argv, 3, root=Path(root)) as cluster:
            return [await _play(cluster, at, test, runs) for at, test in enumerate(tests)]


async def _play(cluster: Any, place: int, test: Test, runs: int) -> Verdict:
    """Several runs side by side, each on keys of its own (`place` tells tests apart)."""
    verdict = Verdict()
    numbers = count()
    threads = test["threads"]
    keys = sorted({op[1] for thread in threads for op in thread})

    async def lane() -> None:
        clients = [cluster.client(number % cluster.size) for number in range(len(threads))]
        try:
            while (number := next(numbers)) < runs and not verdict.seen:
                outcome = await _once(clients, test, f".{place}.{number}", keys, number)
                if outcome is None:
                    verdict.inconclusive += 1
                    continue
                verdict.runs += 1
                seen = judge(test, outcome)
                if seen and not verdict.seen:
                    verdict.seed, verdict.seen = number, seen
        finally:
            for client in clients:
                client.close()

    await asyncio.gather(*(lane() for _ in range(4)))
    return verdict


async def _once(
    clients: list[Any], test: Test, suffix: str, keys: list[str], number: int
) -> dict[str, int] | None:
    outcome: dict[str, int] = {}

    async def write(client: Any, key: str, value: int) -> None:
        reply = await client.post("/write", {"key": key + suffix, "value": value}, timeout_s=8.0)
        if getattr(reply, "status", 0) != 200:
            raise Inconclusive(str(reply))

    async def read(client: Any, key: str) -> int:
        reply = await client.get(f"/read?key={quote(key + suffix)}", timeout_s=8.0)
        if getattr(reply, "status", 0) != 200:
            raise Inconclusive(str(reply))
        return int(reply.json["value"])

    async def play(client: Any, thread: list[list[Any]]) -> None:
        for kind, key, third in thread:
            if kind == "w":
                await write(client, key, third)
            else:
                outcome[third] = await read(client, key)

    try:
        for place, key in enumerate(keys):
            await write(clients[(number + place) % len(clients)], key, 0)
            if number % 2:  # an old copy somewhere else
                await read(clients[(number + place + 1) % len(clients)], key)
        await asyncio.gather(*map(play, clients, test["threads"]))
        for key in keys:
            outcome[key] = await read(clients[number % len(clients)], key)
    except Inconclusive:
        return None
    return outcome


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--runs", type=int, default=0, help="of each test (10000; cluster 200)")
    parser.add_argument(
        "--seed", type=int, default=None, help="play only this one, or --runs from it on"
    )
    parser.add_argument("--cluster", action="store_true", help="on three real processes")
    parser.add_argument("--coverage", action="store_true", help="say what the seeds lead to")
    args = parser.parse_args(argv)
    try:
        tests = [test for path in args.files for test in load(path)]
    except BadFile as e:
        print(f"litmus.py: error: {e}", file=sys.stderr)
        return 2
    if args.coverage:
        coverage(tests, range(args.seed or 0, (args.seed or 0) + (args.runs or 1_000)))
        return 0
    if args.cluster:
        verdicts = asyncio.run(on_processes(tests, args.runs or CLUSTER_RUNS))
    else:
        first, runs = (0, args.runs or 10_000) if args.seed is None else (args.seed, args.runs or 1)
        verdicts = in_simulation(tests, range(first, first + runs))
    failed = 0
    for test, verdict in zip(tests, verdicts, strict=True):
        if verdict.seen:
            print(f"{test['name']} FAILED seed {verdict.seed}: {verdict.seen}")
        elif verdict.runs == 0 or verdict.inconclusive > verdict.runs:
            print(f"{test['name']} FAILED seed 0: {verdict.inconclusive} runs without an answer")
        else:
            print(f"{test['name']} ok")
            continue
        failed += 1
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
