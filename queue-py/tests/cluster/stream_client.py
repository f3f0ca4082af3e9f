"""A bare client of `/stream`: sends what it is told and keeps what comes, by kind."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from testkit.cluster import Cluster

DEADLINE_S = 20.0


class StreamClient:
    """`async with StreamClient(cluster, 0) as stream`."""

    def __init__(self, cluster: Cluster, index: int, **headers: str) -> None:
        self._url = cluster.url(index, "/stream")
        self._headers = headers
        self._session = aiohttp.ClientSession()
        self.ws: aiohttp.ClientWebSocketResponse
        self.answers: dict[Any, dict[str, Any]] = {}
        self.uncalled: list[dict[str, Any]] = []
        """Answers with no cid."""
        self.delivered: list[dict[str, Any]] = []
        self.receipts: list[tuple[str | None, int]] = []
        """Of each delivery: its receipt, and how many messages it has."""
        self.troubles: list[dict[str, Any]] = []
        self._cid = 0

    async def __aenter__(self) -> StreamClient:
        self.ws = await self._session.ws_connect(
            self._url, headers=self._headers, max_msg_size=64 << 20
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.ws.close()
        await self._session.close()

    async def send(self, *items: dict[str, Any]) -> None:
        """One frame."""
        await self.ws.send_str(msgspec.json.encode(list(items)).decode())

    async def take(self) -> bool:
        """Sort one frame; False: closed."""
        async with asyncio.timeout(DEADLINE_S):
            frame = await self.ws.receive()
        if frame.type is not aiohttp.WSMsgType.TEXT:
            return False
        for item in msgspec.json.decode(frame.data, type=list[dict[str, Any]]):
            if "messages" in item:
                self.delivered += item["messages"]
                self.receipts.append((item.get("receipt"), len(item["messages"])))
            elif "subscription" in item:
                self.troubles.append(item)
            elif item["cid"] is None:
                self.uncalled.append(item)
            else:
                self.answers[item["cid"]] = item
        return True

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One item and its answer; again while a slow machine has just lost the queue's owner."""
        give_up = time.monotonic() + DEADLINE_S
        while True:
            self._cid += 1
            await self.send({"op": op, "cid": self._cid, **fields})
            answer = await self.answer(self._cid)
            ownerless = answer["status"] == 503 and answer["body"].get("definite")
            if not ownerless or time.monotonic() > give_up:
                return answer

    async def answer(self, cid: Any) -> dict[str, Any]:
        """The answer to an item that was sent."""
        while cid not in self.answers:
            assert await self.take(), f"closed ({self.ws.close_code}) before the answer to {cid}"
        return self.answers.pop(cid)

    async def messages(self, count: int) -> list[dict[str, Any]]:
        """That many deliveries."""
        while len(self.delivered) < count:
            assert await self.take(), f"closed with {len(self.delivered)} of {count} messages"
        taken, self.delivered = self.delivered[:count], self.delivered[count:]
        return taken
