"""The HTTP table: ten-line handlers that decode, ask the service, encode."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import TypeVar

import msgspec
from aiohttp import web

from mesi_cache.api import schemas
from mesi_cache.api.errors import ApiError, json_response
from mesi_cache.api.keys import EVENTS, REQUEST_ID, SERVICE, Service
from mesi_cache.api.openapi import Route, document
from mesi_cache.api.schemas import (
    IDEMPOTENCY_KEY,
    check_key,
    compact,
    idempotency_key,
    read_json,
    read_query,
)
from mesi_cache.core.records import Cas, Delete, Incr, Operation, Outcome, Write
from mesi_cache.core.step import Changed, Found, Missing, Unavailable

_write = msgspec.json.Decoder(schemas.Write)
_cas = msgspec.json.Decoder(schemas.Cas)
_delete = msgspec.json.Decoder(schemas.Delete)
_incr = msgspec.json.Decoder(schemas.Incr)
_read_many = msgspec.json.Decoder(schemas.ReadMany)
_write_many = msgspec.json.Decoder(schemas.WriteMany)
T = TypeVar("T")
_PAGE = files("mesi_cache.dashboard").joinpath("index.html").read_bytes()


# --- reads --------------------------------------------------------------------------------------


async def read(request: web.Request) -> web.Response:
    # The one call that must cost next to nothing: a plain key needs no URL to be taken apart.
    key = request.raw_path.removeprefix("/read?key=")
    if not (key.isalnum() and key.isascii() and len(key) <= 64):
        key = check_key(read_query(request, schemas.KeyQuery).key)
    service = request.app[SERVICE]
    found = service.lookup(key)
    return json_response(_shown(key, found) if found else await _read(service, key))


async def mread(request: web.Request) -> web.Response:
    keys = [
        check_key(key, f"keys[{i}]")
        for i, key in enumerate((await read_json(request, _read_many)).keys)
    ]
    answers = await request.app[SERVICE].read_many(keys)
    results = [_settled(_read_answer, key, a) for key, a in zip(keys, answers, strict=True)]
    return json_response({"results": results})


def _shown(key: str, found: Found) -> schemas.Shown:
    source = "cache" if found.hit else "memory"
    value = msgspec.Raw(found.value)
    return schemas.Shown(key, value, found.state, found.hit, source, found.version)


async def _read(service: Service, key: str) -> schemas.Shown:
    return _read_answer(key, service.lookup(key) or await service.read(key))


def _read_answer(key: str, answer: Found | Missing | Unavailable) -> schemas.Shown:
    match answer:
        case Found() as found:
            return _shown(key, found)
        case Missing():
            raise ApiError(404, "Key not found")
        case Unavailable() as nothing:
            raise _unavailable(nothing, key)


# --- changes ------------------------------------------------------------------------------------


async def write(request: web.Request) -> web.Response:
    body = await read_json(request, _write)
    key = check_key(body.key)
    value = compact(body.value)
    outcome = await _change(request, key, Write(value, body.ttl_ms or 0))
    return json_response(_written(key, value, outcome))


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

    def one(key: str, change: tuple[Write, Changed | Unavailable]) -> dict[str, object]:
        return _written(key, change[0].value, _outcome(key, change[1]))

    results = [
        _settled(one, key, (operation, answer))
        for (key, operation), answer in zip(changes, answers, strict=True)
    ]
    return json_response({"results": results})


def _written(key: str, value: bytes, outcome: Outcome) -> dict[str, object]:
    return {
        "status": "ok",
        "key": key,
        "value": msgspec.Raw(value),
        "state": "M",
        "version": outcome.version,
    }


async def cas(request: web.Request) -> web.Response:
    body = await read_json(request, _cas)
    key = check_key(body.key)
    value = compact(body.value)
    outcome = await _change(request, key, Cas(body.expected_version, value))
    if outcome.status == "mismatch":
        raise ApiError(409, "Version mismatch", key=key, version=outcome.version)
    return json_response(_written(key, value, outcome))


async def delete(request: web.Request) -> web.Response:
    key = check_key((await read_json(request, _delete)).key)
    outcome = await _change(request, key, Delete())
    return json_response({"status": "ok", "key": key, "deleted": outcome.status == "done"})


async def incr(request: web.Request) -> web.Response:
    body = await read_json(request, _incr)
    key = check_key(body.key)
    outcome = await _change(request, key, Incr(body.by))
    if outcome.status == "not_integer" or outcome.value is None:
        raise ApiError(409, "Value is not an integer in range", key=key, version=outcome.version)
    return json_response(_written(key, outcome.value, outcome))


async def _change(request: web.Request, key: str, operation: Operation) -> Outcome:
    name = idempotency_key(request) if IDEMPOTENCY_KEY in request.headers else None
    outcome = _outcome(key, await request.app[SERVICE].change(key, operation, name))
    if outcome.status == "reused":
        raise ApiError(422, "Idempotency-Key was used for another request", key=key)
    return outcome


def _outcome(key: str, answer: Changed | Unavailable) -> Outcome:
    if isinstance(answer, Unavailable):
        raise _unavailable(answer, key)
    return answer.outcome


def _unavailable(answer: Unavailable, key: str) -> ApiError:
    return ApiError(
        503, "Unavailable", headers={"Retry-After": "1"},
        definite=answer.definite, reason=answer.reason, key=key,
    )  # fmt: skip


def _settled(one: Callable[[str, T], object], key: str, answer: T) -> object:
    """One key's result in a batch: its errors stay its own."""
    try:
        return one(key, answer)
    except ApiError as e:
        return {"key": key, "error": e.error, **e.details}


# --- looking inside -----------------------------------------------------------------------------


async def lines(request: web.Request) -> web.Response:
    return json_response({"lines": request.app[SERVICE].lines()})


async def directory(request: web.Request) -> web.Response:
    key = check_key(read_query(request, schemas.KeyQuery).key)
    entry = await request.app[SERVICE].directory(key)
    if isinstance(entry, Unavailable):
        raise _unavailable(entry, key)
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
