"""Finds a service's scenarios by a short name, wherever the test was started.

pytest runs with --import-mode=importlib, so a test cannot import the harness beside it by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from testkit.sim.driver import Scenario

ROOT: Final = Path(__file__).resolve().parents[2]
SERVICES: Final = {
    "lock": "distributed-lock-py",
    "queue": "queue-py",
    "cache": "cache-py",
    "secure": "secure-app-py",
}
SOURCES: Final = ("distributed-lock-py/src", "queue-py", "cache-py", "secure-app-py")


def load(what: str) -> ModuleType:
    """The module that holds scenarios: `lock` (tests/sim/harness.py), a .py path, or a module.

    A file is loaded once per process. FileNotFoundError or ImportError if there is none.
    """
    for source in SOURCES:
        if str(ROOT / source) not in sys.path:
            sys.path.append(str(ROOT / source))
    if what in SERVICES:
        what = str(ROOT / SERVICES[what] / "tests" / "sim" / "harness.py")
    if not what.endswith(".py"):
        return importlib.import_module(what)
    path = Path(what).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no such simulation: {path}")
    # One name per path: four services have a harness.py, and one pytest process loads them all.
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def scenarios(what: str) -> dict[str, Scenario[Any]]:
    """The module's scenarios by their name, in order of definition; also those in its lists."""
    found: dict[str, Scenario[Any]] = {}
    for value in vars(load(what)).values():
        for scenario in value if isinstance(value, list | tuple) else (value,):
            if isinstance(scenario, Scenario):
                found.setdefault(scenario.name, scenario)
    return found
