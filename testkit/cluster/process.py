"""One node as a user starts it: a child process with a log file, killed for certain at the end."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from testkit.cluster.http import HttpClient, Reply

DEADLINE_S: Final = 30.0
POLL_S: Final = 0.02

_alive: set[subprocess.Popen[bytes]] = set()


@functools.cache
def _leash() -> tuple[str, ...]:
    """What to put before a command so that the kernel kills it when this process dies (Linux).

    atexit does not run when a test runner is killed or times out, and a node left behind holds its
    port and the machine. setpriv only sets a flag and execs: same pid, same program.
    """
    leash = ("setpriv", "--pdeathsig", "KILL")
    if sys.platform != "linux" or shutil.which("setpriv") is None:
        return ()
    works = subprocess.run([*leash, "true"], capture_output=True, check=False).returncode == 0
    return leash if works else ()


@atexit.register
def _reap() -> None:
    for child in list(_alive):
        child.kill()


class ProcessFailure(AssertionError):
    """A node that did not do what was waited for; carries the end of its log."""


class NodeProcess:
    """`start()` … `kill()`; the log file keeps the output of every incarnation.

    Use as a context manager, or inside a Cluster, so that a failing test leaves nothing behind.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.log = log
        self._cwd = cwd
        self._env = dict(env or {})
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; does not wait for it to be ready."""
        assert not self.running, f"{self.name} runs already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # The kernel means the starting *thread*; only the main one lives as long as the process.
        leash = _leash() if threading.current_thread() is threading.main_thread() else ()
        with self.log.open("ab") as sink:
            self._log_start = sink.tell()
            self._child = subprocess.Popen(
                [*leash, *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=self._cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
            )
        _alive.add(self._child)

    @property
    def running(self) -> bool:
        """True while the process exists (a paused one exists)."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the present incarnation."""
        assert self._child is not None, f"{self.name} was never started"
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""
        return None if self._child is None else self._child.poll()

    def kill(self) -> None:
        """SIGKILL (TerminateProcess on Windows); harmless if gone. Returns when it is dead."""
        self.kill_later()
        self._reaped()

    def kill_later(self) -> None:
        """Send SIGKILL without waiting, so that several can be killed at one moment."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()

    def _reaped(self) -> None:
        if self._child is not None:
            self._child.wait(DEADLINE_S)
            _alive.discard(self._child)

    async def terminate(self, timeout_s: float = DEADLINE_S) -> int:
        """SIGTERM; the exit code. ProcessFailure (and a kill) if it stays longer than that."""
        assert self._child is not None, f"{self.name} was never started"
        self._child.terminate()
        return await self.wait(timeout_s)

    async def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for the process to end by itself; its exit code (-N: killed by signal N)."""
        assert self._child is not None, f"{self.name} was never started"
        deadline = time.monotonic() + timeout_s
        while (code := self._child.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise ProcessFailure(self._told(f"did not end within {timeout_s} s"))
            await asyncio.sleep(POLL_S)
        _alive.discard(self._child)
        return code

    async def restart(self, ready_url: str | None = None) -> None:
        """kill -9 and start again (and wait for `ready_url`)."""
        self.kill()
        self.start()
        if ready_url is not None:
            await self.wait_url(ready_url)

    def pause(self) -> None:
        """SIGSTOP (POSIX only: skip such a test elsewhere, see `CAN_PAUSE`)."""
        self._signal("SIGSTOP")

    def resume(self) -> None:
        """SIGCONT."""
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        if not CAN_PAUSE:
            raise NotImplementedError(f"{name} does not exist on {sys.platform}")
        assert self._child is not None, f"{self.name} was never started"
        self._child.send_signal(getattr(signal, name))

    # -- waiting ---------------------------------------------------------------------------------

    async def wait_url(
        self,
        url: str,
        *,
        status: int = 200,
        timeout_s: float = DEADLINE_S,
        tls: ssl.SSLContext | None = None,
    ) -> Reply:
        """Poll GET `url` until it answers `status`; fails at once if the process ends."""
        deadline = time.monotonic() + timeout_s
        last: object = "nothing yet"
        async with HttpClient.of_url(url, tls=tls) as client:
            while time.monotonic() < deadline:
                if not self.running:
                    raise ProcessFailure(self._told(f"ended ({self.returncode}) before {url}"))
                outcome = await client.get(HttpClient.path_of(url), timeout_s=2.0)
                if isinstance(outcome, Reply) and outcome.status == status:
                    return outcome
                last = outcome
                await asyncio.sleep(POLL_S)
        raise ProcessFailure(self._told(f"{url} not {status} in {timeout_s} s; last: {last}"))

    async def wait_log(self, text: str, timeout_s: float = DEADLINE_S) -> str:
        """Wait until this incarnation's output holds `text`; the line."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = not self.running
            for line in self.output().splitlines():
                if text in line:
                    return line
            if ended or time.monotonic() > deadline:
                raise ProcessFailure(self._told(f"never logged {text!r}"))
            await asyncio.sleep(POLL_S)

    def output(self) -> str:
        """What the present incarnation wrote on stdout and stderr."""
        with self.log.open("rb") as source:
            source.seek(self._log_start)
            return source.read().decode(errors="replace")

    def _told(self, what: str) -> str:
        tail = "\n".join(self.output().splitlines()[-30:])
        return f"{self.name} {what}\n--- {self.log}\n{tail}"

    def __enter__(self) -> NodeProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


CAN_PAUSE: Final = hasattr(signal, "SIGSTOP")
