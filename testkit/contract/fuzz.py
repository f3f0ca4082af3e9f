"""Requests drawn from the service's own /openapi.json, then spoilt: never a 5xx, always JSON.

`FUZZ` (requests, default 150) and `FUZZ_SEED` (default 0) choose size and luck; a failure prints
the request that did it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from random import Random
from typing import Any, Final
from urllib.parse import quote

from testkit.cluster import NoReply
from testkit.contract.service import Target

ODD: Final[tuple[Any, ...]] = (
    *(None, True, 0, -1, 1.5, 1 << 53, 1 << 62, -(1 << 63), 1e308, "", "x" * 300, "\x00", "\ud800"),
    *("é" * 200, [], {}, [[]], {"a": {"a": {}}}, ["x"] * 2000, "../..", "<script>", "%00", "1"),
)
_STREAMS: Final = re.compile("event|watch|stream|peer|link")


class _Drawer:
    """Random values after a schema; `spoil` is the chance that a value is something else."""

    def __init__(self, rng: Random, document: dict[str, Any], spoil: float) -> None:
        self._rng = rng
        self._document = document
        self._spoil = spoil

    def draw(self, schema: dict[str, Any], depth: int = 0) -> Any:
        rng = self._rng
        if rng.random() < self._spoil or depth > 6:
            return rng.choice(ODD)
        if "$ref" in schema:
            return self.draw(self._resolve(schema["$ref"]), depth)
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return self.draw(rng.choice(schema[union]), depth + 1)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        kinds: dict[str, Callable[[], Any]] = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: [
                self.draw(schema.get("items") or {}, depth + 1) for _ in range(rng.randint(0, 3))
            ],
            "string": lambda: rng.choice(("a", "b", "contract", "kunci", "x" * 64)),
            "integer": lambda: max(schema.get("minimum", 0), rng.choice((0, 1, 2, 10))),
            "number": lambda: rng.choice((0, 1, 2.5)),
            "boolean": lambda: rng.random() < 0.5,
            "null": lambda: None,
        }
        kind = schema.get("type")
        kind = rng.choice(kind) if isinstance(kind, list) else kind
        return kinds.get(str(kind), lambda: rng.choice(ODD))()

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        rng, required = self._rng, schema.get("required", ())
        drawn = {
            name: self.draw(inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if rng.random() < (0.97 if name in required else 0.4)
        }
        if rng.random() < self._spoil / 2:
            drawn[rng.choice(("", "no_such_field", "\x00", "__proto__"))] = 1
        return drawn

    def _resolve(self, reference: str) -> dict[str, Any]:
        at: Any = self._document
        for part in reference.removeprefix("#/").split("/"):
            at = at[part.replace("~1", "/").replace("~0", "~")]
        assert isinstance(at, dict), reference
        return at


async def fuzzed_requests_never_break_a_node(target: Target) -> None:
    reply = await target.request("GET", "/openapi.json")
    document = reply.json
    rng = Random(os.environ.get("FUZZ_SEED", "0"))
    calls = [
        (path, verb.upper(), operation)
        for path, verbs in sorted(document["paths"].items())
        for verb, operation in sorted(verbs.items())
        if path not in target.service.skip
        and not path.startswith("/admin")
        and not _STREAMS.search(path)
    ]
    for _ in range(int(os.environ.get("FUZZ", "150"))):
        path, verb, operation = rng.choice(calls)
        drawer = _Drawer(rng, document, spoil=rng.choice((0.0, 0.1, 0.4)))
        where, body = _request(rng, drawer, path, operation)
        await _send(target, verb, where, body)
    for node in target.cluster.nodes:
        assert node.running, f"{node.name} died"
    await target.find_writer()


def _request(
    rng: Random, drawer: _Drawer, path: str, operation: dict[str, Any]
) -> tuple[str, bytes | None]:
    query = []
    for parameter in operation.get("parameters", ()):
        value = drawer.draw(parameter.get("schema") or {})
        # Long waits would only slow the fuzzing down.
        value = 0 if parameter["name"] == "wait_ms" else value
        text = value if isinstance(value, str) else json.dumps(value)
        text = quote(text.encode("utf-8", "surrogatepass"), safe="")
        if parameter["in"] == "path":
            path = path.replace("{" + parameter["name"] + "}", text or "x")
        elif parameter.get("required") or rng.random() < 0.5:
            query.append(f"{parameter['name']}={text}")
    path = re.sub(r"\{\w+\}", "x", path) + ("?" + "&".join(query) if query else "")
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        return path, None
    drawn = drawer.draw(next(iter(content.values())).get("schema") or {})
    if isinstance(drawn, dict) and "wait_ms" in drawn:
        drawn["wait_ms"] = 0
    return path, json.dumps(drawn).encode()


async def _send(target: Target, verb: str, path: str, body: bytes | None) -> None:
    async with target.client() as client:
        outcome = await client.request(verb, path, body=body, timeout_s=20.0)
    shown = f"{verb} {path[:300]} {(body or b'')[:300]!r}: {outcome}"
    assert not isinstance(outcome, NoReply), shown
    assert outcome.status < 500 or outcome.status in (503, 507), shown
    if outcome.body and outcome.status >= 400:
        assert isinstance(outcome.json.get("error"), str), shown


CHECKS: Final = (fuzzed_requests_never_break_a_node,)
