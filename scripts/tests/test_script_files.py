"""The script files themselves: shellcheck, a real PowerShell grammar, twins."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tests.copies import ROOT, SCRIPTS

BASH = [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci" / "run"]
POWERSHELL = sorted(SCRIPTS.glob("*.ps1"))


def broken_places(source: bytes) -> Iterator[str]:
    """Where tree-sitter's PowerShell grammar finds `source` wrong, as "line: what"."""
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip("tree_sitter_powershell")
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    pending = [parser.parse(source).root_node]
    while pending:
        node = pending.pop()
        if node.is_missing:
            yield f"{node.start_point[0] + 1}: missing {node.type}"
        elif node.type == "ERROR":
            text = source[node.start_byte : node.end_byte][:60].decode(errors="replace")
            yield f"{node.start_point[0] + 1}: cannot be parsed: {text}"
        pending += node.children


@pytest.mark.parametrize("path", POWERSHELL, ids=lambda path: path.name)
def test_each_powershell_file_parses(path: Path) -> None:
    assert list(broken_places(path.read_bytes())) == []


@pytest.mark.parametrize("wrong", ["if ($x) { 1 ", "$x = (1 +", "try { 1 }\n}", "$x = @{ a 1 }"])
def test_the_grammar_sees_what_is_broken(wrong: str) -> None:
    assert list(broken_places(wrong.encode())) != []


@pytest.mark.parametrize("path", POWERSHELL, ids=lambda path: path.name)
def test_powershell_files_are_plain_ascii(path: Path) -> None:
    """Windows PowerShell 5.1 reads a file without a byte order mark in the system's code page."""
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("path", BASH, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_bash_script_has_its_powershell_twin_and_the_other_way_round() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.sh")} == {path.stem for path in POWERSHELL}


@pytest.mark.parametrize("path", POWERSHELL, ids=lambda path: path.name)
def test_both_twins_know_the_same_usage_line(path: Path) -> None:
    def usage(file: Path) -> list[str]:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [line.replace(file.suffix, "") for line in lines if line.startswith("# usage:")]

    assert usage(path) == usage(path.with_suffix(".sh"))


@pytest.mark.parametrize("script", ["start", "stop", "demo"])
def test_powershell_scripts_refuse_a_wrong_argument_with_exit_code_2(script: str) -> None:
    pwsh = shutil.which("pwsh") or shutil.which("powershell")
    if pwsh is None:
        pytest.skip("no pwsh here: the PowerShell files are only parsed")
    done = subprocess.run(
        [pwsh, "-NoProfile", "-File", str(SCRIPTS / f"{script}.ps1"), "kunci"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"usage: {script}.ps1 [all|lock|queue|cache|secure]" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no executable bit")
@pytest.mark.parametrize("path", BASH, ids=lambda path: path.name)
def test_bash_scripts_can_be_run(path: Path) -> None:
    if path.name != "lib.sh":
        assert path.stat().st_mode & 0o111


VERBS = ["style", "types", "layers", "test", "sim", "teeth", "bench", "start", "stop", "check"]


@pytest.mark.parametrize("verb", VERBS)
def test_make_knows_the_verb_and_says_what_it_does(verb: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "-n", verb, "SERVICE=lock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"make {verb} " in shown.stdout


def test_pre_commit_and_ci_call_the_same_verbs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    for verb in ("style", "types", "layers", "shell"):
        assert f"entry: make {verb}" in hooks
        assert f"make {verb}" in ci
    assert "./scripts/test.sh" in ci
