"""A TCP proxy that stands for one direction of dialling between two nodes, and can fail.

It runs on an event loop of its own in a daemon thread: a busy or blocked test delays no packet, and
its faults are plain synchronous calls. `forward` is dialler -> target, `backward` the answers.

* `cut()`: connections are reset, new ones refused (a dead machine's port, a closed firewall).
* `blackhole()`: connections live, new ones are accepted, nothing passes. What was sent meanwhile
  arrives after `heal()`, as TCP's retransmissions do after a real partition: late messages are the
  nastier case.
* `delay(ms)`: every chunk arrives that much later, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Coroutine
from typing import Any, Final, Literal, TypeVar

Direction = Literal["forward", "backward", "both"]
T = TypeVar("T")

_CHUNK: Final = 65_536
_QUEUED_CHUNKS: Final = 64
_CALL_S: Final = 10.0
_LINGER_ZERO: Final = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class _Way:
    """One direction's state: open or blackholed, and its delay."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.delay_s = 0.0


class _Loop:
    """The thread with the proxies' event loop; it lives as long as one proxy is open.

    It ends with the last one because a simulation forks its workers: a fork of a process with
    threads may inherit a lock that nobody will ever release.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def enter(self) -> None:
        """One more proxy; the first starts the thread."""
        with self._lock:
            self._users += 1
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="link-proxies", daemon=True
                )
                self._thread.start()

    def leave(self) -> None:
        """One proxy less; the last stops the thread."""
        with self._lock:
            self._users -= 1
            if self._users or self._loop is None or self._thread is None:
                return
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CALL_S)
            self._loop.close()
            self._loop = self._thread = None

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it (short ones only)."""
        assert self._loop is not None, "every proxy is closed"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)


_shared: Final = _Loop()


class LinkProxy:
    """Listens on a free loopback port (`address`) and forwards to `target` ("host:port")."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.connections = 0  # accepted so far
        self._host, _, port = target.rpartition(":")
        self._target_port = int(port)
        self._port = 0
        self._cut = False
        self._server: asyncio.Server | None = None
        self._live: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._closed = False
        _shared.enter()
        _shared.call(self._open())

    @property
    def address(self) -> str:
        """Where the dialling node is told that the target lives."""
        return f"127.0.0.1:{self._port}"

    # -- faults ----------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `heal()`."""
        _shared.call(self._do_cut())

    def blackhole(self, direction: Direction = "both") -> None:
        """Forward nothing in that direction, until `heal()`."""
        _shared.call(self._set(direction, blackholed=True))

    def delay(self, delay_ms: float, direction: Direction = "both") -> None:
        """Forward everything `delay_ms` later, until `heal()`."""
        _shared.call(self._set(direction, delay_ms=delay_ms))

    def reset(self) -> None:
        """Reset the present connections once; new ones are welcome."""
        _shared.call(self._reset())

    def heal(self) -> None:
        """Undo all of the above."""
        _shared.call(self._heal())

    def close(self) -> None:
        """The end: stop listening, drop all connections. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            _shared.call(self._do_cut())
            _shared.leave()

    # -- inside the proxies' loop ----------------------------------------------------------------

    async def _open(self) -> None:
        self._forward, self._backward = _Way(), _Way()
        await self._listen()

    async def _listen(self) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._accepted, sock=listener, backlog=256)

    def _ways(self, direction: Direction) -> list[_Way]:
        ways = {"forward": [self._forward], "backward": [self._backward]}
        return ways.get(direction, [self._forward, self._backward])

    async def _set(
        self, direction: Direction, *, blackholed: bool = False, delay_ms: float | None = None
    ) -> None:
        for way in self._ways(direction):
            if blackholed:
                way.open.clear()
            if delay_ms is not None:
                way.delay_s = delay_ms / 1000

    async def _do_cut(self) -> None:
        self._cut = True
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            _abort(writer)
        for task in list(self._live):
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)

    async def _heal(self) -> None:
        for way in (self._forward, self._backward):
            way.open.set()
            way.delay_s = 0.0
        if self._cut:
            self._cut = False
            await self._listen()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        self._live.add(task)
        self._writers.add(writer)
        target_writer: asyncio.StreamWriter | None = None
        try:
            await self._forward.open.wait()  # no SYN passes a blackhole either
            target_reader, target_writer = await asyncio.open_connection(
                self._host, self._target_port
            )
            self._writers.add(target_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, target_writer, self._forward))
                pumps.create_task(_pump(target_reader, writer, self._backward))
        except* OSError:
            pass  # either side went away, or the target refuses: the finally tells the other side
        except* asyncio.CancelledError:
            pass  # a reset by the test; the task ends here
        finally:
            for side in (writer, target_writer):
                if side is not None:
                    self._writers.discard(side)
                    _abort(side)
            self._live.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Way) -> None:
    """Copy one direction: a reader that stamps chunks and a writer that honours delay and hole."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS)

    async def read() -> None:
        while True:
            data = await reader.read(_CHUNK)
            await chunks.put((loop.time() + way.delay_s, data))
            if not data:
                return

    async with asyncio.TaskGroup() as halves:
        halves.create_task(read())
        while True:
            due, data = await chunks.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await way.open.wait()
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST, not FIN: what a dead or firewalled peer's kernel sends."""
    handle = writer.get_extra_info("socket")
    if handle is not None:
        with contextlib.suppress(OSError):
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    writer.transport.abort()
