"""How the client trusts, tries again and keeps its token to itself; the node is played."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from secure_store import client as library
from secure_store.client import (
    Conflict,
    Forbidden,
    NotFound,
    Refused,
    SecureClient,
    Unauthenticated,
    Unavailable,
    Untrusted,
)
from secure_store.transport.tls import make_certificate
from secure_store.trust import Trust, TrustError

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Played:
    """A node that answers what the test says; keeps the requests it saw."""

    def __init__(self, folder: Path, name: str) -> None:
        self.cert = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        if not self.cert.exists():
            make_certificate(self.cert, self._key, ())
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.answers: list[web.Response | Exception] = []

    async def __aenter__(self) -> Played:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            self.seen.append((request.method, request.path_qs, dict(request.headers)))
            found = self.answers.pop(0)
            if isinstance(found, Exception):
                assert request.transport is not None
                request.transport.abort()
            return found if isinstance(found, web.Response) else web.Response()

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self._key)
        self._runner = web.ServerRunner(web.Server(answer))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.url = f"https://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def trust(self) -> Trust:
        return Trust(cert=[self.cert])


def json(status: int, body: str = "{}", **headers: str) -> web.Response:
    return web.Response(
        status=status, text=body, content_type="application/json",
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )  # fmt: skip


SET = '{"status":"ok","key":"k","value":1}'


async def test_a_write_is_repeated_under_one_idempotency_key_until_its_outcome_is_known(
    tmp_path: Path,
) -> None:
    async with Played(tmp_path, "a") as node:
        node.answers = [
            ConnectionResetError(),
            json(503, '{"error":"x","definite":false}'),
            json(200, SET, ETag='"7"', X_Replication="degraded"),
        ]
        async with SecureClient([node.url], "t", trust=node.trust) as client:
            written = await client.set("k", 1)
        assert (written.version, written.degraded) == (7, True)
        keys = {headers["Idempotency-Key"] for _, _, headers in node.seen}
        assert (len(node.seen), len(keys)) == (3, 1)


async def test_a_token_is_not_made_twice(tmp_path: Path) -> None:
    async with Played(tmp_path, "a") as node:
        async with SecureClient([node.url], "t", trust=node.trust) as client:
            node.answers = [ConnectionResetError()]
            with pytest.raises(Unavailable) as unknown:
                await client.create_token(["user"])
            assert not unknown.value.definite
            node.answers = [json(503, '{"error":"x","definite":true}'),
                            json(200, '{"token":"s3cret","accessor":"a"}')]  # fmt: skip
            made = await client.create_token(["user"])
        assert made.token == "s3cret"
        assert "s3cret" not in repr(made)


async def test_it_follows_the_primary_and_stays_there(tmp_path: Path) -> None:
    async with Played(tmp_path, "a") as one, Played(tmp_path, "a") as two:
        one.answers = [json(421, f'{{"error":"Not the primary","primary":"{two.url}"}}')]
        two.answers = [json(200, SET), json(200, SET)]
        async with SecureClient([one.url], "t", trust=one.trust) as client:
            await client.set("k", 1)
            await client.set("k", 1)
            assert client.primary == two.url
        assert (len(one.seen), len(two.seen)) == (1, 2)


async def test_where_it_is_sent_it_sends_no_token_before_it_trusts(tmp_path: Path) -> None:
    async with Played(tmp_path, "a") as one, Played(tmp_path, "foreign") as thief:
        for where in (thief.url, "http://127.0.0.1:1", "nonsense"):
            one.answers = [
                json(421, f'{{"error":"Not the primary","primary":"{where}"}}'), json(200, SET),
            ]  # fmt: skip
            async with SecureClient([one.url], "t", trust=one.trust) as client:
                if where == thief.url:
                    with pytest.raises(Untrusted):
                        await client.set("k", 1)
                else:
                    await client.set("k", 1)
        assert thief.seen == []


async def test_it_waits_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    async with Played(tmp_path, "a") as node:
        loop = asyncio.get_running_loop()
        for status in (429, 503):
            node.answers = [json(status, Retry_After="1"), json(200, '{"key":"k","value":1}')]
            async with SecureClient([node.url], "t", trust=node.trust) as client:
                began = loop.time()
                await client.get("k")
                assert loop.time() - began >= 1.0
        node.answers = [json(503, '{"error":"strict"}', Retry_After="60")]
        async with SecureClient([node.url], "t", trust=node.trust, persist_s=1) as client:
            with pytest.raises(Unavailable, match="strict") as late:
                await client.set("k", 1)
            assert late.value.definite


async def test_refusals_are_typed_and_are_not_repeated(tmp_path: Path) -> None:
    kinds = {401: Unauthenticated, 403: Forbidden, 404: NotFound, 409: Conflict, 422: Refused,
             400: Refused, 413: Refused, 507: Refused}  # fmt: skip
    async with Played(tmp_path, "a") as node:
        async with SecureClient([node.url], "t", trust=node.trust) as client:
            for status, kind in kinds.items():
                node.answers = [json(status, '{"error":"why","current_version":3}')]
                with pytest.raises(kind, match="why") as refused:
                    await client.set("k", 1)
                assert refused.value.status == status
                if isinstance(refused.value, Conflict):
                    assert refused.value.current_version == 3
        assert len(node.seen) == len(kinds)


async def test_the_token_stands_in_no_log_error_or_repr(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with Played(tmp_path, "a") as node:
        node.answers = [json(401, '{"error":"no"}'), ConnectionResetError()]
        async with SecureClient([node.url], "s3cret", trust=node.trust, persist_s=0.2) as client:
            said = repr(client)
            for call in (client.get("k"), client.create_token(["user"])):
                with pytest.raises(library.SecureError) as error:
                    await call
                said += repr(error.value) + str(error.value)
        assert "s3cret" not in said + caplog.text
        assert all("s3cret" not in path for _, path, _ in node.seen)


async def test_trust_by_certificate_by_hash_and_by_authority(tmp_path: Path) -> None:
    async with Played(tmp_path, "a") as node, Played(tmp_path, "b") as other:
        der = ssl.PEM_cert_to_DER_cert(node.cert.read_text())
        pin = hashlib.sha256(der).hexdigest()
        colons = ":".join(pin[i : i + 2] for i in range(0, 64, 2)).upper()
        for trust in (Trust(cert=[other.cert, node.cert]), Trust(pin=[pin]), Trust(pin=[colons]),
                      Trust(pin=["sha256:" + pin]), Trust(ca=node.cert)):  # fmt: skip
            node.answers = [json(200, '{"key":"k","value":1}')]
            async with SecureClient([node.url], "t", trust=trust) as client:
                assert (await client.get("k")).value == 1
        for trust in (Trust(cert=[other.cert]), Trust(pin=["00" * 32]), Trust(ca=other.cert),
                      Trust()):  # fmt: skip
            async with SecureClient([node.url], "t", trust=trust) as client:
                with pytest.raises(Untrusted):
                    await client.get("k")
        (tmp_path / "not.pem").write_text("nonsense")
        for bad in ({"cert": [tmp_path / "not.pem"]}, {"cert": [tmp_path / "none"]},
                    {"pin": ["12"]}, {"ca": tmp_path / "not.pem"},
                    {"ca": node.cert, "pin": [pin]}):  # fmt: skip
            with pytest.raises(TrustError):
                Trust(**bad)


async def test_a_new_connection_takes_up_the_last_tls_session(tmp_path: Path) -> None:
    async with Played(tmp_path, "a") as node:
        async with SecureClient([node.url], "t", trust=node.trust) as client:
            reused = []
            for _ in range(3):
                node.answers = [json(200, '{"key":"k","value":1}', Connection="close")]
                await client.get("k")
                reused.append(client.context(node.url).session_reused)
        assert reused == [False, True, True]


def test_a_bad_url_or_token_is_told_of_at_once(tmp_path: Path) -> None:
    for urls, token in (([], "t"), (["http://a:1"], "t"), (["https://a:1/path"], "t"),
                        (["https://a:1"], ""), (["https://a:1"], "two\nlines")):  # fmt: skip
        with pytest.raises(ValueError, match=r"URL|https|token"):
            SecureClient(urls, token, trust=Trust())
