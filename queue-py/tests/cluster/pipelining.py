"""A client that writes many requests at once on one raw connection, and reads their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from testkit.cluster import Cluster


class Pipeline:
    """One connection. `write` without `read` is what a client does that hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, cluster: Cluster, index: int) -> Pipeline:
        host, _, port = cluster.views[index].bind().rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def write(self, requests: Sequence[bytes]) -> None:
        self._writer.write(b"".join(requests))

    async def read(self) -> tuple[int, bytes]:
        """Status and body of the next answer. Raises OSError or EOFError when there is none."""
        async with asyncio.timeout(20):
            head = await self._reader.readuntil(b"\r\n\r\n")
            _, _, rest = head.partition(b"Content-Length: ")
            size = int(rest.split(b"\r\n", 1)[0]) if rest else 0
            return int(head[9:12]), await self._reader.readexactly(size)

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


def get_request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: q\r\n\r\n".encode()


def post_request(path: str, body: object) -> bytes:
    text = msgspec.json.encode(body)
    return b"POST %b HTTP/1.1\r\nHost: q\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(), len(text), text,
    )  # fmt: skip
