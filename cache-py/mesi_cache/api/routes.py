"""The HTTP table: ten-line handlers that decode, ask the service, encode."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import msgspec
from aiohttp import web

from mesi_cache.api import schemas
from mesi_cache.api.answers import answer_of, one_of_many, unavailable
from mesi_cache.api.errors import ApiError, json_response
from mesi_cache.api.keys import EVENTS, REQUEST_ID, SERVICE
from mesi_cache.api.openapi import Route, document
from mesi_cache.api.schemas import (
    IDEMPOTENCY_KEY,
    check_key,
    compact,
    idempotency_key,
    read_json,
    read_query,
)
from mesi_cache.core.records import Write
from mesi_cache.core.step import Unavailable

_read_many = msgspec.json.Decoder(schemas.ReadMany)
_write_many = msgspec.json.Decoder(schemas.WriteMany)
_PAGE = files("mesi_cache.dashboard").joinpath("index.html").read_bytes()


# --- reads --------------------------------------------------------------------------------------


async def read(request: web.Request) -> web.Response:
    key = check_key(read_query(request, schemas.KeyQuery).key)
    service = request.app[SERVICE]
    return json_response(answer_of(key, None, service.lookup(key) or await service.read(key)))


async def mread(request: web.Request) -> web.Response:
    keys = [
        check_key(key, f"keys[{i}]")
        for i, key in enumerate((await read_json(request, _read_many)).keys)
    ]
    answers = await request.app[SERVICE].read_many(keys)
    results = [one_of_many(key, None, answer) for key, answer in zip(keys, answers, strict=True)]
    return json_response({"results": results})


# --- changes ------------------------------------------------------------------------------------


async def write(request: web.Request) -> web.Response:
    return await _change(request, schemas.decode_write)


async def cas(request: web.Request) -> web.Response:
    return await _change(request, schemas.decode_cas)


async def delete(request: web.Request) -> web.Response:
    return await _change(request, schemas.decode_delete)


async def incr(request: web.Request) -> web.Response:
    return await _change(request, schemas.decode_incr)


async def _change(request: web.Request, decode: Callable[[bytes], schemas.Asked]) -> web.Response:
    key, operation = decode(await request.read())
    name = idempotency_key(request) if IDEMPOTENCY_KEY in request.headers else None
    answer = await request.app[SERVICE].change(key, operation, name)
    return json_response(answer_of(key, operation, answer))


async def mwrite(request: web.Request) -> web.Response:
    if IDEMPOTENCY_KEY in request.headers:  # ignoring it would break the promise it asks for
        raise ApiError(400, "Idempotency-Key is for single changes", field=IDEMPOTENCY_KEY)
    items = (await read_json(request, _write_many)).items
    changes = [
        (check_key(item.key, f"items[{i}].key"),
         Write(compact(item.value, f"items[{i}].value"), item.ttl_ms or 0))
        for i, item in enumerate(items)
    ]  # fmt: skip
    answers = await request.app[SERVICE].change_many(changes)
    results = [
        one_of_many(key, operation, answer)
        for (key, operation), answer in zip(changes, answers, strict=True)
    ]
    return json_response({"results": results})


# --- looking inside -----------------------------------------------------------------------------


async def lines(request: web.Request) -> web.Response:
    return json_response({"lines": request.app[SERVICE].lines()})


async def directory(request: web.Request) -> web.Response:
    key = check_key(read_query(request, schemas.KeyQuery).key)
    entry = await request.app[SERVICE].directory(key)
    if isinstance(entry, Unavailable):
        raise unavailable(entry, key)
    return json_response(entry)


async def metrics(request: web.Request) -> web.Response:
    asked = read_query(request, schemas.MetricsQuery).format
    accept = request.headers.get("Accept", "")
    if asked == "prometheus" or (
        asked is None and ("text/plain" in accept or "openmetrics" in accept)
    ):
        return web.Response(
            body=request.app[SERVICE].metrics_prometheus(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )
    return json_response(request.app[SERVICE].metrics_json())


# --- what every service has ---------------------------------------------------------------------


async def status(request: web.Request) -> web.Response:
    return json_response(request.app[SERVICE].status())


async def healthz(request: web.Request) -> web.Response:
    return json_response({"status": "alive"})


async def readyz(request: web.Request) -> web.Response:
    reason = request.app[SERVICE].not_ready_because()
    if reason is None:
        return json_response({"status": "ready"})
    return json_response({"error": "Not ready", "reason": reason}, 503, {"Retry-After": "1"})


async def events(request: web.Request) -> web.StreamResponse:
    return await request.app[EVENTS].stream(request, {"X-Request-Id": request[REQUEST_ID]})


async def openapi(request: web.Request) -> web.Response:
    return web.Response(body=_DOCUMENT, content_type="application/json")


async def dashboard(request: web.Request) -> web.Response:
    return web.Response(
        body=_PAGE,
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; "
                 "script-src 'unsafe-inline'; frame-ancestors 'none'"},
    )  # fmt: skip


_FAILS = {400: "Bad input", 503: "Unavailable; `definite` says whether anything happened"}
_NAMED = {422: "Idempotency-Key was used for another request"}

ROUTES = (
    Route("GET", "/read", read, "Read a key", query=schemas.KeyQuery,
          answers={200: "The value", 404: "Key not found", **_FAILS}),
    Route("POST", "/write", write, "Write a key", body=schemas.Write,
          answers={200: "Written", **_NAMED, **_FAILS}, headers=(schemas.NAME,)),
    Route("POST", "/cas", cas, "Write if the version matches", body=schemas.Cas,
          answers={200: "Written", 409: "Version mismatch", **_NAMED, **_FAILS},
          headers=(schemas.NAME,)),
    Route("POST", "/delete", delete, "Delete a key", body=schemas.Delete,
          answers={200: "Absent now", **_NAMED, **_FAILS}, headers=(schemas.NAME,)),
    Route("POST", "/incr", incr, "Add to an integer", body=schemas.Incr,
          answers={200: "The new value", 409: "Not an integer", **_NAMED, **_FAILS},
          headers=(schemas.NAME,)),
    Route("POST", "/mread", mread, "Read many keys", body=schemas.ReadMany,
          answers={200: "A result for each", **_FAILS}),
    Route("POST", "/mwrite", mwrite, "Write many keys", body=schemas.WriteMany,
          answers={200: "A result for each", **_FAILS}),
    Route("GET", "/lines", lines, "The lines that hold a slot, least recently used first"),
    Route("GET", "/directory", directory, "The home's entry of a key", query=schemas.KeyQuery,
          answers={200: "Home, owner, sharers, version", **_FAILS}),
    Route("GET", "/status", status, "State of this node"),
    Route("GET", "/healthz", healthz, "The process is alive"),
    Route("GET", "/readyz", readyz, "The node can serve",
          answers={200: "Ready", 503: "Not yet, with the reason"}),
    Route("GET", "/metrics", metrics, "Counters, as JSON or for Prometheus",
          query=schemas.MetricsQuery),
    Route("GET", "/events", events, "Server-sent events", media_type="text/event-stream"),
    Route("GET", "/openapi.json", openapi, "This document"),
    Route("GET", "/", dashboard, "Dashboard", media_type="text/html"),
)  # fmt: skip

_DOCUMENT = document(ROUTES, "Coherent cache")
