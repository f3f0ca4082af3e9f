"""One member put together and running: socket, data directory, main memory, node, links, HTTP.

`server` runs it as a program, `library` inside somebody else's. Nothing here touches what belongs
to the process: signals, logging, the event loop's policy, the garbage collector.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import socket
import sys
from collections.abc import Callable

from aiohttp import web

from mesi_cache.api import app as application
from mesi_cache.api import connection
from mesi_cache.api.events import EventHub
from mesi_cache.api.express import Express
from mesi_cache.config import Address, Config, ConfigError
from mesi_cache.metrics import Metrics
from mesi_cache.node import Node
from mesi_cache.storage.data_dir import DataDir, Identity
from mesi_cache.storage.main_memory import MainMemory
from mesi_cache.transport import tls
from mesi_cache.transport.links import LINK_PATH, Hello, Links
from mesi_cache.transport.wire import Wire

log = logging.getLogger(__name__)

HAND_OVER_WITHIN_S = 3.0
CLOSE_WITHIN_S = 1.5


class Opened:
    """What a member holds before its event loop runs. `close` lets go of all of it."""

    def __init__(
        self, config: Config, listening: socket.socket, data_dir: DataDir, memory: MainMemory
    ) -> None:
        self.config = config
        self.listening = listening
        self.data_dir = data_dir
        self.memory = memory

    def close(self) -> None:
        """After the event loop has stopped using it; waits for work that runs in threads."""
        self.memory.close()
        self.data_dir.close()
        self.listening.close()


def open_member(config: Config) -> Opened:
    """Take the port, the directory and what is stored in it; blocks for as long as disks do.

    Raises ConfigError. Socket first, directory last: a taken port or a foreign directory leaves no
    trace.
    """
    listening = bind(config.addr, "--addr")
    try:
        data_dir = DataDir.open(config.data_dir, identity(config))
        try:
            return Opened(config, listening, data_dir, MainMemory.open(config))
        except BaseException:
            data_dir.close()
            raise
    except BaseException:
        listening.close()
        raise


class Member:
    """A running member. `start` returns it serving; `stop` hands over what it holds."""

    def __init__(self, node: Node, links: Links[Wire], runner: web.AppRunner) -> None:
        self.node = node
        self._links = links
        self._runner = runner
        self._listener: asyncio.Server | None = None

    @classmethod
    async def start(
        cls, opened: Opened, halted: Callable[[], None], *, transitions_at: int = logging.INFO
    ) -> Member:
        """Serve on the running event loop. `halted` is called when a promise can no longer be kept:
        the member must then be stopped and no longer used. `transitions_at`: the level of the log
        lines about each line's state."""
        config, memory = opened.config, opened.memory
        metrics, events = Metrics(), EventHub()
        client_ssl = tls.client_context(config.tls) if config.tls else None
        server_ssl = tls.server_context(config.tls) if config.tls else None
        node = Node(config, memory, metrics, events, halted, transitions_at=transitions_at)
        links: Links[Wire] = Links(
            Hello(config.url, config.node_id, cluster_fingerprint(config), memory.epoch),
            {url: config.dial.get(url, url) for url in config.peers},
            message_type=Wire, on_batch=node.on_batch, on_up=node.on_up, on_down=node.on_down,
            on_other_members=node.on_other_members, secret=config.cluster_secret,
            client_ssl=client_ssl, metrics=metrics,
        )  # fmt: skip
        node.start(links)
        app = application.build(node, config, metrics, events, [web.get(LINK_PATH, links.accept)])
        # handler_cancellation: a handler whose client hung up is cancelled; what it asked for goes
        # on.
        runner = web.AppRunner(
            app, access_log=None, handle_signals=False, handler_cancellation=True,
            shutdown_timeout=1.0,
        )  # fmt: skip
        await runner.setup()
        member = cls(node, links, runner)
        member._listener = await asyncio.get_running_loop().create_server(
            connection.factory(runner, Express(node, metrics, config.max_body_bytes)),
            sock=opened.listening,
            ssl=server_ssl,
            backlog=1024,
        )
        await links.start()
        log.info("node %s listening on %s", config.node_id, config.url)
        return member

    async def stop(self) -> None:
        """Give the lines back, store what is logged, close; within 4.5 s."""
        if self._listener is not None:
            self._listener.close()
        try:
            async with asyncio.timeout(HAND_OVER_WITHIN_S):
                await self.node.stop()
        except TimeoutError:
            log.warning("stopped before everything was stored: it is in the log")
        try:
            async with asyncio.timeout(CLOSE_WITHIN_S):
                await self._links.stop()
                await self._runner.cleanup()
        except TimeoutError:
            log.warning("stopped without waiting any longer for open requests")


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
        if e.errno == errno.EADDRINUSE:
            raise PortTaken(f"{flag}: {addr} is already in use") from e
        raise ConfigError(f"{flag}: cannot bind {addr}: {e.strerror}") from e
    return listening


class PortTaken(ConfigError):
    """Another process listens there."""


def cluster_fingerprint(config: Config) -> str:
    """Names the cluster by its members: keys have the same homes exactly under the same list."""
    return hashlib.blake2b("\n".join(config.members).encode(), digest_size=8).hexdigest()


def identity(config: Config) -> Identity:
    """Whose data directory it is: this member's, in this cluster."""
    return Identity("mesi_cache", f"{config.node_id} at {config.url}", cluster_fingerprint(config))
