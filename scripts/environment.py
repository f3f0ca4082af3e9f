"""Make a virtual environment and install requirement files into it, once.

    python environment.py VENV FILE...

A file is installed when its text or the Python that it was installed for changed; otherwise
nothing is done and nothing is printed. Standard library only. Exit code 0, or 1 with a clear line
on stderr.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from processes import FileLock

OLDEST, NEWEST = (3, 11), (3, 14)


def python_of(folder: Path) -> Path:
    """Where a virtual environment keeps its interpreter."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _works(folder: Path) -> bool:
    """Whether `folder` is an environment whose interpreter runs, is new enough and has pip."""
    check = (
        "import sys, importlib.util as u; "
        f"sys.exit(sys.version_info < {OLDEST} or u.find_spec('pip') is None)"
    )
    try:
        done = subprocess.run([python_of(folder), "-c", check], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def stamp(folder: Path, requirements: Path) -> Path:
    """The empty file whose presence says: this very text was installed for this Python."""
    version = (folder / "pyvenv.cfg").read_bytes()
    digest = hashlib.sha256(version + b"\0" + requirements.read_bytes()).hexdigest()
    return folder / "installed" / digest[:32]


def _create(folder: Path) -> None:
    print(f"Making {folder} with Python {sys.version.split()[0]} ({sys.executable})", flush=True)
    # `clear` would delete whatever is there; only something that was an environment may go.
    if (folder / "pyvenv.cfg").exists():
        shutil.rmtree(folder)
    try:
        venv.EnvBuilder(with_pip=True, symlinks=sys.platform != "win32").create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(
            f"error: could not make {folder}: {error}\n"
            "On Debian and Ubuntu: apt-get install python3-venv"
        ) from error


def prepare(folder: Path, files: list[Path]) -> None:
    """Bring `folder` to hold everything that `files` ask for."""
    lock = Path(__file__).resolve().parent.parent / ".run" / (folder.name.lstrip(".") + ".lock")
    with FileLock(lock, f"Another run is preparing {folder}; waiting for it"):
        if not _works(folder):
            _create(folder)
        missing = [file for file in files if not stamp(folder, file).exists()]
        if not missing:
            return
        print("Installing " + ", ".join(str(file) for file in missing), flush=True)
        command = [str(python_of(folder)), "-m", "pip", "install", "--quiet"]
        command += ["--disable-pip-version-check", "--no-input", "--no-warn-script-location"]
        for file in missing:
            command += ["-r", str(file)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit("error: pip could not install the requirements (its message is above)")
        for file in missing:
            done = stamp(folder, file)
            done.parent.mkdir(exist_ok=True)
            done.touch()


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise SystemExit(__doc__)
    if sys.version_info[:2] > NEWEST:
        print(f"note: Python {sys.version.split()[0]} is newer than the newest tested one, 3.14")
    prepare(Path(argv[0]), [Path(each) for each in argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
