"""What start and stop need to know about processes and ports, on Linux, macOS and Windows.

Standard library only: this runs before anything is installed. A process is named by its id *and*
the moment it started, because an id alone is reused and a stale pid file must never get a stranger
killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

_PROC = Path("/proc")
if sys.platform == "win32":
    _NO_CONSOLE = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    _KILL = signal.SIGTERM  # os.kill means TerminateProcess for it
else:
    _NO_CONSOLE = 0
    _KILL = signal.SIGKILL


def start_detached(argv: list[str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start `argv` so that it outlives this script and its terminal; it appends to `log`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as sink:
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,  # setsid(2); Windows ignores it. macOS has no setsid(1)
            creationflags=_NO_CONSOLE,
        )


if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    _STILL_ACTIVE = 259
    _QUERY_LIMITED = 0x1000

    def started_at(pid: int) -> str | None:
        """When the live process `pid` started; None when there is no such process."""
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = wintypes.HANDLE
        handle = kernel.OpenProcess(_QUERY_LIMITED, False, pid)
        if not handle:
            return None
        handle = wintypes.HANDLE(handle)
        try:
            code = wintypes.DWORD()
            if not kernel.GetExitCodeProcess(handle, ctypes.byref(code)):
                return None
            if code.value != _STILL_ACTIVE:
                return None
            created, *others = (wintypes.FILETIME() for _ in range(4))
            refs = [ctypes.byref(each) for each in (created, *others)]
            if not kernel.GetProcessTimes(handle, *refs):
                return None
            return f"{created.dwHighDateTime:08x}{created.dwLowDateTime:08x}"
        finally:
            kernel.CloseHandle(handle)

else:

    def started_at(pid: int) -> str | None:
        """When the live process `pid` started; None when there is no such process.

        A zombie counts as gone: in a container without an init nobody reaps our orphans.
        """
        if (_PROC / "self" / "stat").exists():
            try:
                text = (_PROC / str(pid) / "stat").read_text()
            except OSError:
                return None
            # The command's name may hold blanks and parentheses; what follows its last ")" may not.
            fields = text.rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
        shown = _output(["ps", "-o", "stat=,lstart=", "-p", str(pid)]).split(None, 1)
        if len(shown) < 2 or shown[0].startswith("Z"):
            return None
        return shown[1].strip()


def terminate(pid: int) -> None:
    """Ask `pid` to finish.

    Windows knows no such request for a background process: there it ends at once, as by kill -9,
    which the services are built to survive. What cannot be signalled (gone meanwhile, or another
    user's) shows in `wait_gone`.
    """
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGTERM)


def kill(pid: int) -> None:
    """End `pid` at once."""
    with contextlib.suppress(OSError):
        os.kill(pid, _KILL)


def wait_gone(identities: dict[int, str], wait_s: float) -> dict[int, str]:
    """Wait until none of the processes (pid -> its start) lives, or `wait_s`; return those left."""
    deadline = time.monotonic() + wait_s
    while True:
        left = {pid: start for pid, start in identities.items() if started_at(pid) == start}
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.05)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if sys.platform == "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:  # without it the remains of closed connections would count as taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_holder(port: int) -> str:
    """Who listens on `port`, for a person to read: "pid 123 (nginx)", or "another process"."""
    pid = None
    if sys.platform == "linux":
        pid = _linux_listener(port)
    elif sys.platform == "win32":
        found = re.search(
            rf":{port}\s+\S+\s+LISTENING\s+(\d+)", _output(["netstat", "-ano", "-p", "TCP"])
        )
        pid = int(found[1]) if found else None
    else:
        shown = _output(["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-t"]).split()
        pid = int(shown[0]) if shown else None
    if pid is None:
        return "another process"
    name = _command(pid)
    return f"pid {pid} ({name})" if name else f"pid {pid}"


def _linux_listener(port: int) -> int | None:
    """The pid that listens on `port`, read from /proc: a bare machine has neither ss nor lsof."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            field = row.split()
            if field[3] == "0A" and int(field[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{field[9]}]")
    if not inodes:
        return None
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                # Another user's process cannot be looked into; the port is then just "taken".
                if os.readlink(descriptor) in inodes:
                    return int(process.name)
        except OSError:
            continue
    return None


def _command(pid: int) -> str:
    if sys.platform == "linux":
        try:
            raw = (_PROC / str(pid) / "cmdline").read_bytes()
        except OSError:
            return ""
        text = raw.replace(b"\0", b" ").decode(errors="replace")
    elif sys.platform == "win32":
        shown = _output(["tasklist", "/FI", f"PID eq {pid}", "/FO", "CSV", "/NH"])
        text = shown.split(",")[0].strip('"')
    else:
        text = _output(["ps", "-o", "command=", "-p", str(pid)])
    return text.strip()[:120]


def _output(argv: list[str]) -> str:
    try:
        # ps prints times in the caller's language and zone; the same process must read the same.
        plain = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=10, check=False, env=plain
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


class FileLock:
    """One start, stop or install at a time in a copy; the system drops it with its process."""

    def __init__(self, path: Path, waiting: str) -> None:
        self._path = path
        self._waiting = waiting

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        said = False
        while not self._try():
            if not said:
                sys.stderr.write(f"{self._waiting}\n")
                said = True
            time.sleep(0.2)

    def _try(self) -> bool:
        try:
            if sys.platform == "win32":
                import msvcrt

                self._file.seek(0)
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._file.close()
