"""`@cache.memoize(ttl=…)`: a coroutine function computed once for all nodes, until somebody says
otherwise.

Who finds nothing under a call's key first *claims* it: a compare-and-set writes a marker with a
token of its own, so one process in the cluster computes, the rest wait for the marker to change.
The result replaces the marker by another compare-and-set. An invalidation meanwhile has removed the
marker, so that set fails and the result, computed before it, is not kept (the leases of "Scaling
Memcache at Facebook", NSDI 2013, made exact). Callers who joined before the invalidation get that
result; who comes after it finds no marker, and a new computation begins. A marker lives CLAIM_S and
is renewed while the function runs, so the death of a node costs its waiters that long.

The key: `prefix:arguments`. The prefix is the function's module and qualified name (`prefix=` if it
is to outlive a renaming, or is `__main__`), the arguments are the JSON of their values in the order
of the signature, defaults filled in, so `f(1)`, `f(a=1)` and `f(1, b=default)` are one call while
1, 1.0, "1" and true are four. Beyond 200 bytes, a 128-bit BLAKE2 hash stands for them. `key=`
computes the text after the prefix instead; arguments that JSON cannot carry need it.

Results are kept as JSON: the caller always gets the copy that went through it (`type=` says what to
make of it, in msgspec's words; what does not fit it is computed anew). None is a result like any
other. An exception is not kept: it goes to those who waited for that computation in this process.
While the key's home is away, the function is called for each caller and nothing is kept.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from hashlib import blake2b
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType

from mesi_cache.calls import CacheUnavailable, milliseconds
from mesi_cache.core.records import Cas, Operation, Outcome
from mesi_cache.core.step import Found

CLAIM_S = 5.0
CHECK_S = 0.05  # how long a waiter relies on being told
MAX_ARGUMENTS_BYTES = 200
MAX_PREFIX_BYTES = 55

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_encode = msgspec.json.Encoder().encode


class Cache(Protocol):
    """What this needs of CacheNode."""

    async def read(self, key: str) -> Found | None:
        """The value as JSON text with its version; raises CacheUnavailable."""

    async def change(self, key: str, operation: Operation) -> Outcome:
        """Do `operation`; raises CacheUnavailable."""

    async def delete(self, key: str) -> bool:
        """Forget `key`; False if there was nothing."""

    async def changed(self, key: str, within_s: float) -> None:
        """Wait until the line of `key` changes here, or `within_s` is over."""


class Memoized(Protocol[P, T_co]):
    """The function as the decorator leaves it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T_co]:
        """The kept result of this call, or a new one."""

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Under which key this call's result is kept."""

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, bool]:
        """Forget this call's result on all nodes, before this returns; also one that is being
        computed. False if there was none."""


class _Kept(msgspec.Struct, Generic[T], omit_defaults=True):
    """What stands under a call's key: a result, or the token of who computes it ("": nobody)."""

    value: T | UnsetType = UNSET
    pending: str | UnsetType = UNSET


def memoize(
    cache: Cache,
    *,
    ttl: float | None,
    prefix: str | None,
    key: Callable[..., str] | None,
    type: Any,
) -> Callable[[Callable[P, Awaitable[T]]], Memoized[P, T]]:
    """The decorator that `CacheNode.memoize` gives; see the top of this file."""
    ttl_ms = milliseconds(ttl)

    def decorate(function: Callable[P, Awaitable[T]]) -> Memoized[P, T]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"memoize: {function!r} is no coroutine function")
        name = prefix or f"{function.__module__}.{function.__qualname__}"
        key_of = _Keys(name, inspect.signature(function), key)
        calls: _Calls[T] = _Calls(cache, ttl_ms, type)

        @functools.wraps(function)
        async def memoized(*args: P.args, **kwargs: P.kwargs) -> T:
            return await calls.result(
                key_of(*args, **kwargs), functools.partial(function, *args, **kwargs)
            )

        async def invalidate(*args: P.args, **kwargs: P.kwargs) -> bool:
            return await cache.delete(key_of(*args, **kwargs))

        memoized.key = key_of  # type: ignore[attr-defined]  # a function with two more names
        memoized.invalidate = invalidate  # type: ignore[attr-defined]  # the other
        return cast("Memoized[P, T]", memoized)

    return decorate


class _Keys:
    """From a call's arguments to its key."""

    def __init__(
        self, name: str, signature: inspect.Signature, given: Callable[..., str] | None
    ) -> None:
        self._name = name if len(name.encode()) <= MAX_PREFIX_BYTES else "#" + _hash(name.encode())
        self._signature = signature
        self._given = given
        kinds = [each.kind for each in signature.parameters.values()]
        plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._plain = len(kinds) if all(kind is plain for kind in kinds) else -1

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._given is not None:
            text = self._given(*args, **kwargs).encode()
        elif not kwargs and len(args) == self._plain:
            text = self._arguments(args)
        else:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            named = dict(sorted(bound.kwargs.items()))
            text = self._arguments((*bound.args, named) if named else bound.args)
        if len(text) > MAX_ARGUMENTS_BYTES or b"\x00" in text:
            return f"{self._name}:#{_hash(text)}"
        return f"{self._name}:{text.decode()}"

    def _arguments(self, values: tuple[Any, ...]) -> bytes:
        try:
            return _encode(values)
        except (TypeError, msgspec.MsgspecError) as e:
            raise TypeError(f"memoize: {self._name}: {e}; give `key=`") from None


class _Calls(Generic[T]):
    """The calls of one function. Invariant: a flight's token stood under its key, in this process's
    name, when the function was called, so whoever reads that token may have its result."""

    def __init__(self, cache: Cache, ttl_ms: int, kind: Any) -> None:
        self._cache = cache
        self._ttl_ms = ttl_ms
        self._decoder = msgspec.json.Decoder(_Kept[kind])
        self._flights: dict[str, asyncio.Task[T]] = {}
        self._claims: dict[str, asyncio.Task[asyncio.Task[T] | None]] = {}

    async def result(self, key: str, compute: Callable[[], Awaitable[T]]) -> T:
        """What is kept under `key`, or what `compute` gives."""
        try:
            while True:
                kept, version = self._look(await self._cache.read(key))
                if not isinstance(kept.value, UnsetType):
                    return kept.value
                flight = self._flights.get(kept.pending) if kept.pending else None
                if kept.pending and flight is None:
                    await self._cache.changed(key, CHECK_S)  # another process computes
                    continue
                if flight is None:
                    claim = self._claims.get(key)
                    if claim is not None:
                        # Somebody here is claiming it. What that leads to may be over when we
                        # hear of it, so look again rather than take it.
                        await asyncio.wait((claim,))
                        continue
                    flight = await asyncio.shield(self._claiming(key, version, compute))
                if flight is not None:
                    break
        except CacheUnavailable:
            return self._through(await compute())[1]
        # A caller that leaves does not take the others' result with it.
        return await asyncio.shield(flight)

    def _look(self, found: Found | None) -> tuple[_Kept[T], int]:
        if found is None:
            return _Kept(pending=""), 0
        try:
            return self._decoder.decode(found.value), found.version
        except msgspec.MsgspecError:  # of an older version of the program
            return _Kept(pending=""), found.version

    def _claiming(
        self, key: str, version: int, compute: Callable[[], Awaitable[T]]
    ) -> asyncio.Task[asyncio.Task[T] | None]:
        claim = asyncio.ensure_future(self._claim(key, version, compute))
        self._claims[key] = claim
        claim.add_done_callback(lambda _: self._claims.pop(key, None))
        claim.add_done_callback(_retrieve)
        return claim

    async def _claim(
        self, key: str, version: int, compute: Callable[[], Awaitable[T]]
    ) -> asyncio.Task[T] | None:
        """Begin to compute, if nobody else has. The function is called only once the claim stands:
        what it reads is then at least as new as the last invalidation."""
        token = secrets.token_hex(8)
        version = await self._replace(key, version, _marker(token), CLAIM_S)
        if not version:
            return None
        flight = asyncio.ensure_future(self._compute(key, token, version, compute))
        self._flights[token] = flight
        flight.add_done_callback(lambda _: self._flights.pop(token, None))
        flight.add_done_callback(_retrieve)
        return flight

    async def _compute(
        self, key: str, token: str, version: int, compute: Callable[[], Awaitable[T]]
    ) -> T:
        work = asyncio.ensure_future(compute())
        try:
            while not (await asyncio.wait((work,), timeout=CLAIM_S / 3))[0]:
                version = await self._keep_trying(key, version, _marker(token), CLAIM_S)
            encoded, result = self._through(work.result())
        except BaseException:
            work.cancel()
            # Nobody computes any more: give the claim back, to be taken by whoever comes next.
            await self._keep_trying(key, version, _marker(""), 0.001)
            raise
        await self._keep_trying(key, version, encoded, self._ttl_ms / 1000)
        return result

    async def _keep_trying(self, key: str, version: int, value: bytes, ttl: float) -> int:
        """As `_replace`, for a claim that may be lost already (version 0), or while the cache does
        not answer: then it is."""
        try:
            return await self._replace(key, version, value, ttl) if version else 0
        except CacheUnavailable:
            return 0

    async def _replace(self, key: str, version: int, value: bytes, ttl: float) -> int:
        """The new version, or 0 if what stands under `key` is no longer what it was."""
        outcome = await self._cache.change(key, Cas(version, value, round(ttl * 1000)))
        return outcome.version if outcome.status == "done" else 0

    def _through(self, result: T) -> tuple[bytes, T]:
        """A result as it is kept, and as every caller gets it."""
        encoded = _encode(_Kept(value=result))
        value = self._decoder.decode(encoded).value
        if isinstance(value, UnsetType):
            raise TypeError("memoize: a result must not be msgspec.UNSET")
        return encoded, value


def _marker(token: str) -> bytes:
    return _encode(_Kept(pending=token))


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=16).hexdigest()


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Whoever wanted to know of its failure has been told."""
    if not task.cancelled():
        task.exception()
