"""The fixture that most tests here want: a copy of the scripts in a path with spaces."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tests.copies import Copy, stand_in_copy


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    with stand_in_copy(tmp_path / "a path with spaces") as made:
        yield made
