"""The small clusters that are explored: two and three nodes, one and two keys, every mishap.

`python model_cases.py [NAME…] [--worlds N] [--all]` explores and prints how many worlds there are.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mesi_cache
sys.path.insert(0, str(Path(__file__).resolve().parent))

from explore import Ask, Budget, Case, Named, Script, explore

from mesi_cache.core.placement import Placement
from mesi_cache.core.records import Cas, Delete, Incr, Write

Asks = list[Ask]
RESENT, LAPSED, OVER = 720, 975, 1100  # see Budget


def _key(home: str, *names: str) -> str:
    placement = Placement(list(names))
    return next(k for k in (f"k{i}" for i in range(100)) if placement.home(k) == home)


X2, Y2 = (_key(home, "a", "b") for home in "ab")
X3, Y3 = (_key(home, "a", "b", "c") for home in "ab")
ONE, TWO, READ = Write(b"1"), Write(b"2"), None
MORE = Incr(1)
NAMED = Named("mine", Incr(1))
NAMED_CAS = Named("mine", Cas(1, b"9"))  # with or without effect, by what has come before


def two_nodes(a: Asks, b: Asks) -> dict[str, Script]:
    return {"a": [(X2, o) for o in a], "b": [(X2, o) for o in b]}


def three_nodes(a: Asks, b: Asks, c: Asks) -> dict[str, Script]:
    """The key's home is a."""
    return {"a": [(X3, o) for o in a], "b": [(X3, o) for o in b], "c": [(X3, o) for o in c]}


# Those that the suite explores to the end at every run.
SMALL: dict[str, Case] = {
    "two writers who read back": Case(two_nodes([ONE, READ], [TWO, READ])),
    "a write, a read and an eviction": Case(two_nodes([ONE, READ], [READ, TWO]), Budget(evict=1)),
    "a delete, a compare-and-set and a read": Case(
        two_nodes([ONE, Delete()], [Cas(1, b"2"), READ])
    ),
    "a repeated message": Case(two_nodes([ONE], [TWO, READ]), Budget(repeat=1, evict=1)),
    "a lost message and time": Case(
        two_nodes([], [MORE, READ]), Budget(drop=1, time=(RESENT, OVER)), most_letters=3
    ),
    "a crash of home or owner": Case(
        two_nodes([], [MORE, MORE]), Budget(crash=1, time=(OVER,)), most_letters=3
    ),
    "leases that lapse": Case(
        two_nodes([MORE], [READ]), Budget(time=(LAPSED, OVER)), most_letters=3
    ),
    "two keys, each written here and read there": Case(
        {"a": [(X2, ONE), (Y2, READ)], "b": [(Y2, ONE), (X2, READ)]}
    ),
    "three nodes, two that write": Case(
        three_nodes([], [MORE, READ], [MORE, READ]), alike=("b", "c")
    ),
    "three nodes, a change under two readers": Case(
        three_nodes([MORE], [READ], [READ]), Budget(evict=1), alike=("b", "c"), most_letters=3
    ),
    "three nodes, two keys": Case(
        {"a": [(Y3, READ)], "b": [(X3, ONE)], "c": [(X3, READ), (Y3, ONE)]}, most_letters=3
    ),
    "a named change, asked for again on the other node": Case(
        two_nodes([NAMED], [NAMED]), Budget(drop=1, crash=1, time=(OVER,)), most_letters=3
    ),
    "a named change without effect": Case(
        two_nodes([ONE, NAMED_CAS], [NAMED_CAS]), Budget(crash=1, time=(OVER,)), most_letters=3
    ),
}
# Those that take minutes.
LARGE: dict[str, Case] = {
    "three nodes, a named change, a crash": Case(
        three_nodes([ONE], [NAMED_CAS], [NAMED_CAS]),
        Budget(crash=1, drop=1, time=(OVER,)), alike=("b", "c"), most_letters=3,
    ),
    "a named change, whatever happens": Case(
        two_nodes([NAMED], [MORE, NAMED]),
        Budget(drop=1, crash=1, evict=1, time=(OVER,)), most_letters=3,
    ),
    "three nodes that read and change": Case(
        three_nodes([READ], [MORE, READ], [MORE, READ]), alike=("b", "c"), most_letters=5
    ),
    "a lost message between readers": Case(
        two_nodes([ONE], [READ, READ]), Budget(drop=1, repeat=1, time=(RESENT, OVER))
    ),
    "a crash, and leases": Case(
        two_nodes([MORE], [MORE, READ]),
        Budget(crash=1, time=(RESENT, OVER, RESENT)),
        most_letters=3,
    ),
    "three nodes, a crash, and leases": Case(
        three_nodes([], [MORE], [MORE]), Budget(crash=1, time=(OVER, RESENT)), alike=("b", "c"),
        most_letters=3,
    ),
    "three nodes, somebody sleeps": Case(
        three_nodes([], [MORE, READ], [READ, MORE]), Budget(drop=1, sleep=1, time=(LAPSED, OVER)),
        most_letters=3,
    ),
    "two keys, evictions and a lost message": Case(
        {"a": [(X2, ONE), (Y2, READ)], "b": [(Y2, ONE), (X2, READ)]},
        Budget(drop=1, evict=1, time=(RESENT, OVER)),
    ),
    "three nodes, two keys, evictions": Case(
        {"a": [(Y3, ONE), (X3, READ)], "b": [(X3, ONE)], "c": [(X3, READ), (Y3, READ)]},
        Budget(evict=1),
    ),
}  # fmt: skip


def _peak_mb() -> int:
    """The largest this process has been; 0 where that is not told (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases (all the small ones)")
    parser.add_argument("--worlds", type=int, default=1_000_000, help="at most (1,000,000)")
    parser.add_argument("--all", action="store_true", help="the large ones as well")
    arguments = parser.parse_args(argv)
    cases = {**SMALL, **LARGE}
    names = arguments.names or list(cases if arguments.all else SMALL)
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"no such case: {unknown[0]!r}; there are: {', '.join(cases)}")
    for name in names:
        began = time.perf_counter()
        explored = explore(cases[name], most_worlds=arguments.worlds)
        took_s = time.perf_counter() - began
        print(f"{name}: {explored} in {took_s:.1f} s, at most {_peak_mb()} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
