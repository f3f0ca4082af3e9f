"""The order of test files when several processes share them: `pytest -p testkit.ordering`.

Tests of real processes mostly wait, the others mostly compute. By default pytest-xdist hands out
the files with the most tests first: those that compute all at once, those that wait after them, and
one worker ends long after the others. Here the two kinds take turns, so that one computes while
others wait, and short files are left for the end. Only the order changes, never what runs.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Protocol, TypeVar

import pytest


class Collected(Protocol):
    """What this needs of a pytest.Item."""

    @property
    def nodeid(self) -> str: ...

    def get_closest_marker(self, name: str) -> object | None: ...


T = TypeVar("T", bound=Collected)


def taking_turns(tests: list[T]) -> list[T]:
    """The same tests, those of a file together and in their order."""
    files: dict[str, list[T]] = {}
    for test in tests:
        files.setdefault(test.nodeid.partition("::")[0], []).append(test)
    waiting = [file for file in files.values() if _marked(file, "cluster")]
    computing = [file for file in files.values() if not _marked(file, "cluster")]
    computing.sort(key=lambda file: not _marked(file, "sim"))
    turns = zip_longest(waiting, computing, fillvalue=list[T]())
    return list(chain.from_iterable(chain.from_iterable(turns)))


def _marked(file: list[T], name: str) -> bool:
    return any(test.get_closest_marker(name) is not None for test in file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = taking_turns(items)
