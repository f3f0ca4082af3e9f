"""The stream between the two nodes: one long-lived WebSocket over mutually authenticated TLS.

The primary dials, both talk. Frames are batches: everything that gathered while the last frame was
being written goes into the next (a msgpack array of tagged structs). In order, nothing lost within
a link; when a link breaks, whatever was under way on it is void and the machine starts over on the
next.

A frame is written in the turn of the loop that made its messages, without a task that would have to
be woken first: `flush` takes the first step of `send_bytes` itself, as an eager task would (asyncio
has those from 3.12 on). Nearly always it is also the last one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

import aiohttp
import msgspec
from aiohttp import web

from secure_store.core.audit import Head
from secure_store.core.messages import Message
from secure_store.transport.tls import Tls

log = logging.getLogger(__name__)

PEER_PATH = "/peer/stream"
MAX_FRAME_BYTES = 64 << 20
FRAME_TARGET_BYTES = 1 << 20
OUTBOX_BYTES = 64 << 20
MAX_FRAME_MESSAGES = 0xFFFF
CONNECT_TIMEOUT_S = 2.0
RECONNECT_S = (0.02, 0.15)
_BROKEN = (aiohttp.ClientError, OSError, RuntimeError)  # the last: closed already


class AuditHead(msgspec.Struct, frozen=True, tag="audit_head"):
    """The end of the sender's audit chain, for safe keeping; `public_key` is pinned at first
    sight."""

    head: Head
    public_key: str


Wire = Message | AuditHead


class Refused(Exception):
    """The other side is not who it should be; the text says why."""


class Link:
    """One open connection. `number` names it for the machine; never reused."""

    def __init__(
        self,
        number: int,
        ws: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
        dialed: bool,
    ) -> None:
        self.number = number
        self.dialed = dialed
        self._ws = ws
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        # The last frame is in the transport's buffer, which is too full for another one.
        self._sending: Coroutine[asyncio.Future[None], None, None] | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._closing = False
        self._ended = asyncio.Event()
        self.frames = 0

    def put(self, encoded: bytes) -> None:
        """Queue one message. A link whose outbox is full is not keeping up: it is closed."""
        if self._outbox_bytes > OUTBOX_BYTES:
            self._closing = True
        self._outbox.append(encoded)
        self._outbox_bytes += len(encoded)
        self._drained.clear()

    def close(self) -> None:
        """Close once what is queued has been written."""
        self._closing = True
        self.flush()

    async def drained(self) -> None:
        """Wait until everything queued has been handed to the socket."""
        await self._drained.wait()

    async def ended(self) -> None:
        """Wait until it was closed and everything is written, or it broke."""
        await self._ended.wait()

    def flush(self) -> None:
        """Write what waits; what does not fit into the transport's buffer leaves later."""
        if self._sending is not None or self._ended.is_set():
            return
        while self._outbox:
            sending = self._ws.send_bytes(self._take_frame())
            try:
                room = sending.send(None)
            except StopIteration:
                continue
            except _BROKEN:
                self._break()
                return
            self._sending = sending
            room.add_done_callback(partial(self._go_on, sending))
            return
        self._drained.set()
        if self._closing:
            self._ended.set()

    def _go_on(
        self, sending: Coroutine[asyncio.Future[None], None, None], _: asyncio.Future[None]
    ) -> None:
        """There is room again, or the connection broke."""
        if self._sending is not sending:
            return
        self._sending = None
        try:
            sending.send(None)
        except StopIteration:
            self.flush()
        except _BROKEN:
            self._break()
        else:
            sending.close()
            self._break()  # it waits for something else: nothing that aiohttp does

    def _break(self) -> None:
        self._outbox.clear()
        self._outbox_bytes = 0
        self._ended.set()

    def abandon(self) -> None:
        """Nothing is written any more."""
        self._break()
        if self._sending is not None:
            self._sending.close()
            self._sending = None

    def _take_frame(self) -> bytes:
        taken: list[bytes] = []
        size = 0
        while self._outbox and size < FRAME_TARGET_BYTES and len(taken) < MAX_FRAME_MESSAGES:
            encoded = self._outbox.popleft()
            taken.append(encoded)
            size += len(encoded)
        self._outbox_bytes -= size
        self.frames += 1
        return _array_header(len(taken)) + b"".join(taken)


class Links:
    """All connections to the other node. Everything is called on the node's event loop."""

    def __init__(
        self,
        tls: Tls,
        *,
        on_up: Callable[[int, bool], None],
        on_down: Callable[[int], None],
        on_frame: Callable[[int, Sequence[Wire]], None],
    ) -> None:
        self._tls = tls
        self._on_up = on_up
        self._on_down = on_down
        self._on_frame = on_frame
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[Wire])
        self._links: dict[int, Link] = {}
        self._touched: list[Link] = []
        self._loop = asyncio.get_running_loop()
        self._numbers = 0
        self._session: aiohttp.ClientSession | None = None
        self._dialing: asyncio.Task[None] | None = None
        self._target: str | None = None

    # --- sending ------------------------------------------------------------------------------

    def send(self, number: int, message: Wire) -> None:
        """Queue a message, for `flush` or the end of this turn; nothing happens if the link is
        gone."""
        link = self._links.get(number)
        if link is not None:
            if not self._touched:
                self._loop.call_soon(self.flush)
            if link not in self._touched:
                self._touched.append(link)
            link.put(self._encoder.encode(message))

    def flush(self) -> None:
        """Write what was queued."""
        touched, self._touched = self._touched, []
        for link in touched:
            link.flush()

    def close(self, number: int) -> None:
        link = self._links.get(number)
        if link is not None:
            link.close()

    def get(self, number: int) -> Link | None:
        return self._links.get(number)

    # --- dialing ------------------------------------------------------------------------------

    def dial(self, url: str | None) -> None:
        """Keep a link to `url`; None: to nobody."""
        if url == self._target:
            return
        self._target = url
        if self._dialing is not None:
            self._dialing.cancel()
            self._dialing = None
        if url is not None:
            self._dialing = asyncio.create_task(self._keep(url), name="link")

    async def _keep(self, url: str) -> None:
        complaint = ""
        backoff_s = RECONNECT_S[0]
        while True:
            try:
                await self._connect(url)
                backoff_s = RECONNECT_S[0]
            except (Refused, aiohttp.ClientSSLError) as e:
                if str(e) != complaint:  # once per reason, not five times a second
                    complaint = str(e)
                    log.error("cannot trust %s: %s", url, e)
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                log.debug("link to %s: %s", url, e)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(backoff_s * 2, RECONNECT_S[1])

    async def _connect(self, url: str) -> None:
        """Dial once, then serve the link until it breaks."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._tls.client),
                auto_decompress=False,
            )
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            ws = await self._session.ws_connect(
                url + PEER_PATH, compress=0, max_msg_size=MAX_FRAME_BYTES
            )
        ssl_object = ws.get_extra_info("ssl_object")
        if ssl_object is None or not self._tls.is_peer(ssl_object.getpeercert(True)):
            await ws.close()
            raise Refused("its certificate is not one of the pinned ones (--peer_cert)")
        await self._serve(ws, dialed=True)

    # --- accepting ----------------------------------------------------------------------------

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """The handler of the peer's route: only a pinned client certificate gets past it."""
        transport = request.transport
        ssl_object = transport.get_extra_info("ssl_object") if transport else None
        if ssl_object is None or not self._tls.is_peer(ssl_object.getpeercert(True)):
            raise web.HTTPForbidden(text="Peer certificate required")
        ws = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES, compress=False)
        await ws.prepare(request)
        await self._serve(ws, dialed=False)
        return ws

    # --- both ---------------------------------------------------------------------------------

    async def _serve(
        self, ws: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, *, dialed: bool
    ) -> None:
        self._numbers += 1
        link = self._links[self._numbers] = Link(self._numbers, ws, dialed)
        ended = asyncio.create_task(link.ended())
        reader = asyncio.create_task(self._read(ws, link))
        self._on_up(link.number, dialed)
        try:
            await asyncio.wait((ended, reader), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            reader.cancel()
            link.abandon()
            del self._links[link.number]
            self._on_down(link.number)
            results = await asyncio.gather(ended, reader, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, ConnectionError):
                    log.debug("link %d ended: %r", link.number, result)
            try:
                async with asyncio.timeout(0.5):
                    await ws.close()
            except TimeoutError:
                log.debug("link %d did not close in time", link.number)

    async def _read(
        self, ws: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, link: Link
    ) -> None:
        async for frame in ws:
            if frame.type is not aiohttp.WSMsgType.BINARY:
                return
            try:
                messages = self._decoder.decode(frame.data)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
                log.error("malformed frame from the other node, link closed: %s", e)
                return
            self._on_frame(link.number, messages)

    def hang_up(self) -> None:
        """Close every link once what is queued on it has been written."""
        self.dial(None)
        for link in self._links.values():
            link.close()

    async def stop(self) -> None:
        """Write what is queued (0.2 s at most), then close everything."""
        waiting = [asyncio.ensure_future(link.drained()) for link in self._links.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=0.2)
        for future in waiting:
            future.cancel()
        if self._dialing is not None:
            self._dialing.cancel()
            await asyncio.gather(self._dialing, return_exceptions=True)
        for link in list(self._links.values()):
            link.close()
        if self._session is not None:
            await self._session.close()


def _array_header(n: int) -> bytes:
    return bytes((0x90 | n,)) if n < 16 else b"\xdc" + n.to_bytes(2, "big")
