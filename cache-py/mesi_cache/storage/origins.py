"""Main memory elsewhere: a Redis, or whatever answers GET, PUT and DELETE by HTTP.

An `Origin` keeps plain JSON values and knows nothing of versions. What is not JSON there is text,
and becomes a JSON string here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import aiohttp
import msgspec
from yarl import URL

from mesi_cache.config import ConfigError
from mesi_cache.storage.store import StoreUnavailable

TIMEOUT_S = 2.0
AT_ONCE = 64
DEFAULT_PREFIX = "mesi_cache:"

# Percent-encoded or not, servers take these for the folder above: it is not ours to touch.
_DOTS = frozenset({".", ".."})

T = TypeVar("T")


class Refused(Exception):
    """The origin will not take this change, now or later."""


class Origin(Protocol):
    """Values by key. Each call answers for each key on its own, in the order asked for."""

    async def get(self, keys: Sequence[str]) -> list[bytes | StoreUnavailable | None]:
        """The values as JSON text; None where there is none."""

    async def put(
        self, values: Sequence[tuple[str, bytes | None]]
    ) -> list[Refused | StoreUnavailable | None]:
        """Write each value; None removes."""

    async def stop(self) -> None:
        """Close connections."""


class HttpOrigin:
    """`GET url/key` (404 and 410: absent), `PUT url/key`, `DELETE url/key`, keys percent-encoded.
    An origin that answers a change with another 4xx, or 501, does not take it."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self._url = url.rstrip("/")
        self._max_bytes = max_bytes
        self._session: aiohttp.ClientSession | None = None
        self._at_once = asyncio.Semaphore(AT_ONCE)

    async def get(self, keys: Sequence[str]) -> list[bytes | StoreUnavailable | None]:
        return await asyncio.gather(*(self._guarded(self._get, key) for key in keys))

    async def put(
        self, values: Sequence[tuple[str, bytes | None]]
    ) -> list[Refused | StoreUnavailable | None]:
        return await asyncio.gather(*(self._guarded(self._put, *each) for each in values))

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _guarded(
        self, call: Callable[..., Awaitable[T]], *arguments: object
    ) -> T | StoreUnavailable:
        try:
            async with self._at_once, asyncio.timeout(TIMEOUT_S):
                return await call(*arguments)
        except (aiohttp.ClientError, OSError, TimeoutError, StoreUnavailable) as e:
            return StoreUnavailable(f"{self._url}: {str(e) or type(e).__name__}")

    async def _get(self, key: str) -> bytes | None:
        if key in _DOTS:
            return None
        async with self._request("GET", key) as answer:
            if answer.status in (404, 410):
                return None
            if answer.status != 200:
                raise StoreUnavailable(f"GET answered {answer.status}")
            body = await answer.content.read(self._max_bytes + 1)
            while len(body) <= self._max_bytes and not answer.content.at_eof():
                body += await answer.content.read(self._max_bytes + 1 - len(body))
        if len(body) > self._max_bytes:
            raise StoreUnavailable(f"a value of more than {self._max_bytes} bytes")
        return as_json(body)

    async def _put(self, key: str, value: bytes | None) -> Refused | None:
        if key in _DOTS:
            return Refused("no path can end in this key")
        method = "DELETE" if value is None else "PUT"
        async with self._request(method, key, value) as answer:
            status = answer.status
        if status < 300 or (value is None and status in (404, 410)):
            return None
        if status in (408, 425, 429) or (status >= 500 and status != 501) or status < 400:
            raise StoreUnavailable(f"{method} answered {status}")
        return Refused(f"{method} answered {status}")

    def _request(self, method: str, key: str, body: bytes | None = None) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=AT_ONCE), auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )  # fmt: skip
        # `encoded`: aiohttp would turn %2F and the like back into what they stand for.
        url = URL(f"{self._url}/{quote(key, safe='')}", encoded=True)
        headers = {"Accept-Encoding": "identity"}  # a little that unpacks into a lot is no value
        if body is not None:
            headers["Content-Type"] = "application/json"
        return self._session.request(method, url, data=body, headers=headers, allow_redirects=False)


class RedisOrigin:
    """Plain string values under `prefix` + key; `redis://host:port/db?prefix=…`."""

    def __init__(self, url: str, max_bytes: int) -> None:
        """Raises ConfigError if redis-py is not installed or the URL is none."""
        try:
            self._redis = import_module("redis.asyncio")
            errors = import_module("redis.exceptions")
        except ImportError:
            raise ConfigError("--store: redis needs redis-py: pip install redis") from None
        self._max_bytes = max_bytes
        self._errors: tuple[type[Exception], ...] = (errors.RedisError, OSError, TimeoutError)
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._prefix = query.pop("prefix", DEFAULT_PREFIX)
        self._where = f"redis at {parts.hostname}:{parts.port or 6379}"
        if query:
            raise ConfigError(f"--store: redis URLs take ?prefix=, not {', '.join(query)}")
        plain = urlunsplit(parts._replace(query=urlencode(query)))
        try:
            self._client = self._redis.Redis.from_url(
                plain, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
            )
        except (ValueError, TypeError) as e:
            raise ConfigError(f"--store: {e}") from None

    async def get(self, keys: Sequence[str]) -> list[bytes | StoreUnavailable | None]:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                values = await self._client.mget([self._prefix + key for key in keys])
        except self._errors as e:
            return [StoreUnavailable(f"{self._where}: {str(e) or type(e).__name__}")] * len(keys)
        return [self._taken(value) for value in values]

    def _taken(self, value: bytes | None) -> bytes | StoreUnavailable | None:
        if value is None:
            return None
        if len(value) > self._max_bytes:
            return StoreUnavailable(f"{self._where}: a value of more than {self._max_bytes} bytes")
        try:
            return as_json(value)
        except StoreUnavailable as e:
            return e

    async def put(
        self, values: Sequence[tuple[str, bytes | None]]
    ) -> list[Refused | StoreUnavailable | None]:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._client.pipeline(transaction=False) as p:
                for key, value in values:
                    name = self._prefix + key
                    p.delete(name) if value is None else p.set(name, value)
                await p.execute()
        except self._errors as e:
            return [StoreUnavailable(f"{self._where}: {str(e) or type(e).__name__}")] * len(values)
        return [None] * len(values)

    async def stop(self) -> None:
        await self._client.aclose()


def as_json(body: bytes) -> bytes:
    """`body` compact if it is JSON, else as a JSON string; StoreUnavailable if it is no text."""
    try:
        return msgspec.json.encode(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError):
        pass
    try:
        return msgspec.json.encode(body.decode())
    except (UnicodeError, msgspec.MsgspecError):
        raise StoreUnavailable("a value that is neither JSON nor text") from None
