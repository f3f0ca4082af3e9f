"""Accepts connections, and looks at the first byte before TLS does.

A client that speaks plain HTTP to this port would otherwise see its connection end without a word.
The byte is peeked at, not taken: the TLS layer finds the stream as it came. Where the event loop
cannot watch a socket (Windows' own loop), the plain server of asyncio listens instead, and plain
HTTP ends in a closed connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

log = logging.getLogger(__name__)

FIRST_BYTE_S = 10.0
HANDSHAKE_S = 10.0
MAX_SILENT = 1_000  # connections that have not said anything yet
ACCEPT_AT_ONCE = 64
_TLS_HANDSHAKE = 0x16  # RFC 8446, section 5.1: the first record's type
_BODY = b'{"error":"Client sent an HTTP request to an HTTPS server"}'
PLAIN_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nServer: secure-store\r\nContent-Type: application/json\r\n"
    b"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Listener:
    """A listening socket whose connections become TLS ones. `close()` stops accepting."""

    def __init__(
        self,
        listening: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        context: ssl.SSLContext,
    ) -> None:
        self._listening = listening
        self._factory = factory
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        self._greeting: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Raises NotImplementedError where the loop cannot watch sockets."""
        self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        self._loop.remove_reader(self._listening)
        for connection in list(self._silent):
            self._forget(connection)
            connection.close()
        for task in self._greeting:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:  # out of file descriptors: those who are here go first
                log.error("cannot accept connections: %s", e)
                self._loop.remove_reader(self._listening)
                self._loop.call_later(1.0, self._again)
                return
            connection.setblocking(False)
            if len(self._silent) >= MAX_SILENT:  # the one that has been silent longest makes room
                oldest = next(iter(self._silent))
                self._forget(oldest)
                oldest.close()
            self._look(connection)

    def _again(self) -> None:
        if self._listening.fileno() >= 0:
            self._loop.add_reader(self._listening, self._accept)

    def _look(self, connection: socket.socket) -> None:
        """Hand over, refuse, or wait for the first byte."""
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            if connection not in self._silent:
                timer = self._loop.call_later(FIRST_BYTE_S, self._give_up, connection)
                self._silent[connection] = timer
                self._loop.add_reader(connection, self._look, connection)
            return
        except OSError:
            first = b""
        self._forget(connection)
        if first and first[0] == _TLS_HANDSHAKE:
            task = self._loop.create_task(self._greet(connection))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)
            return
        try:
            if first:
                connection.recv(65_536)  # unread bytes would turn the close into a reset
            if first.isalpha():  # a method's name
                connection.send(PLAIN_ANSWER)
        except OSError as e:
            log.debug("a client that spoke no TLS is gone: %s", e)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        timer = self._silent.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self._loop.remove_reader(connection)

    def _give_up(self, connection: socket.socket) -> None:
        self._forget(connection)
        connection.close()

    async def _greet(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_S,
            )
        except (OSError, ssl.SSLError, TimeoutError) as e:
            log.debug("a TLS handshake failed: %s", e)


async def listen(
    listening: socket.socket,
    factory: Callable[[], asyncio.BaseProtocol],
    context: ssl.SSLContext,
) -> Callable[[], None]:
    """Serve on the socket; gives what stops it."""
    listener = Listener(listening, factory, context)
    try:
        listener.start()
    except NotImplementedError:
        server = await asyncio.get_running_loop().create_server(
            factory, sock=listening, ssl=context, backlog=1024
        )
        return server.close
    return listener.close
