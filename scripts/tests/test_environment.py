"""The environment is made once, and installed into only when a requirement file changed."""

import subprocess
import sys
from pathlib import Path

from scripts.tests.copies import SCRIPTS


def prepare(folder: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "environment.py"), str(folder), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_it_is_made_once_and_installs_only_what_changed(tmp_path: Path) -> None:
    folder, first, second = tmp_path / "an env", tmp_path / "a b.txt", tmp_path / "c.txt"
    first.write_text("# nothing yet\n")
    second.write_text("# nothing either\n")
    folder.mkdir()
    (folder / "work.txt").write_text("not an environment: nothing in here may be deleted")
    done = prepare(folder, first, second)
    assert done.returncode == 0, done.stderr
    assert "Making" in done.stdout
    assert (folder / "work.txt").exists()
    assert prepare(folder, first, second).stdout == ""
    second.write_text("# changed\n")
    assert prepare(folder, first, second).stdout == f"Installing {second}\n"
    second.write_text("no-such-package-in-here @ file:///no/such/file.whl\n")
    failed = prepare(folder, first, second)
    assert failed.returncode == 1
    assert "pip could not install" in failed.stderr
    # A failed installation is not remembered as done.
    assert prepare(folder, first, second).returncode == 1
