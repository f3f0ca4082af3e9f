"""What every node answers: health, metrics, the API's description, events, the page, headers."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from testkit.cluster import Reply
from testkit.contract.service import Target

_SAMPLE: Final = re.compile(
    r'^[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_]\w*="([^"\\]|\\.)*",?)*\})? '
    r"(-?\d+(\.\d+)?([eE][-+]?\d+)?|NaN|[-+]?Inf)( \d+)?$"
)
_EXTERNAL: Final = re.compile(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", re.IGNORECASE)


async def _json(target: Target, path: str) -> Any:
    reply = await target.request("GET", path)
    assert reply.status == 200, reply
    assert "application/json" in reply.headers.get("content-type", ""), reply
    return reply.json


async def every_node_is_alive_and_ready(target: Target) -> None:
    for index in range(target.service.size):
        for path in ("/healthz", "/readyz"):
            async with target.cluster.client(index) as client:
                reply = await client.get(path)
            assert isinstance(reply, Reply), reply
            assert reply.status == 200, f"node {index} {path}: {reply}"
            assert isinstance(reply.json, dict), reply


async def every_node_has_a_status(target: Target) -> None:
    for index in range(target.service.size):
        async with target.cluster.client(index) as client:
            reply = await client.get("/status")
        assert isinstance(reply, Reply), reply
        assert reply.status == 200, reply
        assert isinstance(reply.json, dict), reply
        assert reply.json, reply


async def metrics_are_json_by_default(target: Target) -> None:
    body = await _json(target, "/metrics")
    assert isinstance(body, dict)
    assert any(isinstance(value, int | float) for value in body.values()), body
    assert await _json(target, "/metrics?format=json")


async def metrics_are_prometheus_text_when_asked(target: Target) -> None:
    ways: tuple[tuple[str, dict[str, str]], ...] = (
        ("/metrics?format=prometheus", {}),
        ("/metrics", {"Accept": "text/plain"}),
        ("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"}),
    )
    for path, headers in ways:
        reply = await target.request("GET", path, headers=headers)
        assert reply.status == 200, reply
        kind = reply.headers.get("content-type", "")
        assert "text/plain" in kind or "openmetrics" in kind, reply
        lines = [line for line in reply.text.splitlines() if line]
        assert any(line.startswith("# TYPE ") for line in lines), reply
        for line in lines:
            assert line.startswith("#") or _SAMPLE.match(line), f"no sample: {line!r}"


async def the_page_is_html_and_needs_nobody_else(target: Target) -> None:
    reply = await target.request("GET", "/")
    assert reply.status == 200, reply
    assert "text/html" in reply.headers.get("content-type", ""), reply
    assert "<html" in reply.text.lower(), "no page"
    assert not _EXTERNAL.search(reply.text), "the page loads something from elsewhere"


async def events_are_a_server_sent_stream(target: Target) -> None:
    async with target.stream("/events") as (status, headers):
        assert status == 200
        assert "text/event-stream" in headers.get("content-type", ""), headers


async def every_documented_path_is_there(target: Target) -> None:
    document = await _json(target, "/openapi.json")
    assert str(document.get("openapi", "")).startswith("3."), document
    assert document["info"]["title"]
    assert document["info"]["version"]
    paths = document["paths"]
    own = target.service.post[0], target.service.get.partition("?")[0]
    for path in (*own, "/status", "/healthz", "/readyz", "/metrics", "/events"):
        assert path in paths or any(_matches(known, path) for known in paths), (
            f"{path} undocumented"
        )
    for path, verbs in paths.items():
        for verb, operation in verbs.items():
            assert operation.get("responses"), f"{verb} {path} documents no answer"
            if path not in target.service.skip and not path.startswith("/admin"):
                await _is_routed(target, verb.upper(), path)


def _matches(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path) is not None


async def _is_routed(target: Target, verb: str, path: str) -> None:
    where = re.sub(r"\{\w+\}", "contract-probe", path)
    if verb == "GET" and ("event" in where or "watch" in where or "stream" in where):
        async with target.stream(where) as (status, _):
            assert status not in (404, 405), f"{verb} {path} is documented and answers {status}"
        return
    # A body that no schema allows, so that nothing changes.
    body = None if verb in ("GET", "HEAD") else b'{"no_such_field_x":1}'
    reply = await target.request(verb, where, body=body)
    routed = reply.status not in (404, 405) or _is_about_a_thing(reply)
    assert routed, f"{verb} {path} is documented and answers {reply}"
    assert reply.status < 500 or reply.status == 503, f"{verb} {path}: {reply}"


def _is_about_a_thing(reply: Reply) -> bool:
    """404 for a key or queue that does not exist is another sentence than for a path."""
    return reply.status == 404 and reply.json.get("error") != "Not found"


async def errors_are_problem_json_when_asked(target: Target) -> None:
    headers = {"Accept": "application/problem+json"}
    for reply, status in (
        (await target.post(b"{", headers), 400),
        (await target.request("GET", "/no/such/path", headers=headers), 404),
        (await target.request("DELETE", target.service.post[0], headers=headers), 405),
    ):
        assert reply.status == status, reply
        assert "application/problem+json" in reply.headers.get("content-type", ""), reply
        problem = reply.json
        assert problem["status"] == status, reply
        assert problem["title"], reply
        assert isinstance(problem.get("type", "about:blank"), str), reply


async def a_request_id_is_echoed_or_made(target: Target) -> None:
    body = json.dumps(dict(target.service.post[1])).encode()
    for method, path, data in (
        ("GET", "/status", None),
        ("POST", target.service.post[0], body),
        ("POST", target.service.post[0], b"{"),
        ("GET", "/no/such/path", None),
    ):
        given = {"X-Request-Id": "contract-check.1"}
        reply = await target.request(method, path, body=data, headers=given)
        assert reply.headers.get("x-request-id") == "contract-check.1", f"{method} {path}: {reply}"
        first = await target.request(method, path, body=data)
        second = await target.request(method, path, body=data)
        made = first.headers.get("x-request-id"), second.headers.get("x-request-id")
        assert all(made), f"{method} {path}: no X-Request-Id"
        assert made[0] != made[1], f"{method} {path}: {made}"
    hostile = await target.request("GET", "/status", headers={"X-Request-Id": "x" * 5000})
    assert len(hostile.headers.get("x-request-id", "")) < 1000, "an id of any length is kept"


async def answers_keep_the_connection_and_hide_the_version(target: Target) -> None:
    async with target.client() as client:
        for _ in range(3):
            reply = await client.get("/status")
            assert isinstance(reply, Reply), reply
            assert reply.headers.get("connection", "keep-alive").lower() != "close", reply
            server = reply.headers.get("server", "")
            assert "Python" not in server, server
            assert "aiohttp" not in server, server


async def the_post_and_the_get_work(target: Target) -> None:
    await target.find_writer()
    reply = await target.request("GET", target.service.get)
    assert 200 <= reply.status < 300, reply


CHECKS: Final = (
    the_post_and_the_get_work,
    every_node_is_alive_and_ready,
    every_node_has_a_status,
    metrics_are_json_by_default,
    metrics_are_prometheus_text_when_asked,
    the_page_is_html_and_needs_nobody_else,
    events_are_a_server_sent_stream,
    every_documented_path_is_there,
    errors_are_problem_json_when_asked,
    a_request_id_is_echoed_or_made,
    answers_keep_the_connection_and_hide_the_version,
)
