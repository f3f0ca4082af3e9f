"""The common contract of all four services, checked on this one's real main.py."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from testkit import contract
from testkit.cluster import NodeView
from testkit.sim.loading import load

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


@pytest.mark.cluster
@pytest.mark.timeout(300 + 5 * int(os.environ.get("FUZZ_EXAMPLES", "0")))
def test_every_answer_is_as_documented(target):
    kit = load(str(Path(__file__).with_name("openapi_conformance.py")))

    async def document():
        async with target.cluster.client(0) as client:
            return (await client.get("/openapi.json")).json

    found = kit.conformance(target.cluster.url(0), asyncio.run(document()))
    assert not found.wrong, "\n".join(sorted(found.wrong)[:20])
    assert found.sent > 250
    assert found.refused > 150
