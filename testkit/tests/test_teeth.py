"""The teeth runner, on a service of three lines: caught, survived, stale, broken."""

from pathlib import Path

import pytest

from testkit import teeth

BUG = """
[[bug]]
id = "{id}"
file = "toy/sums.py"
old = "{old}"
new = "{new}"
catch = ["tests/test_sums.py::{test}"]
why = "sums must add"
"""


@pytest.fixture
def service(tmp_path: Path) -> Path:
    folder = tmp_path / "toy-py"
    (folder / "toy").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "toy" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (folder / "tests" / "test_sums.py").write_text(
        "import sys, pathlib\n"
        "sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))\n"
        "from toy.sums import add\n"
        "def test_add(): assert add(1, 2) == 3\n"
        "def test_zero(): assert add(0, 0) == 0\n"
    )
    return folder


def table(service: Path, *rows: dict[str, str]) -> None:
    text = "".join(BUG.format(**row) for row in rows)
    (service / "tests" / "teeth.toml").write_text(text)


MINUS = {"id": "minus", "old": "a + b", "new": "a - b", "test": "test_add"}


def test_a_bug_is_caught_or_told_to_have_survived(
    service: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(service, MINUS, {**MINUS, "id": "blind", "test": "test_zero"})
    assert teeth.run(service) == 1
    printed = capsys.readouterr().out
    assert "test_sums.py test_add: " in printed
    assert "s  SURVIVED" in printed
    assert "1 of 2 planted bugs caught" in printed
    assert "a + b" in (service / "toy" / "sums.py").read_text(), "the original is never touched"


def test_a_hang_is_said_and_counted_apart(
    service: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (service / "tests" / "test_sums.py").open("a") as tests:
        tests.write(
            "import pytest, time\n"
            "@pytest.mark.timeout(0.3)\n"
            "def test_slow():\n"
            "    while add(1, 2) != 3: time.sleep(0.01)\n"
        )
    table(service, {**MINUS, "test": "test_slow"})
    monkeypatch.setattr(teeth, "SLOW_S", 0.0)
    assert teeth.run(service, clean=False) == 0
    printed = capsys.readouterr().out
    assert "s  HUNG: tests/test_sums.py test_slow" in printed
    assert "1 of 1 planted bugs caught\n1 of these only by taking too long: minus\n" in printed
    assert "longer than 0 s: minus" in printed


def test_one_bug_can_be_asked_for(service: Path) -> None:
    table(service, MINUS, {**MINUS, "id": "blind", "test": "test_zero"})
    assert teeth.run(service, ["minus"], clean=False) == 0


def test_a_patch_that_no_longer_applies_is_an_error(service: Path) -> None:
    table(service, {**MINUS, "old": "a * b"})
    with pytest.raises(teeth.TeethError, match="occurs 0 times"):
        teeth.run(service)
    table(service, MINUS, MINUS)
    with pytest.raises(teeth.TeethError, match="same id twice"):
        teeth.run(service)


def test_a_test_that_always_fails_or_does_not_exist_catches_nothing(service: Path) -> None:
    table(service, {**MINUS, "test": "test_missing"})
    assert teeth.run(service) == 1
    with (service / "tests" / "test_sums.py").open("a") as tests:
        tests.write("def test_broken(): assert False\n")
    table(service, {**MINUS, "test": "test_broken"})
    assert teeth.run(service) == 1
