"""The common contract, checked from outside on the real main.py (testkit.contract)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testkit import contract
from testkit.cluster import NodeView

pytestmark = pytest.mark.cluster


def flags(view: NodeView) -> list[str]:
    return [
        f"--id=node{view.index}",
        f"--addr={view.bind()}",
        f"--peers={','.join(f'http://{view.real(other)}' for other in view.others())}",
        f"--data_dir={view.data_dir}",
        "--capacity=10",
    ]


SERVICE = contract.Service(
    name="cache",
    folder=Path(__file__).resolve().parents[1],
    flags=flags,
    post=("/write", {"key": "contract", "value": "x"}),
    required=("key", "value"),
    strings=("key",),
    get="/read?key=contract",
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
