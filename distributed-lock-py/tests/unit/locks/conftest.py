"""The machine under test, as a leader has it."""

from __future__ import annotations

import pytest

from .driver import Driver


@pytest.fixture
def locks() -> Driver:
    driver = Driver()
    driver.new_leader()
    return driver
