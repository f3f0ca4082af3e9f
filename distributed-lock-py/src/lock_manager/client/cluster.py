"""The nodes as a client sees them: who leads, and asking until the outcome is known."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from lock_manager.client.errors import Unavailable, refuse

BACKOFF_S = (0.02, 0.5)
CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 5.0  # beyond what the request itself may wait
LOOK_AROUND_S = 1.0  # while a request waits this long, ask the others who leads


class Cluster:
    """Finds the leader, follows it when it changes, and sends a request again and again (the same
    bytes, hence under the same request id) until its outcome is known.

    `urls`: some nodes' HTTP addresses; the others are learned. `persist_s`: how long a request is
    tried while no node can answer it.
    """

    def __init__(
        self, urls: Sequence[str], *, persist_s: float, ssl: ssl.SSLContext | None = None
    ) -> None:
        if not urls:
            raise ValueError("at least one URL is needed")
        self.persist_s = persist_s
        self._urls = [url.rstrip("/") for url in urls]
        self._leader = self._urls[0]
        self._ssl = ssl
        self._session: aiohttp.ClientSession | None = None
        self._meeting: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Must run on the loop."""
        connector = aiohttp.TCPConnector(limit=0, ssl=self._ssl or True)
        self._session = aiohttp.ClientSession(connector=connector)

    async def close(self) -> None:
        if self._meeting is not None:
            self._meeting.cancel()
            with suppress(asyncio.CancelledError):
                await self._meeting
        if self._session is not None:
            await self._session.close()

    async def ask(
        self,
        path: str,
        body: dict[str, Any],
        *,
        wait_s: float = 0.0,
        persist_s: float | None = None,
    ) -> tuple[dict[str, Any], float]:
        """The answer's body, and when the request that it answers was sent (on the loop's clock).

        `wait_s`: how long the request itself may wait for its answer. Raises what the answer means
        (errors.py), or Unavailable."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s + (self.persist_s if persist_s is None else persist_s)
        encoded = msgspec.json.encode(body)
        backoff_s = BACKOFF_S[0]
        definite = True
        while True:
            url, sent_s = self._leader, loop.time()
            limit_s = min(wait_s + ANSWER_TIMEOUT_S, max(0.05, deadline - sent_s))
            try:
                status, answer = await self._exchange(url, path, encoded, limit_s)
            except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
                definite = False
                self._look_elsewhere(url)
            else:
                match status:
                    case 200:
                        if self._meeting is None:
                            self._meeting = asyncio.create_task(self._meet_the_others(url))
                        return answer, sent_s
                    case 307 if answer.get("leader"):
                        self._learn(answer["leader"])
                        if self._leader != url:
                            continue
                    case 503:
                        definite = definite and answer.get("definite", True) is not False
                        self._look_elsewhere(url)
                    case _:
                        refuse(status, {**answer, "sent_s": sent_s})
            if loop.time() + backoff_s > deadline:
                raise Unavailable(f"no node answers {path}", definite=definite)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            backoff_s = min(backoff_s * 2, BACKOFF_S[1])

    async def _exchange(
        self, url: str, path: str, body: bytes, limit_s: float
    ) -> tuple[int, dict[str, Any]]:
        """One request to one node; given up when the others say that somebody else leads."""
        request = asyncio.create_task(self._post(url, path, body, limit_s))
        try:
            while True:
                done, _ = await asyncio.wait((request,), timeout=LOOK_AROUND_S)
                if done:
                    return request.result()
                if await self._leads_elsewhere(url):
                    raise TimeoutError("another node leads")
        finally:
            if not request.done():
                request.cancel()
                with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                    await request

    async def _post(
        self, url: str, path: str, body: bytes, limit_s: float
    ) -> tuple[int, dict[str, Any]]:
        if self._session is None:
            raise RuntimeError("use the client by `async with`")
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_TIMEOUT_S)
        async with self._session.post(
            url + path, data=body, timeout=timeout, allow_redirects=False
        ) as response:
            return response.status, msgspec.json.decode(await response.read(), type=dict[str, Any])

    async def _leads_elsewhere(self, url: str) -> bool:
        """Whether another node is known to lead; then it is learned."""
        others = [other for other in self._urls if other != url]
        random.shuffle(others)
        for other in others:
            leader = (await self._status(other)).get("leader")
            if leader not in (None, url):
                self._learn(leader)
                return True
        return False

    async def _meet_the_others(self, url: str) -> None:
        """Learn every member's address, for when the ones we were given are all down."""
        scheme = url.partition("://")[0]
        peers = (await self._status(url)).get("peers", ())
        if not peers:
            self._meeting = None  # after the next answer, then
        for peer in peers:
            other = f"{scheme}://{peer['http_addr']}"
            if peer["http_addr"] and other not in self._urls:
                self._urls.append(other)

    async def _status(self, url: str) -> dict[str, Any]:
        """A node's /status; empty if it does not answer."""
        timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
        if self._session is not None:
            with suppress(aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
                async with self._session.get(url + "/status", timeout=timeout) as response:
                    return msgspec.json.decode(await response.read(), type=dict[str, Any])
        return {}

    def _learn(self, url: str) -> None:
        self._leader = url
        if url not in self._urls:
            self._urls.append(url)

    def _look_elsewhere(self, url: str) -> None:
        """Try the next node, unless another task found a better one meanwhile."""
        if self._leader == url:
            at = self._urls.index(url)
            self._leader = self._urls[(at + 1) % len(self._urls)]
