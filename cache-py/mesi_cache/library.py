"""The cache inside your own process: a hit is a look into a dict, and never an old value.

    async with CacheNode(addr="127.0.0.1:9000", peers=["http://127.0.0.1:9001"]) as cache:
        await cache.set("city", "Balikpapan")
        await cache.get("city")

It is the same node that `main.py` runs, on the event loop of the process that embeds it, with a
port of its own for the other members (and for anyone who prefers HTTP). It installs no signal
handler, no logging, no event loop policy. One node belongs to one event loop of one process; a
process that forks makes its node afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import msgspec

from mesi_cache import config as configuration
from mesi_cache.calls import (
    MAX_KEY_BYTES,
    CacheUnavailable,
    KeyReused,
    NotAnInteger,
    VersionMismatch,
    check_key,
    encode,
    milliseconds,
)
from mesi_cache.clock import seconds
from mesi_cache.config import Config, ConfigError
from mesi_cache.core.cache.slots import Slots
from mesi_cache.core.records import Cas, Delete, Incr, Operation, Outcome, Write
from mesi_cache.core.step import Changed, Found, Missing, Unavailable
from mesi_cache.member import Member, Opened, PortTaken, open_member
from mesi_cache.memoize import Memoized, memoize
from mesi_cache.node import Node

log = logging.getLogger(__name__)

HIT_SAMPLE = 1023  # one hit in so many is timed: timing each would double it

P = ParamSpec("P")
T = TypeVar("T")
_NO_LINES: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Entry:
    """A value with what belongs to it. `ttl`: seconds left, None for ever."""

    value: Any
    version: int
    ttl: float | None


class CacheNode:
    """One member of the cluster. Values are whatever JSON can carry, and every read gives a copy of
    its own. Keys are 1 to 256 bytes of text without NUL.

    Every call raises CacheUnavailable within 5 s if its key's home does not answer, and ValueError
    or TypeError for what is no key or value.
    """

    def __init__(
        self,
        addr: str | Sequence[str],
        peers: Iterable[str] = (),
        *,
        id: str | None = None,
        data_dir: str | Path | None = None,
        **flags: object,
    ) -> None:
        """`addr` is `host:port`, `peers` are the URLs of the other members; every flag of `main.py`
        may be given by its name (`capacity=…`, `store=…`, `lease_ms=…`, `insecure=True`).
        `id` defaults to the address, `data_dir` to `data/<id>`.

        One node per worker process: give the addresses of all of them as a list, in every worker
        the same. Each takes the first that is free, the rest are its peers.

        Raises ConfigError for what `main.py` would refuse, here or when it starts.
        """
        addrs = [addr] if isinstance(addr, str) else list(addr)
        urls = [f"{'https' if flags.get('tls_cert') else 'http'}://{each}" for each in addrs]
        if not addrs:
            raise ConfigError("addr: no address")
        self._configs = [
            configuration.parse(
                _argv(
                    {"addr": each, "peers": ",".join(dict.fromkeys((*urls, *peers))),
                     "id": id or each.translate(_FOLDER), "data_dir": data_dir, **flags}
                )
            )
            for each in addrs
        ]  # fmt: skip
        if len(addrs) > 1 and (id is not None or data_dir is not None):
            raise ConfigError("id and data_dir belong to one node: leave them out for several")
        self._opened: Opened | None = None
        self._member: Member | None = None
        self._node: Node | None = None
        self._halted = False
        self._lines: Slots | dict[str, Any] = _NO_LINES
        self._decode = msgspec.json.Decoder().decode

    # --- its life -----------------------------------------------------------------------------

    async def start(self) -> Self:
        """Take the port and the data directory, and serve. (`async with` does it.)"""
        if self._member is not None:
            raise RuntimeError("this node has been started already")
        opened = await self._open()
        try:
            # In somebody else's log, each line's life is a detail.
            member = await Member.start(opened, self._halt, transitions_at=logging.DEBUG)
        except BaseException:
            await asyncio.to_thread(opened.close)
            raise
        self._opened, self._member, self._node = opened, member, member.node
        self._halted = False
        # What a hit needs, as near as it gets.
        self._lines = member.node.machine.cache.lines
        self._touch = self._lines.touch
        self._counts = member.node.machine.counts
        self._differ = member.node.differ
        return self

    async def stop(self) -> None:
        """Give the lines back, store what is logged, free the port; within 5 s."""
        member, opened = self._member, self._opened
        self._member = self._opened = self._node = None
        self._lines = _NO_LINES
        if member is not None and opened is not None:
            try:
                await member.stop()
            finally:
                await asyncio.to_thread(opened.close)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    async def cleanup_ctx(self, app: object) -> AsyncIterator[None]:
        """For aiohttp: `app.cleanup_ctx.append(cache.cleanup_ctx)`."""
        async with self:
            yield

    async def _open(self) -> Opened:
        for config in self._configs:
            opening = asyncio.ensure_future(asyncio.to_thread(open_member, config))
            try:
                return await asyncio.shield(opening)
            except PortTaken:
                if config is self._configs[-1]:
                    raise
            except asyncio.CancelledError:
                opening.add_done_callback(_close_after_all)
                raise
        raise RuntimeError("not reached")  # the last one returns or raises

    def _halt(self) -> None:
        """The disk failed: nothing may be shown any more, as after a crash."""
        log.error("the cache node has stopped: its data directory failed")
        self._halted = True
        self._lines = _NO_LINES

    @property
    def url(self) -> str:
        """This member's name, and where its HTTP API is."""
        return self._config.url

    @property
    def _config(self) -> Config:
        return self._opened.config if self._opened is not None else self._configs[0]

    def status(self) -> dict[str, object]:
        """What GET /status says."""
        return self._running().status()

    def metrics(self) -> dict[str, object]:
        """What GET /metrics says."""
        return self._running().metrics_json()

    # --- reading ------------------------------------------------------------------------------

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` if it is absent."""
        # All of a hit stands here, for speed; `Node.lookup` is the same in readable form.
        line = self._lines.get(key)
        if line is not None:
            now_ms = seconds() * 1000
            if (
                now_ms < line.stop_ms
                and (now_ms < line.until_ms or now_ms < line.session.until_ms)
                and not self._differ
            ):
                self._touch(key)
                counts = self._counts
                counts.reads += 1
                counts.hits += 1
                if counts.hits & HIT_SAMPLE == 1:
                    self._running().timed_hit(now_ms)
                return self._decode(line.record.value)  # type: ignore[arg-type]  # a slot holds a value
        found = await self.read(key)
        return self._decode(found.value) if found is not None else default

    async def entry(self, key: str) -> Entry | None:
        """The value with its version and time left; None if the key is absent."""
        found = await self.read(key)
        if found is None:
            return None
        return Entry(self._decode(found.value), found.version, _ttl(found))

    async def ttl(self, key: str) -> float | None:
        """Seconds until `key` is forgotten, None for never; KeyError if it is absent."""
        found = await self.read(key)
        if found is None:
            raise KeyError(key)
        return _ttl(found)

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are not absent; one round to each home."""
        names = [check_key(key) for key in dict.fromkeys(keys)]
        values: dict[str, Any] = {}
        for key, answer in zip(names, await self._running().read_many(names), strict=True):
            match answer:
                case Found(value):
                    values[key] = self._decode(value)
                case Unavailable():
                    raise CacheUnavailable(answer, key)
                case Missing():
                    pass
        return values

    async def read(self, key: str) -> Found | None:
        """What is stored, as JSON text: for those who decode it themselves."""
        node = self._running()
        answer = node.lookup(check_key(key)) or await node.read(key)
        if isinstance(answer, Unavailable):
            raise CacheUnavailable(answer, key)
        return None if isinstance(answer, Missing) else answer

    # --- changing -----------------------------------------------------------------------------

    async def set(
        self, key: str, value: Any, *, ttl: float | None = None, once: str | None = None
    ) -> int:
        """Write `value`, for `ttl` seconds (None: for ever). Returns its version.

        `once`, here and in the next three, is an idempotency key: the same call again with the same
        key, on any node, within an hour, has the same result and no further effect. Another call
        with that key raises KeyReused."""
        operation = Write(self._value(value), milliseconds(ttl))
        return (await self.change(key, operation, once)).version

    async def cas(
        self,
        key: str,
        expected_version: int,
        value: Any,
        *,
        ttl: float | None = None,
        once: str | None = None,
    ) -> int:
        """Write `value` if the key is still at `expected_version` (0: absent). Returns the new
        version; raises VersionMismatch."""
        operation = Cas(expected_version, self._value(value), milliseconds(ttl))
        outcome = await self.change(key, operation, once)
        if outcome.status == "mismatch":
            raise VersionMismatch(key, outcome.version)
        return outcome.version

    async def delete(self, key: str, *, once: str | None = None) -> bool:
        """Forget `key`, on every node, before this returns. False if there was nothing."""
        return (await self.change(key, Delete(), once)).status == "done"

    async def incr(self, key: str, by: int = 1, *, once: str | None = None) -> int:
        """Add `by` to an integer (an absent key counts as 0), at once for all nodes. Returns the
        sum; raises NotAnInteger."""
        if type(by) is not int or abs(by) > 1 << 53:  # a bool is no number here
            raise ValueError("by: expected a whole number within 53 bits")
        outcome = await self.change(key, Incr(by), once)
        if outcome.status == "not_integer" or outcome.value is None:
            raise NotAnInteger(f"{key!r} holds no integer in range")
        return int(outcome.value)

    async def set_many(
        self, values: Mapping[str, Any], *, ttl: float | None = None
    ) -> dict[str, int]:
        """Write all of them, one round to each home; a batch, not a transaction. Returns their
        versions; CacheUnavailable names one that failed, the others may have been written."""
        ttl_ms = milliseconds(ttl)
        changes = [(check_key(key), Write(self._value(v), ttl_ms)) for key, v in values.items()]
        answers = await self._running().change_many(changes)
        return {
            key: _outcome(answer, key).version
            for (key, _), answer in zip(changes, answers, strict=True)
        }

    async def change(self, key: str, operation: Operation, once: str | None = None) -> Outcome:
        """One change in the core's own words."""
        if once is not None and not 0 < len(once) <= MAX_KEY_BYTES:
            raise ValueError(f"once: expected 1 to {MAX_KEY_BYTES} characters")
        outcome = _outcome(await self._running().change(check_key(key), operation, once), key)
        if outcome.status == "reused":
            raise KeyReused(f"{once!r} was used for another change")
        return outcome

    # --- functions ----------------------------------------------------------------------------

    def memoize(
        self,
        *,
        ttl: float | None = None,
        prefix: str | None = None,
        key: Callable[..., str] | None = None,
        type: Any = Any,
    ) -> Callable[[Callable[P, Awaitable[T]]], Memoized[P, T]]:
        """Decorate a coroutine function: its results are kept for `ttl` seconds (None: until
        `f.invalidate(…)`), computed once for all nodes. memoize.py says how keys are made."""
        return memoize(self, ttl=ttl, prefix=prefix, key=key, type=type)

    async def changed(self, key: str, within_s: float) -> None:
        """Wait until the line of `key` changes its state on this node, or `within_s` is over."""
        watcher = self._running().watch(key)
        try:
            async with asyncio.timeout(within_s):
                await watcher
        except TimeoutError:
            pass

    # --- small parts --------------------------------------------------------------------------

    def _running(self) -> Node:
        if self._node is None:
            raise RuntimeError("this node is not running: use it inside `async with`")
        if self._halted:
            raise CacheUnavailable(Unavailable(True, "The data directory failed"), self.url)
        return self._node

    def _value(self, value: Any) -> bytes:
        return encode(value, self._config.max_body_bytes)


_FOLDER = str.maketrans({":": "-", "[": "", "]": ""})


def _argv(flags: Mapping[str, object]) -> list[str]:
    argv: list[str] = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None and value is not False:
            argv.append(f"--{name}={value}")
    return argv


def _ttl(found: Found) -> float | None:
    return max(0.0, found.expires_ms / 1000 - time.time()) if found.expires_ms else None


def _outcome(answer: Changed | Unavailable, key: str) -> Outcome:
    if isinstance(answer, Unavailable):
        raise CacheUnavailable(answer, key)
    return answer.outcome


def _close_after_all(opening: asyncio.Future[Opened]) -> None:
    """Whoever started it has gone meanwhile."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
