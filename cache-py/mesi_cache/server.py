"""Run one node: bind, start, serve until SIGTERM or Ctrl-C, stop within five seconds, exit code 0.

Exit code 2 and one line on stderr for everything that is wrong before the node serves.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module

from aiohttp import web

from mesi_cache import config as configuration
from mesi_cache import logs
from mesi_cache.api import app as application
from mesi_cache.api import connection
from mesi_cache.api.events import EventHub
from mesi_cache.config import Address, Config, ConfigError
from mesi_cache.metrics import Metrics
from mesi_cache.node import Node
from mesi_cache.storage.data_dir import DataDir, Identity
from mesi_cache.storage.main_memory import MainMemory
from mesi_cache.transport import tls
from mesi_cache.transport.links import LINK_PATH, Hello, Links
from mesi_cache.transport.wire import Wire

log = logging.getLogger(__name__)

STOP_WITHIN_S = 4.5


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 stopped when asked, 1 halted by a fault, 2 could not start."""
    try:
        config = configuration.parse(argv)
        logs.configure(config.node_id, config.log_format, config.log_level)
        return run(config)
    except ConfigError as e:
        print(f"main.py: error: {logs.one_line(str(e))}", file=sys.stderr)  # noqa: T201
        return 2


def run(config: Config) -> int:
    # Socket first, directory last: a taken port or a foreign directory leaves no trace.
    listening = bind(config.addr, "--addr")
    with listening:
        data_dir = DataDir.open(config.data_dir, identity(config))
        try:
            memory = MainMemory.open(config)
            try:
                with asyncio.Runner(loop_factory=loop_factory()) as runner:
                    return runner.run(serve(config, listening, memory))
            finally:
                memory.close()
        finally:
            data_dir.close()


async def serve(config: Config, listening: socket.socket, memory: MainMemory) -> int:
    metrics, events = Metrics(), EventHub()
    stop, halted = stop_requested(), asyncio.Event()

    def halt() -> None:
        halted.set()
        stop.set()

    node = Node(config, memory, metrics, events, halt)
    links: Links[Wire] = Links(
        Hello(config.url, config.node_id, cluster_fingerprint(config), memory.epoch),
        {url: config.dial.get(url, url) for url in config.peers},
        message_type=Wire, on_batch=node.on_batch, on_up=node.on_up, on_down=node.on_down,
        on_other_members=node.on_other_members, secret=config.cluster_secret,
        client_ssl=tls.client_context(config.tls) if config.tls else None, metrics=metrics,
    )  # fmt: skip
    node.start(links)
    app = application.build(node, config, metrics, events, [web.get(LINK_PATH, links.accept)])
    # handler_cancellation: a handler whose client hung up is cancelled; what it asked for goes on.
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    ssl_context = tls.server_context(config.tls) if config.tls else None
    try:
        listener = await asyncio.get_running_loop().create_server(
            connection.factory(runner), sock=listening, ssl=ssl_context, backlog=1024
        )
        await links.start()
        # Lines live long and hold no cycles: looking through all of them again and again finds
        # nothing and stops the node meanwhile.
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        log.info("node %s listening on %s", config.node_id, config.url)
        await stop.wait()
        listener.close()
        if halted.is_set():
            log.error("stopped: a promise could not be kept")
            return 1
        log.info("stopping")
        async with asyncio.timeout(STOP_WITHIN_S):
            await node.stop()
            await links.stop()
            await runner.cleanup()
    except TimeoutError:
        log.warning("stopped without waiting any longer for open requests")
    log.info("stopped")
    return 0


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM or SIGINT (Ctrl-C, also on Windows) sets."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, event.set)
        except (
            NotImplementedError
        ):  # Windows: the handler runs between bytecodes of the main thread
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(event.set))
    return event


def bind(addr: Address, flag: str) -> socket.socket:
    """A listening socket on `addr`; raises ConfigError naming `flag` if it cannot be had."""
    try:
        family, kind, proto, _, where = socket.getaddrinfo(
            addr.host, addr.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, proto)
    except OSError as e:
        raise ConfigError(f"{flag}: cannot use {addr}: {e.strerror or e}") from e
    try:
        if sys.platform == "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(1024)  # now, so that a second node on this port fails here and not later
        listening.setblocking(False)
    except OSError as e:
        listening.close()
        taken = e.errno == errno.EADDRINUSE
        raise ConfigError(
            f"{flag}: {addr} is already in use"
            if taken
            else f"{flag}: cannot bind {addr}: {e.strerror}"
        ) from e
    return listening


def cluster_fingerprint(config: Config) -> str:
    """Names the cluster by its members: keys have the same homes exactly under the same list."""
    return hashlib.blake2b("\n".join(config.members).encode(), digest_size=8).hexdigest()


def identity(config: Config) -> Identity:
    """Whose data directory it is: this member's, in this cluster."""
    return Identity("mesi_cache", f"{config.node_id} at {config.url}", cluster_fingerprint(config))


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (not on Windows), else asyncio's own."""
    try:
        return import_module("uvloop").Loop  # type: ignore[no-any-return]
    except ImportError:
        return None
