"""The HTTP table, and what every service has."""

from __future__ import annotations

from importlib.resources import files

from aiohttp import web

from secure_store.api import access, administration, answers, operations
from secure_store.api.errors import ApiError, json_response
from secure_store.api.keys import EVENTS, METRICS, PRINCIPAL, SERVICE
from secure_store.api.openapi import Route, document
from secure_store.api.schemas import (
    AuditQuery,
    CheckQuery,
    DeleteBody,
    GetQuery,
    KeyQuery,
    ListQuery,
    PolicyBody,
    PromoteBody,
    RevokeBody,
    RotateBody,
    SetBody,
    TokenBody,
    TxnBody,
    VersionBody,
    WatchQuery,
)
from secure_store.api.streams import Listener

_PAGE = files("secure_store.dashboard").joinpath("index.html").read_bytes()


async def status(request: web.Request) -> web.Response:
    return json_response(request.app[SERVICE].status())


async def replication(request: web.Request) -> web.Response:
    return json_response(request.app[SERVICE].replication())


async def healthz(request: web.Request) -> web.Response:
    return json_response({"status": "alive"})


async def readyz(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    reason = service.not_ready_because()
    if reason is not None:
        raise ApiError(503, "Not ready", headers={"Retry-After": "1"}, reason=reason)
    headers = {"X-Replication": "degraded"} if service.is_degraded() else None
    return json_response({"status": "ready"}, headers=headers)


async def metrics(request: web.Request) -> web.Response:
    request.app[SERVICE].gather_gauges()
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
    service, hub, principal = request.app[SERVICE], request.app[EVENTS], request[PRINCIPAL]
    if not hub.has_room():
        raise ApiError(503, "Too many event streams", headers={"Retry-After": "5"})
    access.note(request, 200, is_write=False)
    listener = Listener(lambda: service.is_still_valid(principal), principal.expires_ms)
    return await hub.serve(request, listener, operations.stream_headers(request), ())


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


_SSE = ("text/event-stream",)
_OF_A_KEY = (404,)
_WRITE = (409, 422)
_READING = ("ETag", "X-Replication")
_WRITING = ("ETag", "X-Replication", "Idempotent-Replay")

ROUTES = (
    Route("GET", "/get", operations.get, "Read a value", query=GetQuery, answer=answers.Value,
          refusals=_OF_A_KEY, headers=_READING),
    Route("POST", "/set", operations.set_value, "Write a value", body=SetBody,
          answer=answers.Stored, refusals=_WRITE, headers=_WRITING, is_write=True),
    Route("POST", "/delete", operations.delete, "Delete softly", body=DeleteBody,
          answer=answers.Changed, refusals=(404, *_WRITE), headers=_WRITING, is_write=True),
    Route("POST", "/undelete", operations.undelete, "Bring a deleted version back",
          body=VersionBody, answer=answers.Changed, refusals=(404, 422), headers=_WRITING,
          is_write=True),
    Route("POST", "/destroy", operations.destroy, "Forget a version, or a key, for good",
          body=VersionBody, answer=answers.Changed, refusals=(404, 422), headers=_WRITING,
          is_write=True),
    Route("GET", "/list", operations.list_keys, "Keys that the caller may list", query=ListQuery,
          answer=answers.Listing, headers=("X-Replication",)),
    Route("GET", "/history", operations.history, "Versions of a key", query=KeyQuery,
          answer=answers.History, refusals=_OF_A_KEY, headers=("X-Replication",)),
    Route("POST", "/txn", operations.txn, "Several operations, all or nothing", body=TxnBody,
          answer=answers.Transacted, refusals=(404, *_WRITE), headers=_WRITING, is_write=True),
    Route("GET", "/watch", operations.watch, "Changes as they are decided", query=WatchQuery,
          media_types=_SSE),
    Route("GET", "/audit", administration.read_audit, "Lines of this node's audit log",
          query=AuditQuery, answer=answers.AuditPage),
    Route("GET", "/audit/anchors", administration.read_anchors,
          "The other node's signed heads that are kept here", refusals=(404,),
          media_types=("application/jsonl",)),
    Route("GET", "/tokens", administration.list_tokens, "Tokens (never the secrets)",
          answer=answers.Tokens),
    Route("POST", "/tokens", administration.create_token, "Make a token; it is shown once",
          body=TokenBody, answer=answers.TokenMade, refusals=(507,), headers=("X-Replication",),
          is_write=True),
    Route("DELETE", "/tokens", administration.revoke_token, "Revoke a token and its children",
          body=RevokeBody, answer=answers.TokenRevoked, refusals=(404, 422), headers=_WRITING,
          is_write=True),
    Route("GET", "/policies", administration.list_policies, "Every role and its rules",
          answer=answers.Policies),
    Route("GET", "/policies/{role}/check", administration.check_policy,
          "Whether a role may do a verb on a key, and by which rule", query=CheckQuery,
          answer=answers.PolicyVerdict, refusals=(404,)),
    Route("GET", "/policies/{role}", administration.get_policy, "A role's rules",
          answer=answers.Policy, refusals=(404,)),
    Route("PUT", "/policies/{role}", administration.put_policy, "Replace a role's rules",
          body=PolicyBody, answer=answers.PolicyPut, refusals=_WRITE, headers=_WRITING,
          is_write=True),
    Route("POST", "/admin/promote", administration.promote, "Make this replica the primary",
          body=PromoteBody, answer=answers.Promoted, refusals=(409,), is_write=True),
    Route("POST", "/admin/rotate", administration.rotate,
          "A new data key for this node (master: and master key)", body=RotateBody,
          answer=answers.Rotated, refusals=(409,), is_write=True),
    Route("GET", "/status", status, "State of this node", answer=answers.Status),
    Route("GET", "/replication", replication, "State of the pair", answer=answers.Replication),
    Route("GET", "/healthz", healthz, "The process is alive", answer=answers.Alive,
          is_public=True, is_probe=True),
    Route("GET", "/readyz", readyz, "The node can serve (503: not yet, with the reason)",
          answer=answers.Ready, refusals=(503,), headers=("X-Replication",), is_public=True,
          is_probe=True),
    Route("GET", "/metrics", metrics, "Counters, as JSON or for Prometheus",
          answer=answers.Counters, media_types=("application/json", "text/plain")),
    Route("GET", "/events", events, "Server-sent events", media_types=_SSE),
    Route("GET", "/openapi.json", openapi, "This document"),
    Route("GET", "/", dashboard, "Dashboard", media_types=("text/html",), is_public=True,
          is_probe=True),
)  # fmt: skip

_DOCUMENT = document(ROUTES, "Secure key-value store")
