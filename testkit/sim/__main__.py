"""`python -m testkit.sim WHAT [--seed N] [--seeds N] [--verbose]`: replay one seed, or run many.

WHAT is `lock`, `queue`, `cache` or `secure` (the service's tests/sim/harness.py), a path to a .py
file, or a module; each may end in `:NAME`, a scenario's name or variable (default: all of them).
"""

from __future__ import annotations

import argparse
import sys

from testkit.sim.driver import Scenario, main_run
from testkit.sim.loading import load, scenarios


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testkit.sim", description=__doc__)
    parser.add_argument("what")
    parser.add_argument("--seed", type=int, default=0, help="the first (or only) seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--verbose", action="store_true", help="print every event of one seed")
    arguments = parser.parse_args()
    what, _, name = arguments.what.partition(":")
    try:
        found = scenarios(what)
        chosen = list(found.values())
        if name:
            one = found.get(name) or getattr(load(what), name, None)
            if not isinstance(one, Scenario):
                parser.error(f"no scenario {name!r} in {what}; there are: {', '.join(found)}")
            chosen = [one]
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    if not chosen:
        parser.error(f"no scenario in {what}")
    return main_run(chosen, arguments.seed, arguments.seeds, verbose=arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
