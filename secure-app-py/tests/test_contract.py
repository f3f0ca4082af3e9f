"""The common contract, checked from outside on the real main.py (testkit.contract)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testkit import contract
from testkit.cluster import NodeView

pytestmark = pytest.mark.cluster


FOLDER = Path(__file__).resolve().parents[1]


def flags(view: NodeView) -> list[str]:
    """As in the seed: the primary knows its replica, the replica knows nobody."""
    argv = [f"--id=node{view.index}", f"--addr={view.bind()}", f"--data_dir={view.data_dir}"]
    if view.index == 0 and view.size > 1:
        argv.append(f"--replica=https://{view.real(1)}")
    return argv


SERVICE = contract.Service(
    name="secure",
    folder=FOLDER,
    flags=flags,
    post=("/set", {"key": "contract", "value": "x"}),
    required=("key", "value"),
    strings=("key",),
    get="/get?key=contract",
    size=2,
    scheme="https",
    headers={"Authorization": "Bearer token-admin-123"},
    skip=("/admin/promote",),
    max_body_bytes=2 << 20,
    file_flag="--tokens_file",
    link_path="/peer/stream",
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[contract.Target]:
    with contract.running(SERVICE, tmp_path_factory.mktemp("contract")) as running:
        yield running


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_the_common_contract(check: Any, target: contract.Target) -> None:
    await check(target)


@pytest.mark.parametrize("check", contract.STARTUP, ids=contract.name)
async def test_start_and_stop(check: Any, tmp_path: Path) -> None:
    await check(SERVICE, tmp_path)
