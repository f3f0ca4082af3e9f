"""The common contract of the four services, checked from outside on their real main.py.

In a service's tests/test_contract.py:

    SERVICE = contract.Service(name="cache", folder=FOLDER, flags=flags, post=("/write", {...}), …)

    @pytest.fixture(scope="module")
    def target(tmp_path_factory):
        with contract.running(SERVICE, tmp_path_factory.mktemp("contract")) as target:
            yield target

    @pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
    async def test_the_common_contract(check, target): await check(target)

    @pytest.mark.parametrize("check", contract.STARTUP, ids=contract.name)
    async def test_start_and_stop(check, tmp_path): await check(SERVICE, tmp_path)
"""

from collections.abc import Callable
from typing import Any, Final

from testkit.contract import answers, fuzz, peers, requests, startup
from testkit.contract.service import Service, Target, running

CHECKS: Final = (*answers.CHECKS, *requests.CHECKS, *fuzz.CHECKS, *peers.CHECKS)
STARTUP: Final = (*startup.CHECKS, *peers.STARTUP)


def name(check: Callable[..., Any]) -> str:
    """A test id: the check's name."""
    return check.__name__


__all__ = ["CHECKS", "STARTUP", "Service", "Target", "name", "running"]
