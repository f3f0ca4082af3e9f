"""`python -m testkit.sim WHAT [--seed N] [--seeds N] [--verbose]`: replay one seed, or run many.

WHAT is `lock`, `queue`, `cache` or `secure` (the service's tests/sim/harness.py), a path to a .py
file, or a module; each may end in `:NAME`, a Scenario in it (default: all of them).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from testkit.sim.driver import Scenario, main_run

ROOT: Final = Path(__file__).resolve().parents[2]
SERVICES: Final = {
    "lock": "distributed-lock-py",
    "queue": "queue-py",
    "cache": "cache-py",
    "secure": "secure-app-py",
}
SOURCES: Final = ("distributed-lock-py/src", "queue-py", "cache-py", "secure-app-py")


def load(what: str) -> ModuleType:
    """The module that holds the scenarios."""
    for source in SOURCES:
        if str(ROOT / source) not in sys.path:
            sys.path.append(str(ROOT / source))
    if what in SERVICES:
        what = str(ROOT / SERVICES[what] / "tests" / "sim" / "harness.py")
    if not what.endswith(".py"):
        return importlib.import_module(what)
    path = Path(what).resolve()
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"no such simulation: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def find(module: ModuleType, name: str) -> list[Scenario[Any]]:
    """The named scenario, or all of the module's, in order of definition."""
    if name:
        return [getattr(module, name)]
    found: dict[str, Scenario[Any]] = {}
    for value in vars(module).values():
        for scenario in value if isinstance(value, list | tuple) else (value,):
            if isinstance(scenario, Scenario):
                found.setdefault(scenario.name, scenario)
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testkit.sim", description=__doc__)
    parser.add_argument("what")
    parser.add_argument("--seed", type=int, default=0, help="the first (or only) seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--verbose", action="store_true", help="print every event of one seed")
    arguments = parser.parse_args()
    what, _, name = arguments.what.partition(":")
    scenarios = find(load(what), name)
    if not scenarios:
        parser.error(f"no Scenario in {what}")
    return main_run(scenarios, arguments.seed, arguments.seeds, verbose=arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
