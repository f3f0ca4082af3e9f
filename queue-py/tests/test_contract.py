"""The common contract of all four services, checked on this one's real main.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit import contract
from testkit.cluster import NodeView

FOLDER = Path(__file__).resolve().parents[1]


def flags(view: NodeView) -> list[str]:
    return [
        f"--id=node{view.index}",
        f"--addr={view.bind()}",
        f"--peers={','.join(view.reals())}",
        f"--dataDir={view.data_dir}",
    ]


SERVICE = contract.Service(
    name="queue",
    folder=FOLDER,
    flags=flags,
    post=("/produce", {"queue": "contract", "body": "x"}),
    required=("queue", "body"),
    strings=("queue",),
    get="/queues/contract",
    peers_flag="--peers",
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    with contract.running(SERVICE, tmp_path_factory.mktemp("contract")) as target:
        yield target


@pytest.mark.cluster
@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
async def test_the_common_contract(check, target):
    await check(target)


@pytest.mark.cluster
@pytest.mark.parametrize("check", contract.STARTUP, ids=contract.name)
async def test_start_and_stop(check, tmp_path):
    await check(SERVICE, tmp_path)
