"""The common contract of all four services, checked on this one's real main.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from testkit import contract
from testkit.cluster import NodeView

FOLDER = Path(__file__).resolve().parents[1]


def flags(view: NodeView) -> list[str]:
    return [
        f"--id=node{view.index + 1}",
        f"--raft_addr={view.bind('raft')}",
        f"--http_addr={view.bind('http')}",
        f"--peers={','.join(view.reals('raft'))}",
        f"--peer_http_addrs={','.join(view.reals('http'))}",
        f"--data_dir={view.data_dir}",
    ]


SERVICE = contract.Service(
    name="lock",
    folder=FOLDER,
    main="src/main.py",
    flags=flags,
    channels=("http", "raft"),
    post=("/acquire", {"lock_name": "contract", "client_id": "contract"}),
    required=("lock_name", "client_id"),
    strings=("lock_name", "client_id"),
    get="/locks/contract",
    skip=("/admin/members", "/admin/transfer"),
    peers_flag="--peers",
    link_path="/raft/link",
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
