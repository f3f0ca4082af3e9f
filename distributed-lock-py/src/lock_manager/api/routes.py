"""The HTTP table: ten-line handlers that decode, ask the service, encode."""

from __future__ import annotations

from importlib.resources import files

import msgspec
from aiohttp import web

from lock_manager.api.answers import respond
from lock_manager.api.errors import ApiError, json_response
from lock_manager.api.keys import EVENTS, REQUEST_ID, SERVICE, Service
from lock_manager.api.openapi import Route, document
from lock_manager.api.schemas import (
    AcquireBody,
    ConsistencyQuery,
    ForceReleaseBody,
    KeepaliveBody,
    LocksQuery,
    MembersBody,
    ReleaseAllBody,
    ReleaseBody,
    TransferBody,
    ValidateQuery,
    acquire_command,
    check_name,
    keepalive_command,
    read_json,
    read_query,
    release_command,
)
from lock_manager.config import Address, ConfigError, valid_name
from lock_manager.core.locks.commands import ForceRelease, ReleaseAll

_acquire = msgspec.json.Decoder(AcquireBody)
_release = msgspec.json.Decoder(ReleaseBody)
_release_all = msgspec.json.Decoder(ReleaseAllBody)
_keepalive = msgspec.json.Decoder(KeepaliveBody)
_force_release = msgspec.json.Decoder(ForceReleaseBody)
_transfer = msgspec.json.Decoder(TransferBody)
_members = msgspec.json.Decoder(MembersBody)
_PAGE = files("lock_manager.dashboard").joinpath("index.html").read_bytes()
MOST_EDGES = 10_000


async def acquire(request: web.Request) -> web.Response:
    command = acquire_command(await read_json(request, _acquire))
    return respond(await request.app[SERVICE].execute(command))


async def release(request: web.Request) -> web.Response:
    command = release_command(await read_json(request, _release))
    return respond(await request.app[SERVICE].execute(command))


async def release_all(request: web.Request) -> web.Response:
    body = await read_json(request, _release_all)
    command = ReleaseAll(check_name(body.client_id, "client_id"))
    return respond(await request.app[SERVICE].execute(command))


async def keepalive(request: web.Request) -> web.Response:
    body = await read_json(request, _keepalive)
    return respond(await request.app[SERVICE].execute(keepalive_command(body)))


# --- reads ----------------------------------------------------------------------------------------


async def _fresh(request: web.Request, query: ConsistencyQuery) -> Service:
    """The service, as new as the query wants it."""
    service = request.app[SERVICE]
    if query.consistency == "linearizable":
        await service.confirm_leadership()
    return service


async def validate(request: web.Request) -> web.Response:
    query = read_query(request, ValidateQuery)
    service = await _fresh(request, ConsistencyQuery())
    return json_response({"valid": service.validate(query.lock_name, query.fencing_token)})


async def locks(request: web.Request) -> web.Response:
    query = read_query(request, LocksQuery)
    found, complete = (await _fresh(request, query)).locks(query.most)
    return json_response({"locks": found} if complete else {"locks": found, "truncated": True})


async def lock(request: web.Request) -> web.Response:
    query = read_query(request, ConsistencyQuery)
    name = check_name(request.match_info["lock_name"], "lock_name")
    return json_response((await _fresh(request, query)).lock(name))


async def wait_graph(request: web.Request) -> web.Response:
    query = read_query(request, ConsistencyQuery)
    edges, complete = (await _fresh(request, query)).wait_graph(MOST_EDGES)
    return json_response({"edges": edges} if complete else {"edges": edges, "truncated": True})


# --- operators ------------------------------------------------------------------------------------


async def force_release(request: web.Request) -> web.Response:
    body = await read_json(request, _force_release)
    command = ForceRelease(
        check_name(body.lock_name, "lock_name"), body.reason, body.client_id or ""
    )
    return respond(await request.app[SERVICE].execute(command))


async def transfer(request: web.Request) -> web.Response:
    body = await read_json(request, _transfer)
    leader_id = await request.app[SERVICE].operators.transfer(body.target)
    return json_response({"status": "transferred", "leader_id": leader_id})


async def members(request: web.Request) -> web.Response:
    body = await read_json(request, _members)
    operators = request.app[SERVICE].operators
    if body.action == "remove":
        position = await operators.remove(body.id)
        return json_response({"status": "removed", "id": body.id, "position": position})
    for field, value in (("raft_addr", body.raft_addr), ("http_addr", body.http_addr)):
        if value is None:
            raise ApiError(400, "Missing field", field=field)
    try:
        name = valid_name(body.id, "id")
        raft_addr = str(Address.parse(body.raft_addr or "", "raft_addr"))
        http_addr = str(Address.parse(body.http_addr or "", "http_addr"))
    except ConfigError as e:
        raise ApiError(400, "Invalid field", detail=str(e)) from None
    position = await operators.add(name, raft_addr, http_addr)
    return json_response({"status": "added", "id": name, "position": position})


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
    found = request.app[SERVICE].measure()
    if asked == "prometheus":
        return web.Response(
            body=found.as_prometheus(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )
    return json_response(found.as_json())


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


def _answers(more: dict[int, str]) -> dict[int, str]:
    return {
        200: "Done",
        307: "Not the leader; Location is",
        400: "Bad input",
        **more,
        503: "No leader, or leadership was lost (`definite` false: it may still take effect)",
    }


ROUTES = (
    Route("POST", "/acquire", acquire, "Take one lock, or several at once",
          body=AcquireBody, answers=_answers(
              {409: "Held, timed out, deadlock, lease lost, in use as another kind",
               422: "Request id reused with another body"})),
    Route("POST", "/release", release, "Give a lock back", body=ReleaseBody,
          answers=_answers({409: "Not held by this client (or not by this token)"})),
    Route("POST", "/release_all", release_all, "Give back everything the client holds",
          body=ReleaseAllBody, answers=_answers({})),
    Route("POST", "/keepalive", keepalive, "Count the client's leases anew", body=KeepaliveBody,
          answers=_answers({409: "A lease is lost; the others were renewed"})),
    Route("GET", "/validate", validate, "Whether a fencing token is of a present hold",
          query=ValidateQuery, answers=_answers({})),
    Route("GET", "/locks", locks, "Locks in use", query=LocksQuery, answers=_answers({})),
    Route("GET", "/locks/{lock_name}", lock, "One lock: its holders and waiters",
          query=ConsistencyQuery, answers=_answers({})),
    Route("GET", "/wait-graph", wait_graph, "Who waits for whom", query=ConsistencyQuery,
          answers=_answers({})),
    Route("POST", "/admin/force_release", force_release, "Free a lock whose holder is gone",
          body=ForceReleaseBody, answers=_answers({})),
    Route("POST", "/admin/transfer", transfer, "Hand leadership over", body=TransferBody,
          answers=_answers({409: "Not possible now"})),
    Route("POST", "/admin/members", members, "Add or remove a node", body=MembersBody,
          answers=_answers({409: "Not possible now"})),
    Route("GET", "/status", status, "State of this node"),
    Route("GET", "/healthz", healthz, "The process is alive"),
    Route("GET", "/readyz", readyz, "The node can serve",
          answers={200: "Ready", 503: "Not yet, with the reason"}),
    Route("GET", "/metrics", metrics, "Counters, as JSON or for Prometheus"),
    Route("GET", "/events", events, "Server-sent events", media_type="text/event-stream"),
    Route("GET", "/openapi.json", openapi, "This document"),
    Route("GET", "/", dashboard, "Dashboard", media_type="text/html"),
)  # fmt: skip

_DOCUMENT = document(ROUTES, "Lock manager")
