"""The contract's checks have teeth: a node that keeps none of it fails nearly all of them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from testkit import contract
from testkit.cluster import NodeView

pytestmark = pytest.mark.cluster

SERVICE: Final = contract.Service(
    name="echo",
    folder=Path(__file__).parent,
    main="echo_node.py",
    flags=lambda view: ["--addr", view.bind(), "--data_dir", str(view.data_dir)],
    post=("/echo", {"text": "x"}),
    required=("text",),
    strings=("text",),
    get="/readyz",
    size=1,
    link_path=None,
)
# What even a node that only echoes does right.
KEPT: Final = (
    "the_post_and_the_get_work",
    "json_is_read_whatever_the_content_type",
    "odd_text_is_never_a_500",
    "garbage_on_the_peer_link_does_no_harm",
    "strangers_stay_out_of_a_guarded_cluster",
    "what_needs_authorization_says_401_without",
    "a_peer_list_without_the_node_itself_is_refused",
    # These wait for /healthz, which it has not: nothing but a deadline to see.
    "a_foreign_data_directory_is_refused",
    "the_folder_runs_alone_from_a_path_with_spaces",
)


def _fails(checks: tuple[Any, ...]) -> list[Any]:
    return [check for check in checks if contract.name(check) not in KEPT]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[contract.Target]:
    with contract.running(SERVICE, tmp_path_factory.mktemp("contract")) as running:
        yield running


@pytest.mark.parametrize("check", _fails(contract.CHECKS), ids=contract.name)
async def test_a_node_without_a_contract_fails(check: Any, target: contract.Target) -> None:
    with pytest.raises((AssertionError, KeyError, ValueError)):
        await check(target)


@pytest.mark.parametrize("check", _fails(contract.STARTUP), ids=contract.name)
async def test_a_careless_start_fails(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract.startup, "REFUSAL_S", 2.0)  # one check waits for a refusal in vain
    with pytest.raises(AssertionError):
        await check(SERVICE, tmp_path)


def test_flags_are_replaced_in_either_form() -> None:
    replaced = contract.startup._with
    assert replaced(["--id", "a", "--x=1"], "--id", "b") == ["--id", "b", "--x=1"]
    assert replaced(["--id", "a", "--x=1"], "--x", "2") == ["--id", "a", "--x=2"]
    assert replaced([sys.executable], "--new", "1") == [sys.executable, "--new=1"]


def test_every_check_has_a_name_of_its_own() -> None:
    names = [contract.name(check) for check in (*contract.CHECKS, *contract.STARTUP)]
    assert len(set(names)) == len(names)
    view = NodeView(0, 1, Path("d"), {(0, "http"): "127.0.0.1:1"}, {})
    assert SERVICE.command(view)[2:4] == ["--addr", "127.0.0.1:1"]
