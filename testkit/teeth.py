"""Plants known bugs, one at a time, and demands that the tests catch each.

`python -m testkit.teeth SERVICE_FOLDER [ID…] [--workers 2]` reads the service's `tests/teeth.toml`.
For every bug: copy the service and testkit to a temporary folder, replace `old` by `new` in `file`,
run the tests under `catch`; at least one of them must fail. First the same tests run on a clean
copy, where all must pass: a test that always fails catches nothing.

A run that hangs, or a test that pytest-timeout ends, has noticed something too, but names nothing:
such rows are marked HUNG and counted apart. Rows that took longer than a minute are named at the
end: they want a test of their own.

Exit code 0 if every bug was caught; 1 if one survived or its patch no longer applies.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
TIMEOUT_S: Final = 300.0
CLEAN_TIMEOUT_S: Final = 3_600.0
"""All tests of the table together, on a machine that has other things to do."""
SLOW_S: Final = 60.0
IGNORED: Final = shutil.ignore_patterns("__pycache__", "data", ".*", "*.log", "node_modules")
_FAILED: Final = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Bug:
    """One planted bug, as teeth.toml has it."""

    id: str
    file: str
    old: str
    new: str
    catch: tuple[str, ...]
    why: str
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bite:
    """What became of a bug. `by` names the test that failed and what it said; empty if none."""

    bug: Bug
    caught: bool
    by: str
    seconds: float
    output: str = ""
    hung: bool = False
    """Nothing failed by itself: it took too long."""

    @property
    def verdict(self) -> str:
        """For the table."""
        if not self.caught:
            return "SURVIVED"
        return f"HUNG: {self.by}" if self.hung else self.by


class TeethError(Exception):
    """The table itself is wrong: unreadable, or a patch that does not apply."""


def load(table: Path) -> list[Bug]:
    """The bugs of a teeth.toml; TeethError names what is wrong in it."""
    try:
        entries: list[dict[str, Any]] = tomllib.loads(table.read_text())["bug"]
        bugs = [Bug(**{**entry, "catch": tuple(entry["catch"])}) for entry in entries]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise TeethError(f"{table}: {type(error).__name__}: {error}") from error
    ids = [bug.id for bug in bugs]
    twice = {each for each in ids if ids.count(each) > 1}
    if twice:
        raise TeethError(f"{table}: the same id twice: {', '.join(sorted(twice))}")
    return bugs


def apply(bug: Bug, folder: Path) -> None:
    """Plant the bug in a copy of the service. TeethError unless `old` is there exactly once."""
    path = folder / bug.file
    if not path.is_file():
        raise TeethError(f"{bug.id}: there is no {bug.file}")
    text = path.read_text()
    found = text.count(bug.old)
    if found != 1 or bug.old == bug.new:
        raise TeethError(f"{bug.id}: `old` occurs {found} times in {bug.file}, expected once")
    path.write_text(text.replace(bug.old, bug.new))


def _copy(service: Path, to: Path) -> Path:
    """The repository as the tests need it: configuration, testkit, this service."""
    folder = to / service.name
    shutil.copytree(service, folder, ignore=IGNORED)
    shutil.copytree(ROOT / "testkit", to / "testkit", ignore=IGNORED)
    shutil.copy(ROOT / "pyproject.toml", to)
    return folder


def _pytest(
    folder: Path, tests: Sequence[str], env: dict[str, str], timeout_s: float
) -> tuple[int, str]:
    """Run tests inside a copy; pytest's exit code (1: failed as wanted, -1: hung), its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "--no-header"]
    command += [f"{folder.name}/{test}" for test in tests]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH"))}
    with tempfile.TemporaryFile() as sink:
        child = subprocess.Popen(
            command,
            cwd=folder.parent,
            env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(child)
        sink.seek(0)
        return code, sink.read().decode(errors="replace")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nobody of a hung or interrupted run stays: nodes share pytest's process group."""
    if child.poll() is not None:
        return
    if sys.platform == "win32":
        child.kill()
    else:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def bite(service: Path, bug: Bug) -> Bite:
    """Plant one bug and run its tests. A hang counts as caught; an error of collection does not."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="teeth-") as where:
        folder = _copy(service, Path(where))
        apply(bug, folder)
        code, output = _pytest(folder, bug.catch, bug.env, TIMEOUT_S)
    took_s = time.monotonic() - began
    if code == -1:
        return Bite(bug, True, f"no end within {TIMEOUT_S:.0f} s", took_s, output, hung=True)
    failed = _FAILED.search(output)
    # Code 1 is "tests failed"; 2 and up are pytest's own troubles (no such test, broken import).
    by = ""
    if failed is not None:
        by = failed[1].removeprefix(service.name + "/").replace("::", " ", 1)
        by += f": {failed[2].partition(': ')[2] or failed[2]}"[:100] if failed[2] else ""
    return Bite(bug, code == 1, by, took_s, output, hung="from pytest-timeout" in output)


def check_clean(service: Path, bugs: Sequence[Bug]) -> str:
    """Run every named test without a bug; the output if one fails, else an empty string."""
    groups: dict[tuple[tuple[str, str], ...], set[str]] = {}
    for bug in bugs:
        groups.setdefault(tuple(sorted(bug.env.items())), set()).update(bug.catch)
    with tempfile.TemporaryDirectory(prefix="teeth-") as where:
        folder = _copy(service, Path(where))
        for env, tests in groups.items():
            code, output = _pytest(folder, sorted(tests), dict(env), CLEAN_TIMEOUT_S)
            if code != 0:
                return output
    return ""


def run(service: Path, only: Sequence[str] = (), workers: int = 2, *, clean: bool = True) -> int:
    """The whole table, printed as it goes; the exit code. `clean` False: the tests are known to
    pass without a bug."""
    bugs = load(service / "tests" / "teeth.toml")
    unknown = set(only) - {bug.id for bug in bugs}
    if unknown:
        raise TeethError(f"no such bug: {', '.join(sorted(unknown))}")
    bugs = [bug for bug in bugs if not only or bug.id in only]
    for bug in bugs:  # all patches first: a stale one is told in a second, not in minutes
        _applies(service, bug)
    broken = check_clean(service, bugs) if clean else ""
    if broken:
        print(f"the tests fail without any bug:\n{broken}")
        return 1
    bites = []
    width = max((len(bug.id) for bug in bugs), default=0)
    print(f"{'planted bug':<{width}}  seconds  caught by")
    with ThreadPoolExecutor(workers) as pool:
        for bitten in pool.map(lambda bug: bite(service, bug), bugs):
            bites.append(bitten)
            print(
                f"{bitten.bug.id:<{width}}  {bitten.seconds:5.1f} s  {bitten.verdict}", flush=True
            )
    return _summary(bites)


def _summary(bites: Sequence[Bite]) -> int:
    """What the table says as a whole; the exit code."""
    survivors = [bitten for bitten in bites if not bitten.caught]
    for bitten in survivors:
        print(f"\n{bitten.bug.id} survived: {bitten.bug.why}\n{bitten.output[-2000:]}")
    print(f"\n{len(bites) - len(survivors)} of {len(bites)} planted bugs caught")
    if hung := [bitten.bug.id for bitten in bites if bitten.caught and bitten.hung]:
        print(f"{len(hung)} of these only by taking too long: {', '.join(hung)}")
    if slow := [bitten.bug.id for bitten in bites if bitten.seconds > SLOW_S]:
        print(f"longer than {SLOW_S:.0f} s: {', '.join(slow)}")
    return 1 if survivors else 0


def _applies(service: Path, bug: Bug) -> None:
    with tempfile.TemporaryDirectory(prefix="teeth-") as where:
        target = Path(where) / bug.file
        target.parent.mkdir(parents=True)
        source = service / bug.file
        if source.is_file():
            shutil.copy(source, target)
        apply(bug, Path(where))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testkit.teeth", description=__doc__)
    parser.add_argument("service", type=Path, help="folder of the service, e.g. queue-py")
    parser.add_argument("ids", nargs="*", help="only these bugs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--known_clean", action="store_true", help="the tests have just passed: do not run them "
        "without a bug first (for a table in parts)",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        return run(
            (ROOT / arguments.service).resolve(),
            arguments.ids,
            arguments.workers,
            clean=not arguments.known_clean,
        )
    except TeethError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
