"""The client's way to the cluster: one WebSocket (`GET /stream`) to one node at a time.

Items go out in frames: a lone one at once, together with whatever else was asked in the same turn
of the event loop; while answers are under way, what gathers until the next answer comes, or for
`LINGER_S`. When the connection breaks it is made again, to the next node, after a pause with
jitter, and what was not answered is sent again if that is safe.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

LINGER_S = 0.002
"""How long an item waits for company while others are under way."""
BACKOFF_S = (0.02, 1.0)
RETRY_S = (0.02, 0.5)
CONNECT_TIMEOUT_S = 2.0
HEARTBEAT_S = 5.0
MAX_UNDER_WAY = 2048
"""Below what a node takes from one connection; beyond it `ask` waits."""
FRAME_ITEMS = 500
FRAME_BYTES = 512 * 1024
MAX_ANSWER_BYTES = 64 << 20

log = logging.getLogger(__name__)
_json = msgspec.json.Encoder()


class Incoming(msgspec.Struct, frozen=True):
    """From a node: an answer (`cid`), a delivery (`messages`) or a subscription's trouble."""

    cid: int | None = None
    status: int = 0
    retry_after_s: int = 0
    body: msgspec.Raw = msgspec.Raw(b"{}")
    subscription: int | None = None
    messages: list[msgspec.Raw] | None = None
    receipt: str | None = None
    """Of all the messages."""


_incoming = msgspec.json.Decoder(list[Incoming])


class Reply(msgspec.Struct, frozen=True):
    """An answer: the status and body of the HTTP row."""

    status: int
    body: dict[str, Any]

    @property
    def definite(self) -> bool:
        """Nothing was done, for certain (of a refusal)."""
        return self.body.get("definite") is not False


class NotDone(Exception):
    """No answer in time. `sent`: it may have been done all the same; `last`: the last refusal."""

    def __init__(self, sent: bool, last: Reply | None = None) -> None:
        super().__init__(sent)
        self.sent = sent
        self.last = last


class _Pending:
    __slots__ = ("answered", "item", "repeatable", "sent")

    def __init__(self, item: bytes, repeatable: bool) -> None:
        self.item = item
        self.repeatable = repeatable
        self.sent = False
        self.answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()


class Link:
    """`items_at_connect()` gives what a fresh connection must hear first; `items_at_flush()` what
    rides along with each frame; `on_delivery(subscription, messages, receipt)` takes what comes by
    itself, `on_answer(cid, reply)` the answers to what was not asked with `ask`."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        tls: ssl.SSLContext | None,
        items_at_connect: Callable[[], Iterable[bytes]],
        items_at_flush: Callable[[], Iterable[bytes]],
        on_delivery: Callable[[int, list[msgspec.Raw], str | None], None],
        on_answer: Callable[[int, Reply], None],
    ) -> None:
        self._urls = list(urls)
        random.shuffle(self._urls)  # many clients spread over the nodes
        self._tls = tls
        self._items_at_connect = items_at_connect
        self._items_at_flush = items_at_flush
        self._on_delivery = on_delivery
        self._on_answer = on_answer
        self._pending: dict[int, _Pending] = {}
        self._gathered: list[bytes] = []
        self._slots = asyncio.Semaphore(MAX_UNDER_WAY)
        self._cid = 0
        self._connected = False
        self._flush_at: asyncio.Handle | None = None
        self._wake = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._runner: asyncio.Task[None] | None = None
        self.connections = 0
        """Made so far."""
        self.frames = 0
        """Sent so far."""
        self._trouble = ""

    def start(self) -> None:
        """Begin to connect; what is asked meanwhile waits."""
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True)
        self._session = aiohttp.ClientSession(connector=connector)
        self._runner = asyncio.create_task(self._run(), name="queue-client")

    async def close(self) -> None:
        """End the connection. What was not answered fails."""
        if self._flush_at is not None:
            self._flush_at.cancel()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        for pending in self._pending.values():
            if not pending.answered.done():
                pending.answered.set_exception(NotDone(pending.sent))
                pending.answered.exception()  # whoever waited for it may be gone

    # ── asking ──────────────────────────────────────────────────────────────────────────────────

    def next_cid(self) -> int:
        """A number for an item, or the name of a subscription."""
        self._cid += 1
        return self._cid

    async def ask(self, item: dict[str, Any], *, repeatable: bool, within_s: float) -> Reply:
        """The answer to an item. Passing trouble (429, 503, 507) is tried again until the time is
        over, and so is a broken connection if the item is `repeatable`. Raises NotDone."""
        in_doubt = False
        last: Reply | None = None
        pending: _Pending | None = None
        try:
            async with asyncio.timeout(within_s), self._slots:
                pause_s = RETRY_S[0]
                while True:
                    cid = self.next_cid()
                    pending = _Pending(_json.encode({**item, "cid": cid}), repeatable)
                    reply = await self._once(cid, pending)
                    if reply.status not in (429, 503, 507):
                        return reply
                    if not reply.definite and not repeatable:
                        raise NotDone(sent=True)
                    in_doubt |= not reply.definite
                    last, pending = reply, None
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                    pause_s = min(2 * pause_s, RETRY_S[1])
        except TimeoutError:
            in_doubt |= pending is not None and pending.sent
            if last is not None and not in_doubt:
                return last
            raise NotDone(in_doubt, last) from None

    async def _once(self, cid: int, pending: _Pending) -> Reply:
        self._pending[cid] = pending
        self._gathered.append(pending.item)
        pending.sent = self._connected
        self.flush_soon()
        try:
            return await pending.answered
        finally:
            self._pending.pop(cid, None)

    def say(self, item: bytes) -> None:
        """Send an item that is not asked again; nothing happens without a connection."""
        if self._connected:
            self._gathered.append(item)
            self.flush_soon()

    def flush_soon(self) -> None:
        """Send what gathered: now-ish, or with the next answer."""
        if not self._connected or self._flush_at is not None:
            return
        loop = asyncio.get_running_loop()
        if len(self._pending) > len(self._gathered):
            self._flush_at = loop.call_later(LINGER_S, self._flush)
        else:
            self._flush_at = loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_at = None
        self._wake.set()

    # ── the connection ──────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        backoff_s = BACKOFF_S[0]
        attempt = 0
        while True:
            url = self._urls[attempt % len(self._urls)]
            attempt += 1
            began_s = asyncio.get_running_loop().time()
            try:
                await self._converse(url)
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as e:
                trouble = f"{url}: {str(e) or type(e).__name__}"
                if trouble != self._trouble:  # once, not at every attempt
                    self._trouble = trouble
                    log.warning("no stream to %s", trouble)
            if asyncio.get_running_loop().time() - began_s > BACKOFF_S[1]:
                backoff_s = BACKOFF_S[0]
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(2 * backoff_s, BACKOFF_S[1])

    async def _converse(self, url: str) -> None:
        """Connect and talk until the connection ends."""
        assert self._session is not None  # noqa: S101 - start() made it
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            ws = await self._session.ws_connect(
                f"{url}/stream", heartbeat=HEARTBEAT_S, compress=0, max_msg_size=MAX_ANSWER_BYTES
            )
        self.connections += 1
        self._connected = True
        # Once more, in the order in which they were asked first.
        self._gathered = [*self._items_at_connect()]
        for pending in self._pending.values():
            self._gathered.append(pending.item)
            pending.sent = True
        self._wake.set()
        writer = asyncio.create_task(self._write(ws))
        try:
            async for frame in ws:
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    break
                self._take(_incoming.decode(frame.data))
        finally:
            self._connected = False
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                await ws.close()
            self._broken(too_big=ws.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG)

    def _take(self, items: list[Incoming]) -> None:
        for item in items:
            if item.messages is not None and item.subscription is not None:
                self._on_delivery(item.subscription, item.messages, item.receipt)
            elif item.subscription is not None:
                log.info("subscription %d waits: %s", item.subscription, bytes(item.body).decode())
            elif item.cid is not None:
                # Out with it now: its caller resumes later, and what that one asks next must not
                # wait for company of those who are answered already.
                pending = self._pending.pop(item.cid, None)
                reply = Reply(item.status, msgspec.json.decode(item.body, type=dict[str, Any]))
                if pending is None:
                    self._on_answer(item.cid, reply)
                elif not pending.answered.done():
                    pending.answered.set_result(reply)
            else:
                log.warning("a node refused an item: %s", bytes(item.body).decode())
        if self._gathered:
            if self._flush_at is not None:
                self._flush_at.cancel()
            self._flush()

    async def _write(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            items, self._gathered = [*self._gathered, *self._items_at_flush()], []
            at = 0
            while at < len(items):
                size = 0
                start = at
                while at < len(items) and at - start < FRAME_ITEMS:
                    size += len(items[at])
                    if size > FRAME_BYTES and at > start:
                        break
                    at += 1
                text = b"[" + b",".join(items[start:at]) + b"]"
                self.frames += 1
                await ws.send_frame(text, aiohttp.WSMsgType.TEXT)

    def _broken(self, too_big: bool) -> None:
        """Who may ask again waits for the next connection; the others are told."""
        largest = max((len(p.item) for p in self._pending.values() if p.sent), default=0)
        for pending in self._pending.values():
            if pending.answered.done() or not pending.sent:
                continue
            if too_big and len(pending.item) == largest:
                error = {"error": "Request body too large"}
                pending.answered.set_result(Reply(413, error))
            elif not pending.repeatable:
                pending.answered.set_exception(NotDone(sent=True))
