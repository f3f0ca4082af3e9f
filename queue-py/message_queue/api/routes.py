"""The HTTP table: ten-line handlers that decode, ask the service, encode."""

from __future__ import annotations

from importlib.resources import files

import msgspec
from aiohttp import web

from message_queue.api.documented import (
    Acknowledged,
    Alive,
    Browsed,
    Configured,
    Created,
    CreatedBatch,
    Deliveries,
    Delivery,
    Extended,
    Purged,
    QueueFigures,
    QueueList,
    Ready,
    Redriven,
    Returned,
    Ring,
    RingAnswer,
    SettledBatch,
)
from message_queue.api.errors import ApiError, json_response
from message_queue.api.frames import STREAM_PROTOCOL
from message_queue.api.keys import EVENTS, METRICS, REQUEST_ID, SERVICE
from message_queue.api.openapi import Route, document
from message_queue.api.requests import (
    ack_of,
    acked,
    ask,
    extend_of,
    fetch,
    guarded,
    nack_of,
    produce_of,
    queue_name,
    read_forward,
    respond,
)
from message_queue.api.schemas import (
    ONE_ID_OR_MANY,
    ONE_OR_MANY,
    AckBody,
    ConsumeQuery,
    ExtendBody,
    NackBody,
    NoQuery,
    PeekQuery,
    ProduceBody,
    RedriveBody,
    RedriveQuery,
    RingBody,
    RingQuery,
    RouteQuery,
    SettingsBody,
    check_name,
    read_json,
    read_query,
)
from message_queue.api.stream import STREAMS
from message_queue.config import Address, ConfigError
from message_queue.core.operations import Answer, Peek, Purge

_settings = msgspec.json.Decoder(SettingsBody)
_redrive: msgspec.json.Decoder[RedriveBody | None] = msgspec.json.Decoder(RedriveBody | None)
_ring = msgspec.json.Decoder(RingBody)
_encode = msgspec.json.Encoder().encode
_PAGE = files("message_queue.dashboard").joinpath("index.html").read_bytes()


async def produce(request: web.Request) -> web.Response:
    operation = produce_of(await request.read())
    return respond(await ask(request, operation, read_forward(request)))


async def consume(request: web.Request) -> web.Response:
    query = read_query(request, ConsumeQuery)
    return await fetch(request, query, query.forward)


async def ack(request: web.Request) -> web.Response:
    body, ids = ack_of(await request.read())
    forward = read_forward(request)
    found = await guarded(request.app[SERVICE].ack(ids, body.receipt, forward))
    if isinstance(found, Answer):
        return respond(found)
    if body.next is not None and all(status == 200 for status in found):
        return await fetch(request, body.next, forward)
    return respond(acked(body, ids, found))


async def nack(request: web.Request) -> web.Response:
    operation = nack_of(await request.read())
    return respond(await ask(request, operation, read_forward(request)))


async def extend(request: web.Request) -> web.Response:
    operation = extend_of(await request.read())
    return respond(await ask(request, operation, read_forward(request)))


async def queues(request: web.Request) -> web.Response:
    read_query(request, NoQuery)
    return json_response(await request.app[SERVICE].queues())


async def queue(request: web.Request) -> web.Response:
    read_query(request, NoQuery)
    return respond(await request.app[SERVICE].show(queue_name(request)))


async def configure(request: web.Request) -> web.Response:
    body = await read_json(request, _settings)
    forward = read_forward(request)
    name = queue_name(request)
    if isinstance(body.dead_letter, str):
        check_name(body.dead_letter, "dead_letter")
    service = request.app[SERVICE]
    return respond(await guarded(service.configure(name, _encode(body), forward)))


async def peek(request: web.Request) -> web.Response:
    query = read_query(request, PeekQuery)
    return respond(await ask(request, Peek(queue_name(request), query.max), query.forward))


async def purge(request: web.Request) -> web.Response:
    operation = Purge(queue_name(request), delete=False)
    return respond(await ask(request, operation, read_forward(request)))


async def delete(request: web.Request) -> web.Response:
    operation = Purge(queue_name(request), delete=True)
    return respond(await ask(request, operation, read_forward(request)))


async def redrive(request: web.Request) -> web.Response:
    query = read_query(request, RedriveQuery)
    body = await read_json(request, _redrive) if await request.read() else None
    most = body.max if body is not None and query.max is None else query.max
    asked = request.app[SERVICE].redrive(queue_name(request), most, query.forward)
    return respond(await guarded(asked))


async def ring(request: web.Request) -> web.Response:
    query = read_query(request, RingQuery)
    return json_response(request.app[SERVICE].ring(query.queue))


async def join(request: web.Request) -> web.Response:
    return await _change_ring(request, join=True)


async def leave(request: web.Request) -> web.Response:
    return await _change_ring(request, join=False)


async def _change_ring(request: web.Request, *, join: bool) -> web.Response:
    body = await read_json(request, _ring)
    read_query(request, NoQuery)
    try:
        addr = str(Address.parse(body.addr, "addr"))
    except ConfigError as e:
        raise ApiError(400, "Invalid address", field="addr", detail=str(e)) from e
    return respond(await request.app[SERVICE].change_ring(join, addr))


# --- what every service has -----------------------------------------------------------------------


async def status(request: web.Request) -> web.Response:
    return json_response(request.app[SERVICE].status())


async def healthz(request: web.Request) -> web.Response:
    return json_response({"status": "alive"})


async def readyz(request: web.Request) -> web.Response:
    reason = request.app[SERVICE].not_ready_because()
    if reason is None:
        return json_response({"status": "ready"})
    return json_response({"error": "Not ready", "reason": reason}, 503, {"Retry-After": "1"})


async def metrics(request: web.Request) -> web.Response:
    accept = request.headers.get("Accept", "")
    asked = request.query.get("format") or (
        "prometheus" if "text/plain" in accept or "openmetrics" in accept else "json"
    )
    if asked == "prometheus":
        return web.Response(
            body=request.app[METRICS].as_prometheus(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )
    return json_response(request.app[METRICS].as_json())


async def events(request: web.Request) -> web.StreamResponse:
    return await request.app[EVENTS].stream(request, {"X-Request-Id": request[REQUEST_ID]})


async def stream(request: web.Request) -> web.StreamResponse:
    read_query(request, NoQuery)
    return await request.app[STREAMS].serve(request)


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


_DONE = {200: "Done", 400: "Bad input", 404: "Never issued", 409: "Overtaken",
         421: "Wrong node (forward=false)", 503: "No quorum"}  # fmt: skip
_ROUTED = {200: "OK", 400: "Bad input", 421: "Wrong node (forward=false)", 503: "No quorum"}
_CHANGED = {202: "Accepted: partitions begin to move", 200: "It is so already", 400: "Bad input",
            409: "Another change is in progress, or too few nodes would be left",
            503: "No quorum"}  # fmt: skip
ROUTES = (
    Route("POST", "/produce", produce, "Store a message, or a batch of them", body=ProduceBody,
          body_forms=ONE_OR_MANY, query=RouteQuery, gives=(Created, CreatedBatch),
          answers={201: "Stored on a majority", 200: "Deduplicated",
                                     429: "Queue or node is full", 507: "Disk full", **_ROUTED}),
    Route("GET", "/consume", consume, "Lease messages", query=ConsumeQuery,
          gives=(Delivery, Deliveries), answers={204: "Nothing to deliver", **_ROUTED}),
    Route("POST", "/ack", ack, "Acknowledge messages: they are gone for ever", body=AckBody,
          body_forms=ONE_ID_OR_MANY, query=RouteQuery,
          gives=(Acknowledged, SettledBatch, Delivery, Deliveries),
          answers={204: "Acknowledged, and nothing to deliver next", **_DONE}),
    Route("POST", "/nack", nack, "Give a message back", body=NackBody, query=RouteQuery,
          gives=(Returned,), answers=_DONE),
    Route("POST", "/extend", extend, "Lengthen a lease", body=ExtendBody, query=RouteQuery,
          gives=(Extended,), answers=_DONE),
    Route("GET", "/queues", queues, "All queues", gives=(QueueList,),
          answers={200: "OK", 400: "Bad input"}),
    Route("GET", "/queues/{queue}", queue, "One queue", gives=(QueueFigures,),
          answers={200: "OK", 400: "Bad input", 404: "No such queue", 503: "No quorum"}),
    Route("PUT", "/queues/{queue}", configure, "Create or change a queue", body=SettingsBody,
          query=RouteQuery, gives=(Configured,), answers=_ROUTED),
    Route("DELETE", "/queues/{queue}", delete, "Delete a queue with its messages",
          query=RouteQuery, gives=(Purged,), answers=_ROUTED),
    Route("GET", "/queues/{queue}/peek", peek, "Browse without leasing", query=PeekQuery,
          gives=(Browsed,), answers=_ROUTED),
    Route("DELETE", "/queues/{queue}/messages", purge, "Remove every message", query=RouteQuery,
          gives=(Purged,), answers=_ROUTED),
    Route("POST", "/queues/{queue}/redrive", redrive, "Send dead letters back to their source",
          body=RedriveBody, body_may_be_left_out=True, query=RedriveQuery, gives=(Redriven,),
          answers={409: "A redrive is under way", **_ROUTED}),
    Route("GET", "/ring", ring, "Placement of queues and partitions", query=RingQuery,
          gives=(Ring,), answers={200: "OK", 400: "Bad input"}),
    Route("POST", "/admin/join", join, "Let a node into the ring; progress on /events and /ring",
          body=RingBody, gives=(RingAnswer,), answers=_CHANGED),
    Route("POST", "/admin/leave", leave, "Have a node hand everything over and leave the ring",
          body=RingBody, gives=(RingAnswer,), answers={404: "No such node", **_CHANGED}),
    Route("GET", "/status", status, "State of this node"),
    Route("GET", "/healthz", healthz, "The process is alive", gives=(Alive,)),
    Route("GET", "/readyz", readyz, "The node can serve", gives=(Ready,),
          answers={200: "Ready", 503: "Not yet, with the reason"}),
    Route("GET", "/metrics", metrics, "Counters, as JSON or for Prometheus"),
    Route("GET", "/events", events, "Server-sent events", media_type="text/event-stream"),
    Route("GET", "/stream", stream, "The same service over a WebSocket",
          answers={101: "Frames of JSON from here on", 400: "Bad handshake",
                   426: "WebSocket upgrade required", 503: "Too many streams"},
          description=STREAM_PROTOCOL),
    Route("GET", "/openapi.json", openapi, "This document"),
    Route("GET", "/", dashboard, "Dashboard", media_type="text/html"),
)  # fmt: skip

_DOCUMENT = document(ROUTES, "Message queue")
