"""The Python client.

    trust = Trust(cert=["server.crt"])
    async with SecureClient(["https://127.0.0.1:8000", "https://127.0.0.1:8001"], token,
                            trust=trust) as store:
        written = await store.set("a/b", {"n": 1}, expected_version=0)
        entry = await store.get("a/b")

It finds the primary and follows it when it changes. Each write carries an Idempotency-Key, so it is
sent again until its outcome is known, and happens once. Reads ask the primary, which never goes
back in time (`read_from="any"`: whichever node answers). Waiting between tries grows with jitter
and is never shorter than a node's Retry-After. The token goes into the Authorization header of
requests to nodes that `trust` has verified, and nowhere else: not into logs, errors or `repr`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from secure_store.outcomes import (
    Answer,
    Broken,
    Change,
    Entry,
    NewToken,
    Unavailable,
    Untrusted,
    Written,
    refusal,
)
from secure_store.outcomes import Conflict as Conflict
from secure_store.outcomes import Forbidden as Forbidden
from secure_store.outcomes import NotFound as NotFound
from secure_store.outcomes import Refused as Refused
from secure_store.outcomes import SecureError as SecureError
from secure_store.outcomes import Unauthenticated as Unauthenticated
from secure_store.trust import NodeContext, Trust

BACKOFF_S = (0.02, 0.5)
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
SILENCE_S = 40.0  # a watch that says nothing for so long, not even a keep-alive, is dead
PAGE = 500
Rows = list[dict[str, Any]]  # (SecureClient has a method of the name `list`)
Versions = list[int]


class SecureClient:
    """One client of the pair at `urls`. `persist_s`: how long a request is tried while no node can
    answer it. Use it by `async with`."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        *,
        trust: Trust,
        persist_s: float = 15.0,
        read_from: Literal["primary", "any"] = "primary",
    ) -> None:
        self._urls = [_checked(url) for url in urls]
        if not self._urls:
            raise ValueError("at least one URL is needed")
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError("the token is empty, or holds characters that no token has")
        self._authorization = f"Bearer {token}"
        self._trust = trust
        self._persist_s = persist_s
        self._read_from = read_from
        self._primary = self._urls[0]
        self._contexts: dict[str, NodeContext] = {}
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"SecureClient({self._urls!r})"

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def primary(self) -> str:
        """Where writes went last."""
        return self._primary

    def context(self, url: str) -> NodeContext:
        """The TLS context of one node."""
        found = self._contexts.get(url)
        if found is None:
            found = self._contexts[url] = self._trust.context()
        return found

    # --- keys ---------------------------------------------------------------------------------

    async def get(self, key: str, *, version: int | None = None) -> Entry:
        """Raises NotFound, Forbidden, Unavailable …"""
        answer = await self._read("/get", {"key": key, "version": version})
        return Entry(answer.body["value"], answer.version or 0)

    async def set(
        self,
        key: str,
        value: Any,
        *,
        expected_version: int | None = None,
        ttl_ms: int | None = None,
    ) -> Written:
        """`expected_version`: what a read gives now, 0 for nothing; raises Conflict if not so."""
        body = _given(key=key, expected_version=expected_version, ttl_ms=ttl_ms)
        return await self._write("/set", {**body, "value": value})

    async def delete(self, key: str, *, expected_version: int | None = None) -> Written:
        """Soft: `undelete` brings it back."""
        return await self._write("/delete", _given(key=key, expected_version=expected_version))

    async def undelete(self, key: str, *, version: int | None = None) -> Written:
        return await self._write("/undelete", _given(key=key, version=version))

    async def destroy(self, key: str, *, version: int | None = None) -> Written:
        """For good: one version's value, or the key with all it was."""
        return await self._write("/destroy", _given(key=key, version=version))

    async def txn(self, ops: Iterable[Mapping[str, Any]]) -> Versions:
        """All or nothing; `ops` as in POST /txn. Gives the version of each operation's key."""
        answer = await self._change("POST", "/txn", {"ops": [dict(op) for op in ops]})
        versions: Versions = answer.body["versions"]
        return versions

    async def list(self, prefix: str = "") -> AsyncIterator[str]:
        """The keys under `prefix` that the token may list, page by page."""
        after: str | None = ""
        while after is not None:
            query = {"prefix": prefix, "after": after, "limit": PAGE}
            page = (await self._read("/list", query)).body
            for key in page["keys"]:
                yield key
            after = page["next"]

    async def history(self, key: str) -> Rows:
        """Every kept version with its times."""
        versions: Rows = (await self._read("/history", {"key": key})).body["versions"]
        return versions

    async def watch(self, prefix: str = "", *, last_id: str = "") -> AsyncIterator[Change]:
        """Changes as they are decided, for as long as the caller listens. A broken stream is taken
        up where it broke, at whichever node answers (`last_id`: where an earlier one ended).

        Raises Unauthenticated when the token is revoked, Unavailable when no node answers."""
        while True:
            response = await self._open_watch(prefix, last_id)
            try:
                async for change in _changes(response):
                    last_id = change.id or last_id
                    yield change
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass  # it broke: the next one goes on from `last_id`
            finally:
                response.close()

    # --- tokens, policies, nodes --------------------------------------------------------------

    async def create_token(
        self,
        roles: Sequence[str],
        *,
        ttl_ms: int | None = None,
        uses: int | None = None,
        name: str = "",
    ) -> NewToken:
        """Not repeated if its outcome is unknown (a token that nobody has seen may exist then)."""
        body = {"roles": list(roles), "name": name, **_given(ttl_ms=ttl_ms, uses=uses)}
        answer = await self._change("POST", "/tokens", body, repeatable=False)
        return msgspec.convert(answer.body, NewToken)

    async def tokens(self) -> Rows:
        rows: Rows = (await self._read("/tokens", {})).body["tokens"]
        return rows

    async def revoke_token(self, accessor: str) -> Written:
        """It and what was made with it. `degraded`: the replica does not know yet."""
        answer = await self._change("DELETE", "/tokens", {"accessor": accessor})
        return Written(None, answer.degraded)

    async def policies(self) -> dict[str, Rows]:
        """Every role's rules."""
        roles: dict[str, Rows] = (await self._read("/policies", {})).body["roles"]
        return roles

    async def policy(self, role: str) -> Rows:
        path = f"/policies/{quote(role, safe='')}"
        rules: Rows = (await self._read(path, {})).body["rules"]
        return rules

    async def put_policy(self, role: str, rules: Sequence[Mapping[str, Any]]) -> Written:
        body = {"rules": [dict(rule) for rule in rules]}
        answer = await self._change("PUT", f"/policies/{quote(role, safe='')}", body)
        return Written(None, answer.degraded)

    async def check_policy(self, role: str, verb: str, key: str) -> dict[str, Any]:
        """Whether `role` may do `verb` on `key`, and the rule that decides."""
        path = f"/policies/{quote(role, safe='')}/check"
        found: dict[str, Any] = (await self._read(path, {"verb": verb, "key": key})).body
        return found

    async def ask(
        self, url: str, method: str, path: str, body: Any = None, *, timeout_s: float = 10.0
    ) -> dict[str, Any]:
        """One request to one node, tried once: `/status`, `/admin/promote`, `/admin/rotate` …"""
        try:
            answer = await self._send(_checked(url), method, path, {}, body, "", timeout_s)
        except Broken as e:
            raise Unavailable(f"{url}: {e}", definite=e.definite) from None
        if answer.status >= 400:
            raise refusal(answer)
        return answer.body

    # --- asking until somebody answers --------------------------------------------------------

    async def _write(self, path: str, body: dict[str, Any]) -> Written:
        answer = await self._change("POST", path, body)
        return Written(answer.version, answer.degraded)

    async def _read(self, path: str, query: Mapping[str, Any]) -> Answer:
        return await self._persist("GET", path, query, None, "", repeatable=True)

    async def _change(
        self, method: str, path: str, body: Any, *, repeatable: bool = True
    ) -> Answer:
        return await self._persist(
            method, path, {}, body, secrets.token_hex(16), repeatable=repeatable
        )

    async def _persist(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Any,
        idempotency_key: str,
        *,
        repeatable: bool,
    ) -> Answer:
        """Send until the outcome is known, for `persist_s` at most."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._persist_s
        is_read = method == "GET"
        url = self._primary
        tries = 0
        definite = True
        while True:
            left_s = deadline - loop.time()
            wait_s = 0.0
            try:
                answer = await self._send(
                    url, method, path, query, body, idempotency_key,
                    max(0.1, min(ANSWER_TIMEOUT_S, left_s)),
                )  # fmt: skip
                if answer.status == 421:
                    url = self._follow(answer, url)
                    why = "Not the primary"
                elif answer.status in (429, 503):
                    why = str(answer.body.get("error", "Unavailable"))
                    definite = definite and (is_read or answer.body.get("definite", True))
                    wait_s = answer.retry_after_s
                elif answer.status < 400:
                    if not is_read or self._read_from == "primary":
                        self._primary = url
                    return answer
                else:
                    raise refusal(answer)
            except Broken as e:
                why = f"{url}: {e}"
                definite = definite and (is_read or e.definite)
                url = self._other(url)
            if not (definite or repeatable):
                raise Unavailable(f"{why}; the outcome is unknown", definite=False)
            tries += 1
            pause_s = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(tries, 10))
            pause_s = max(wait_s, random.uniform(0, pause_s))  # noqa: S311 - jitter
            if loop.time() + pause_s >= deadline:
                raise Unavailable(f"gave up after {self._persist_s:g} s: {why}", definite=definite)
            await asyncio.sleep(pause_s)

    def _follow(self, answer: Answer, url: str) -> str:
        """Where a node that is not the primary sends us (verified like any other), or the next."""
        told = answer.body.get("primary")
        if isinstance(told, str):
            try:
                told = _checked(told)
            except ValueError:
                return self._other(url)
            if told != url:
                if told not in self._urls and len(self._urls) < 8:
                    self._urls.append(told)
                return told if told in self._urls else self._other(url)
        return self._other(url)

    def _other(self, url: str) -> str:
        at = self._urls.index(url) if url in self._urls else -1
        return self._urls[(at + 1) % len(self._urls)]

    async def _send(
        self,
        url: str,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Any,
        idempotency_key: str,
        timeout_s: float,
    ) -> Answer:
        """One try at one node; raises Broken (no answer), Untrusted."""
        headers = {"Authorization": self._authorization}
        if method == "GET" and self._read_from == "primary":
            headers["X-Read-From"] = "primary"  # a replica answers 421, and says where it is
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        data = msgspec.json.encode(body) if body is not None else None
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._opened.request(
                    method, url + path, params=_texts(query), data=data, headers=headers,
                    allow_redirects=False, ssl=self.context(url),
                ) as response,
            ):  # fmt: skip
                return Answer(response, await response.read())
        except aiohttp.ClientConnectorCertificateError as e:
            raise Untrusted(f"{url}: {e.certificate_error}") from None
        except aiohttp.ClientConnectorError as e:
            raise Broken(str(e.os_error), definite=True) from None
        except aiohttp.ConnectionTimeoutError:
            raise Broken("no connection in time", definite=True) from None
        except TimeoutError:
            raise Broken("no answer in time", definite=False) from None
        except (aiohttp.ClientError, OSError) as e:
            raise Broken(str(e) or type(e).__name__, definite=False) from None

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use it by `async with`")
        return self._session

    async def _open_watch(self, prefix: str, last_id: str) -> aiohttp.ClientResponse:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._persist_s
        headers = {"Authorization": self._authorization}
        if last_id:
            headers["Last-Event-ID"] = last_id
        url = self._primary
        for tries in range(1, 1_000_000):
            wait_s = 0.0
            try:
                response = await self._opened.get(
                    url + "/watch", params={"prefix": prefix}, headers=headers,
                    allow_redirects=False, ssl=self.context(url),
                    timeout=aiohttp.ClientTimeout(
                        total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S
                    ),
                )  # fmt: skip
                if response.status == 200:
                    return response
                async with response:
                    answer = Answer(response, await response.read())
                if answer.status not in (421, 429, 503):
                    raise refusal(answer)
                wait_s = answer.retry_after_s
                why = str(answer.body.get("error", answer.status))
            except aiohttp.ClientConnectorCertificateError as e:
                raise Untrusted(f"{url}: {e.certificate_error}") from None
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                why = str(e) or type(e).__name__
            url = self._other(url)
            pause_s = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(tries, 10))
            pause_s = max(wait_s, random.uniform(0, pause_s))  # noqa: S311 - jitter
            if loop.time() + pause_s >= deadline:
                break
            await asyncio.sleep(pause_s)
        raise Unavailable(f"gave up after {self._persist_s:g} s: {why}", definite=True)


async def _changes(response: aiohttp.ClientResponse) -> AsyncIterator[Change]:
    """The events of a stream, until it ends."""
    fields: dict[str, str] = {}
    buffer = b""
    async for chunk in response.content.iter_any():
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            name, _, text = line.decode().partition(":")
            if name:
                fields[name] = text.removeprefix(" ")
            elif line == b"" and fields:
                kind, data = fields.get("event", ""), fields.get("data", "{}")
                if kind not in ("", "end"):
                    yield msgspec.convert(
                        {**msgspec.json.decode(data), "kind": kind, "id": fields.get("id", "")},
                        Change,
                    )
                fields = {}


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _texts(query: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in query.items() if value is not None}


def _checked(url: str) -> str:
    """`https://host:port`; raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.netloc or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"expected https://host:port, got {url!r}")
    return f"https://{parts.netloc}"
