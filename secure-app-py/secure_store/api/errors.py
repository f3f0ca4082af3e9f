"""Errors as clients see them, and the one middleware that makes every answer a JSON answer.

`{"error": "<stable sentence>", …details}`, or RFC 9457 when the client asks for it. A reply that
leaves the outcome unknown says `"definite": false`, so that clients know whether a retry can double
an effect.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

import msgspec
from aiohttp import web

log = logging.getLogger(__name__)

REQUEST_ID = web.RequestKey("request_id", str)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SAFE_HEADERS = {
    "Server": "secure-store",
    "X-Content-Type-Options": "nosniff",
    "Strict-Transport-Security": "max-age=31536000",
    "Cache-Control": "no-store",
}
_encode = msgspec.json.Encoder().encode
# Unique and cheap: a system call for chance per request would cost as much as the request.
_PREFIX = secrets.token_hex(6)
_numbers = itertools.count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


class ApiError(Exception):
    """An answer other than success: `status`, the stable sentence, details, headers."""

    def __init__(
        self,
        status: int,
        error: str,
        *,
        headers: Mapping[str, str] | None = None,
        **details: object,
    ) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.details = details
        self.headers = headers


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Compact JSON of any msgspec-encodable `body`."""
    return web.Response(
        body=_encode(body), status=status, headers=headers, content_type="application/json"
    )


def secure(response: web.StreamResponse, request_id: str) -> None:
    """The headers of every answer (see also reply.py). `Server` names no version."""
    response.headers["X-Request-Id"] = request_id
    response.headers.update(SAFE_HEADERS)


def request_id_of(request: web.Request) -> str:
    """The client's X-Request-Id if it is a clean one, else a new one."""
    given = request.headers.get("X-Request-Id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return new_request_id()


def new_request_id() -> str:
    return f"{_PREFIX}-{next(_numbers):x}"


def to_response(request: web.Request, error: Exception) -> web.StreamResponse:
    """Any exception of a handler as an answer; what nobody foresaw is logged and is a 500."""
    if isinstance(error, ApiError):
        return _error_response(request, error)
    if isinstance(error, web.HTTPException):
        return _from_aiohttp(request, error)
    if isinstance(error, web.RequestPayloadError):  # broken chunks, or not the gzip it claims to be
        return _error_response(request, ApiError(400, "Unreadable request body"))
    log.error(
        "unexpected error in %s %s (request %s)",
        request.method,
        request.path,
        request.get(REQUEST_ID, ""),
        exc_info=error,
    )
    return _error_response(request, ApiError(500, "Internal error", definite=False))


def _from_aiohttp(request: web.Request, e: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own 404, 405, 413 … as ours; a websocket upgrade's answer passes as it is."""
    sentence = {404: "Not found", 405: "Method not allowed", 413: "Request body too large"}
    kept = ("Allow", "Location", "Retry-After")
    headers = {k: v for k, v in e.headers.items() if k in kept}
    error = sentence.get(e.status) or (e.text or e.reason)
    return _error_response(request, ApiError(e.status, error, headers=headers))


def _error_response(request: web.Request, e: ApiError) -> web.Response:
    if "application/problem+json" in request.headers.get("Accept", ""):
        problem = {
            "type": "about:blank", "title": HTTPStatus(e.status).phrase, "status": e.status,
            "detail": e.error, "instance": request.path, **e.details,
        }  # fmt: skip
        return web.Response(
            body=_encode(problem),
            status=e.status,
            headers=e.headers,
            content_type="application/problem+json",
        )
    return json_response({"error": e.error, **e.details}, e.status, e.headers)
