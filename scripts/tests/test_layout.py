"""The four services keep one shape: who has read one finds every room in the others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {
    "distributed-lock-py": ("src", "lock_manager"),
    "queue-py": (".", "message_queue"),
    "cache-py": (".", "mesi_cache"),
    "secure-app-py": (".", "secure_store"),
}
ROOMS = (
    "node.py", "config.py", "logs.py", "metrics.py", "server.py",
    "core/__init__.py", "core/messages.py|core/*/messages.py",
    "core/invariants.py|core/*/invariants.py",
    "storage/__init__.py", "transport/__init__.py",
    "api/routes.py", "api/schemas.py", "api/errors.py", "api/keys.py", "api/openapi.py",
    "dashboard/index.html",
)  # fmt: skip
BESIDE = ("README.md", "DESIGN.md", "requirements.txt", "pyproject.toml", "tests", "bench")
TOP = (
    "README.md", "README.id.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile",
    "pyproject.toml", ".pre-commit-config.yaml", ".ci/run", "testkit", "scripts",
)  # fmt: skip


@pytest.fixture(params=sorted(SERVICES))
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def package_of(service: str) -> Path:
    folder, package = SERVICES[service]
    return ROOT / service / folder / package


@pytest.mark.parametrize("name", TOP)
def test_the_top_level_is_as_the_overview_says(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("room", ROOMS)
def test_every_service_has_every_room_under_the_same_name(service: str, room: str) -> None:
    package = package_of(service)
    assert any(list(package.glob(pattern)) for pattern in room.split("|")), f"{package}/{room}"


@pytest.mark.parametrize("name", BESIDE)
def test_every_service_has_its_manual_its_reasons_and_its_requirements(
    service: str, name: str
) -> None:
    assert (ROOT / service / name).exists()


def test_nothing_beside_main_py_shadows_the_standard_library(service: str) -> None:
    # `python main.py` puts the folder first on the path: a queue.py there breaks asyncio.
    folder = package_of(service).parent
    names = {path.name.removesuffix(".py") for path in folder.iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_requirements_are_pinned(service: str) -> None:
    lines = (ROOT / service / "requirements.txt").read_text().split("\n")
    required = [line for line in lines if line.strip() and not line.startswith("#")]
    assert required
    assert all(re.match(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?==[0-9]", line) for line in required), (
        required
    )


def test_the_manual_is_whole_without_the_design_pages(service: str) -> None:
    for name in ("README.md", "DESIGN.md"):
        assert "../shared" not in (ROOT / service / name).read_text(encoding="utf-8")


def test_no_file_holds_two_nouns(service: str) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in package_of(service).rglob("*.py")
        if (lines := path.read_text(encoding="utf-8").count("\n")) > 500
    }
    assert not long


def test_powershell_and_bash_scripts_come_in_pairs() -> None:
    bash = {path.stem for path in (ROOT / "scripts").glob("*.sh")}
    powershell = {path.stem for path in (ROOT / "scripts").glob("*.ps1")}
    assert bash >= {"start", "stop", "demo", "test"}
    assert bash == powershell
