"""Each service's main.py itself, before there is a server."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each main.py, and the module that it imports.
MAINS = (
    ("distributed-lock-py/src", "lock_manager", "server"),
    ("queue-py", "message_queue", "server"),
    ("cache-py", "mesi_cache", "server"),
    ("secure-app-py", "secure_store", "cli"),
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("folder", "name", "module"), MAINS)
def test_a_signal_during_the_imports_is_a_stop_like_any_other(
    tmp_path: Path, folder: str, name: str, module: str, number: signal.Signals
) -> None:
    shutil.copy(ROOT / folder / "main.py", tmp_path)
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").touch()
    # An import that takes long, and that swallows what is raised in it.
    (package / f"{module}.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path(__file__).with_name('importing').touch()\n"
        "while True:\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        "        pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "main.py", "--id=a"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 30
        while not (package / "importing").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (0, b"")
