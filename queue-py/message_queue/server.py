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
from dataclasses import replace
from importlib import import_module

from aiohttp import web

from message_queue import admission, anteroom, logs
from message_queue import config as configuration
from message_queue.admission import Place
from message_queue.api import app as application
from message_queue.api import connection
from message_queue.api.events import EventHub
from message_queue.api.express import Express
from message_queue.api.stream import STREAMS
from message_queue.config import Address, Config, ConfigError
from message_queue.metrics import Metrics
from message_queue.node import AnyMessage, Node
from message_queue.storage.data_dir import DataDir
from message_queue.transport import tls
from message_queue.transport.links import LINK_PATH, Hello, Links

log = logging.getLogger(__name__)

STOP_WITHIN_S = 4.5
LONG_START_S = 0.2
"""After that a node that is still reading its log says so to whoever asks."""


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
    with listening, asyncio.Runner(loop_factory=loop_factory()) as runner:
        place = admission.place_at_start(config)
        if place is None:
            place = runner.run(admit(config, listening))
            if place is None:
                return 0
        # Who joined once has its place from the ring, also when it starts again with --join.
        config = replace(config, position=place.position)
        data_dir = DataDir.open(config.data_dir, admission.identity(config, place))
        try:
            admission.keep_ring(config.data_dir, place.ring)
            return runner.run(serve(config, place, listening, data_dir))
        finally:
            data_dir.close()


async def admit(config: Config, listening: socket.socket) -> Place | None:
    """Wait until a member lets this node in; None: asked to stop meanwhile."""
    client_ssl = tls.client_context(config.tls) if config.tls else None
    server_ssl = tls.server_context(config.tls) if config.tls else None
    log.info("asking to be let into the ring")
    return await admission.admitted(config, listening, client_ssl, server_ssl, stop_requested())


async def serve(config: Config, place: Place, listening: socket.socket, data_dir: DataDir) -> int:
    metrics, events = Metrics(), EventHub()
    server_ssl = tls.server_context(config.tls) if config.tls else None
    try:
        opening = asyncio.ensure_future(Node.open(config, place, metrics, events, data_dir))
        if not (await asyncio.wait({opening}, timeout=LONG_START_S))[0]:
            async with anteroom.answering(listening, server_ssl, "reading its log"):
                await asyncio.wait({opening})
        node = await opening
    except OSError as e:
        raise ConfigError(f"{config.data_dir}: {e.strerror or e}") from e
    links: Links[AnyMessage] = Links(
        Hello(
            position=config.position, node_id=config.node_id, addr=str(config.addr),
            cluster=place.cluster, incarnation=node.incarnation,
        ),
        node.keeper.urls(),
        message_type=AnyMessage, on_batch=node.on_batch, on_up=node.on_up, on_down=node.on_down,
        secret=config.cluster_secret,
        client_ssl=tls.client_context(config.tls) if config.tls else None, metrics=metrics,
        on_left=node.keeper.dismissed, has_left=node.keeper.has_left,
        may_be_new=node.keeper.may_be_new, turn=node.turn,
    )  # fmt: skip
    node.attach(links)
    peer_routes = [
        web.get(LINK_PATH, links.accept),
        web.post(admission.JOIN_PATH, admission.handler(config.cluster_secret, node.keeper.admit)),
    ]
    app = application.build(node.router, config, metrics, events, peer_routes)
    app[STREAMS].turn = node.turn
    # handler_cancellation: a handler whose client hung up is cancelled.
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    express = Express(node.router, metrics, config.max_body_bytes)
    stop = asyncio.ensure_future(stop_requested().wait())
    try:
        listener = await asyncio.get_running_loop().create_server(
            connection.factory(runner, express), sock=listening, ssl=server_ssl, backlog=1024
        )
        # What is there now stays: the collector need not look at it again, and a held message is
        # no garbage either. Cycles are rare here, so it may look less often.
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        node.start()
        await links.start()
        log.info("listening on %s://%s", config.scheme, config.addr)
        await asyncio.wait((stop, node.halted), return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping")
        listener.close()
        await application.stop(app)
        async with asyncio.timeout(STOP_WITHIN_S):
            await node.stop()
            await links.stop()
            await runner.cleanup()
    except TimeoutError:
        log.warning("stopped without waiting any longer for open requests")
    stop.cancel()
    log.info("stopped")
    return 1 if node.halted.done() else 0


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
