"""Server processes under measurement: started, killed and counted by their own pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path


class Server:
    """One child process. Its output goes to `log`."""

    def __init__(self, arguments: Sequence[str], log: Path, *, spoken_to: bool = False) -> None:
        """`spoken_to`: its input and output are pipes, and only its errors go to the log."""
        pipe = subprocess.PIPE if spoken_to else None
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                arguments, stdin=pipe or subprocess.DEVNULL, stdout=pipe or out, stderr=out
            )
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as `kill -9`."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """Processor time so far, in seconds; 0 where /proc is not there."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory now; 0 where /proc is not there."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


_next_port = count(20_000 + os.getpid() % 5_000)


def free_ports(how_many: int) -> list[int]:
    """Ports that nobody listens on, each given out once; below the range from which the system
    takes its own."""
    found: list[int] = []
    while len(found) < how_many:
        port = next(_next_port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Polls until `condition()`; an OSError or ValueError of it means not yet. Raises
    TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise TimeoutError(f"{what}: not within {seconds:.0f} s")


def listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 0.3):
        return True
