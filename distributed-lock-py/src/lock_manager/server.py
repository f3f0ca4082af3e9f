"""Run one node: bind, start, serve until SIGTERM or Ctrl-C, stop within five seconds, exit code 0.

Exit code 2 and one line on stderr for everything that is wrong before the node serves.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module

from aiohttp import web

from lock_manager import config as configuration
from lock_manager import logs
from lock_manager.api import app as application
from lock_manager.api import connection
from lock_manager.api.events import EventHub
from lock_manager.api.express import Express
from lock_manager.config import Address, Config, ConfigError
from lock_manager.metrics import Metrics
from lock_manager.node import Node
from lock_manager.storage import Owner, Store, StoreError
from lock_manager.transport import LINK_PATH, Links, tls

log = logging.getLogger(__name__)

STOP_WITHIN_S = 4.5
# A full collection of a million locks is a pause of 40 ms, and finds nothing: what the node keeps
# has no cycles (see core/locks/state.py). The default thresholds run it again and again.
COLLECT_AFTER = (10_000, 20, 50)


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
    # Sockets first, directory last: a taken port or a foreign directory leaves no trace.
    with (
        bind(config.raft_addr, "--raft_addr") as raft,
        bind(config.http_addr, "--http_addr") as http,
    ):
        if config.tls is not None:  # also before anything is written
            tls.server_context(config.tls), tls.client_context(config.tls)
        owner = Owner(config.node_id, config.position, str(config.raft_addr), str(config.http_addr))
        try:
            store = Store.open(config.data_dir, owner)
        except StoreError as e:
            raise ConfigError(str(e)) from e
        gc.set_threshold(*COLLECT_AFTER)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(serve(config, store, raft, http))


async def serve(config: Config, store: Store, raft: socket.socket, http: socket.socket) -> int:
    metrics, events = Metrics(), EventHub()
    node = Node(config, store, metrics, events)
    client_ssl = tls.client_context(config.tls) if config.tls else None
    links = Links(
        node.me,
        admit=node.book.judge,
        on_messages=node.on_messages,
        on_broken=node.on_broken,
        secret=config.cluster_secret,
        client_ssl=client_ssl,
    )
    stop = stop_requested()
    peers = web.Application()
    peers.router.add_get(LINK_PATH, links.accept)
    runners: list[web.AppRunner] = []
    listeners: list[asyncio.Server] = []
    code = 0
    try:
        app = application.build(node, config, metrics, events)
        express = Express(node, metrics, config.max_body_bytes)
        for made, listening, short_way in ((peers, raft, None), (app, http, express)):
            runner, listener = await listen(made, listening, config, short_way)
            runners.append(runner)
            listeners.append(listener)
        node.start(links)
        log.info("serving clients on %s://%s", config.scheme, config.http_addr)
        log.info("serving peers on %s (position %d)", config.raft_addr, config.position)
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((stopping, node.halted), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if node.halted.done():
            code, reason = node.halted.result()
            log.log(logging.CRITICAL if code else logging.WARNING, "halting: %s", reason)
        else:
            log.info("stopping")
        listeners[-1].close()  # no new clients; peers are needed to hand leadership over
        async with asyncio.timeout(STOP_WITHIN_S):
            if not code:
                await node.stop()
            events.close()
            await links.stop()
            listeners[0].close()
            for runner in runners:
                await runner.cleanup()
            if not code:
                await store.close()
    except TimeoutError:
        log.warning("stopped without waiting any longer for open requests")
    log.info("stopped")
    return code


async def listen(
    app: web.Application, listening: socket.socket, config: Config, express: Express | None
) -> tuple[web.AppRunner, asyncio.Server]:
    """Serve `app` on a bound socket."""
    # handler_cancellation: a handler whose client hung up is cancelled.
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    ssl_context = tls.server_context(config.tls) if config.tls else None
    listener = await asyncio.get_running_loop().create_server(
        connection.factory(runner, express), sock=listening, ssl=ssl_context, backlog=1024
    )
    return runner, listener


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


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (not on Windows), else asyncio's own."""
    try:
        return import_module("uvloop").Loop  # type: ignore[no-any-return]
    except ImportError:
        return None
