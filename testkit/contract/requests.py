"""What a client may send, and must be told about it: 4xx with the reason, never 500."""

from __future__ import annotations

import gzip
import json
from typing import Any, Final

from testkit.cluster import Reply
from testkit.contract.service import Target

ODD_NAME: Final = "no_such_field_x"
DEEP: Final = 100_000


def _error(reply: Reply, status: int) -> dict[str, Any]:
    """The JSON error body; every error has one, with a sentence in `error`."""
    assert reply.status == status, f"expected {status}: {reply}"
    assert "application/json" in reply.headers.get("content-type", ""), reply
    body = reply.json
    assert isinstance(body, dict), reply
    assert isinstance(body.get("error"), str), reply
    assert body["error"], reply
    return body


def _valid(target: Target, **changes: Any) -> dict[str, Any]:
    return {**target.service.post[1], **changes}


async def invalid_json_is_400(target: Target) -> None:
    valid = json.dumps(_valid(target)).encode()
    first = target.service.strings[0].encode()
    for text in (
        *(b"", b"{", b"not json", b"\xff\xfe\x00", b"{'a':1}", b'{"a":1,}'),
        *(valid + b"}", valid[:-1], valid + valid),
        # Wrong in two ways: that it is no JSON comes first, as one who debugs it needs to know.
        *(b'{"%s":1' % ODD_NAME.encode(), b'{"%s":5,' % first),
    ):
        body = _error(await target.post(text), 400)
        assert body["error"] == "Invalid JSON", (text, body)


async def a_body_that_is_no_object_is_400(target: Target) -> None:
    for text in (b"[]", b'"text"', b"1", b"null", b"true"):
        _error(await target.post(text), 400)


async def a_missing_field_is_400_and_named(target: Target) -> None:
    for name in target.service.required:
        body = _valid(target)
        del body[name]
        reply = await target.post(json.dumps(body).encode())
        _error(reply, 400)
        assert name in reply.text, f"the answer does not name {name!r}: {reply}"


async def an_unknown_field_is_400_and_named(target: Target) -> None:
    reply = await target.post(json.dumps(_valid(target, **{ODD_NAME: 1})).encode())
    _error(reply, 400)
    assert ODD_NAME in reply.text, reply


async def an_ill_typed_field_is_400_and_named(target: Target) -> None:
    wrong: tuple[Any, ...] = (12345, None, True, [], {}, ["x"])
    for name in target.service.strings:
        for value in wrong:
            reply = await target.post(json.dumps(_valid(target, **{name: value})).encode())
            _error(reply, 400)
            assert name in reply.text, f"the answer does not name {name!r}: {reply}"


async def a_name_over_256_bytes_is_400(target: Target) -> None:
    for name in target.service.strings[:1]:
        for value in ("x" * 257, "é" * 129):
            reply = await target.post(json.dumps(_valid(target, **{name: value})).encode())
            _error(reply, 400)
            assert name in reply.text, reply


async def json_is_read_whatever_the_content_type(target: Target) -> None:
    body = json.dumps(_valid(target)).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/xml", ""):
        reply = await target.post(body, {"Content-Type": kind})
        assert 200 <= reply.status < 300, f"Content-Type {kind!r}: {reply}"


async def deep_nesting_nan_and_huge_numbers_are_400(target: Target) -> None:
    field = target.service.required[-1].encode()
    for text in (
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP,
        b'{"%s":' % field + b"[" * DEEP + b"]" * DEEP + b"}",
    ):
        _error(await target.post(text), 400)
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1" * 400, b"-" + b"9" * 30, b"0x10", b"01"):
        whole = {name: value for name, value in _valid(target).items() if name.encode() != field}
        text = json.dumps(whole).encode()[:-1]
        text += (b"," if whole else b"") + b'"%s":%s}' % (field, value)
        _error(await target.post(text), 400)


async def odd_text_is_never_a_500(target: Target) -> None:
    field = target.service.strings[0]
    for value in ("\ud800", "\x00", "a\r\nb", "../..", "\u202e", "", " ", "💥" * 10):
        reply = await target.post(json.dumps(_valid(target, **{field: value})).encode())
        assert reply.status < 500, f"{field}={value!r}: {reply}"
    for path in ("/%ff", "/%00", "/..%2f..", "/%", "/status?a=%ff&b=%", "/?" + "a" * 4000):
        reply = await target.request("GET", path)
        assert reply.status < 500, f"{path}: {reply}"


async def duplicate_query_keys_are_400(target: Target) -> None:
    for path in ("/status?a=1&a=2", "/metrics?format=json&format=prometheus"):
        _error(await target.request("GET", path), 400)


async def a_body_over_the_limit_is_413(target: Target) -> None:
    body = json.dumps(_valid(target)).encode()[:-1]
    body += b" " * (target.service.max_body_bytes + 1 - len(body)) + b"}"
    _error(await target.post(body), 413)
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    headers = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    async with target.client() as client:
        path = target.service.post[0]
        lines = {**target.service.headers, "Host": "127.0.0.1", **headers}
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        outcome = await client.raw(head.encode() + b"\r\n" + chunked, timeout_s=20.0)
    assert isinstance(outcome, Reply), outcome
    _error(outcome, 413)


async def a_packed_body_is_bounded_by_what_it_unpacks_to(target: Target) -> None:
    bomb = gzip.compress(b" " * (16 * target.service.max_body_bytes))
    reply = await target.post(bomb, {"Content-Encoding": "gzip"})
    assert reply.status in (400, 413, 415), reply
    reply = await target.post(b"no gzip at all", {"Content-Encoding": "gzip"})
    assert reply.status in (400, 415), reply


async def old_and_hasty_clients_are_served(target: Target) -> None:
    """HTTP/1.0 without keep-alive, two requests in one packet, Expect: 100-continue."""
    own = {"Host": "127.0.0.1", **target.service.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    async with target.client() as client:
        old = await client.raw(f"GET /status HTTP/1.0\r\n{head}\r\n".encode())
        assert isinstance(old, Reply), old
        assert old.status == 200, old
        one = f"GET /healthz HTTP/1.1\r\n{head}\r\n"
        both = await client.raw((one + one).encode())
        assert isinstance(both, Reply), both
        assert both.status == 200, both
    reply = await target.request("GET", "/status", headers={"Expect": "the-unexpected"})
    assert reply.status in (200, 417), reply


async def an_unknown_path_is_404(target: Target) -> None:
    for method in ("GET", "POST", "DELETE"):
        _error(await target.request(method, "/no/such/path", body=b"{}"), 404)


async def a_wrong_verb_is_405_with_allow(target: Target) -> None:
    reply = await target.request("DELETE", target.service.post[0])
    _error(reply, 405)
    assert "POST" in reply.headers.get("allow", ""), reply
    reply = await target.request("POST", "/status", body=b"{}")
    _error(reply, 405)
    assert "GET" in reply.headers.get("allow", ""), reply


async def a_foreign_origin_may_not_change_anything(target: Target) -> None:
    body = json.dumps(_valid(target)).encode()
    port = target.origin.rpartition(":")[2]
    for origin in (
        "http://evil.example",
        "null",
        f"http://evil.example:{port}",
        "http://127.0.0.1:1",
    ):
        _error(await target.post(body, {"Origin": origin}), 403)
        # The Host header is no evidence: DNS rebinding makes it whatever the attacker likes.
        host = origin.removeprefix("http://")
        reply = await target.post(body, {"Origin": origin, "Host": host, "X-Forwarded-Host": host})
        _error(reply, 403)
    while True:
        writer = target.writer
        own = await target.post(body, {"Origin": target.origin})
        if target.writer == writer:
            break  # else it was asked elsewhere, where the former writer's origin is a foreign one
    assert 200 <= own.status < 300, own


async def what_needs_authorization_says_401_without(target: Target) -> None:
    if not target.service.headers:
        return
    path, body = target.service.post
    payload = json.dumps(body).encode()
    for method, where, data in (
        ("POST", path, payload),
        ("GET", target.service.get, None),
        ("GET", "/metrics", None),
        ("GET", "/status", None),
        ("GET", "/openapi.json", None),
        ("GET", "/events", None),
    ):
        reply = await target.request(method, where, body=data, authorized=False)
        _error(reply, 401)
        assert "bearer" in reply.headers.get("www-authenticate", "").lower(), reply
    for where in target.service.public:
        reply = await target.request("GET", where, authorized=False)
        assert reply.status == 200, reply


RAW: Final = (
    b"\r\n\r\n",
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nNo colon here\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nBad\x00Name: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
)


async def malformed_http_does_not_kill_the_node(target: Target) -> None:
    for data in RAW:
        async with target.client() as client:
            outcome = await client.raw(data, timeout_s=0.5)
        if isinstance(outcome, Reply):
            assert outcome.status < 500 or outcome.status in (501, 505), (data[:60], outcome)
            if outcome.status >= 400 and outcome.body:
                kind = outcome.headers.get("content-type", "")
                assert "json" in kind, f"an error that is no JSON for {data[:60]!r}: {outcome}"
        assert target.cluster.nodes[target.writer].running, f"the node died of {data[:60]!r}"
    alive = await target.request("GET", "/healthz")
    assert alive.status == 200, alive


CHECKS: Final = (
    invalid_json_is_400,
    a_body_that_is_no_object_is_400,
    a_missing_field_is_400_and_named,
    an_unknown_field_is_400_and_named,
    an_ill_typed_field_is_400_and_named,
    a_name_over_256_bytes_is_400,
    json_is_read_whatever_the_content_type,
    deep_nesting_nan_and_huge_numbers_are_400,
    odd_text_is_never_a_500,
    duplicate_query_keys_are_400,
    a_body_over_the_limit_is_413,
    a_packed_body_is_bounded_by_what_it_unpacks_to,
    old_and_hasty_clients_are_served,
    an_unknown_path_is_404,
    a_wrong_verb_is_405_with_allow,
    a_foreign_origin_may_not_change_anything,
    what_needs_authorization_says_401_without,
    malformed_http_does_not_kill_the_node,
)
