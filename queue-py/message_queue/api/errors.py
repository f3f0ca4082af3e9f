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
from aiohttp.typedefs import Middleware

from message_queue.api.keys import METRICS, REQUEST_ID

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_encode = msgspec.json.Encoder().encode
REQUEST_ID_PATTERN = r"[A-Za-z0-9._:-]{1,128}"
_REQUEST_ID = re.compile(REQUEST_ID_PATTERN, re.ASCII)


_LIFE = secrets.token_hex(4)
_numbers = itertools.count(1)


def new_request_id() -> str:
    """Unique over nodes and restarts; a random number a request would cost a system call."""
    return f"{_LIFE}-{next(_numbers):x}"


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


def middleware(check: Callable[[web.Request], None]) -> Middleware:
    """The outermost layer: request id, `check` (the guards), errors to JSON, counting."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else new_request_id()
        request[REQUEST_ID] = request_id
        metrics = request.app[METRICS]
        metrics.requests += 1
        try:
            check(request)
            response = await handler(request)
        except ApiError as e:
            response = _error_response(request, e)
        except web.HTTPException as e:
            response = _from_aiohttp(request, e)
        except web.RequestPayloadError:  # broken chunks, or not the gzip that it claims to be
            response = _error_response(request, ApiError(400, "Unreadable request body"))
        except ConnectionError:
            raise  # the client hung up: there is nobody to answer
        except Exception:  # the last line of defence; the traceback goes to the log
            log.exception(
                "unexpected error in %s %s (request %s)", request.method, request.path, request_id
            )
            response = _error_response(request, ApiError(500, "Internal error", definite=False))
        if response.status >= 400:
            metrics.errors += 1
        if not response.prepared:
            response.headers["X-Request-Id"] = request_id
            response.headers["Server"] = "message-queue"
            response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return answer


def _from_aiohttp(request: web.Request, e: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own 404, 405, 413 … as ours; a websocket upgrade's answer passes as it is."""
    sentence = {404: "Not found", 405: "Method not allowed", 413: "Request body too large"}
    headers = {k: v for k, v in e.headers.items() if k in ("Allow", "Location", "Retry-After")}
    error = sentence.get(e.status) or (e.text or e.reason)
    return _error_response(request, ApiError(e.status, error, headers=headers))


def _error_response(request: web.Request, e: ApiError) -> web.Response:
    if "application/problem+json" in request.headers.get("Accept", ""):
        # The RFC uses two of our names itself: its status is the number, its detail the error.
        renamed = {"status": "code", "detail": "hint"}
        details = {renamed.get(name, name): value for name, value in e.details.items()}
        problem = {
            **details, "type": "about:blank", "title": HTTPStatus(e.status).phrase,
            "status": e.status, "detail": e.error, "instance": request.path,
        }  # fmt: skip
        return web.Response(
            body=_encode(problem),
            status=e.status,
            headers=e.headers,
            content_type="application/problem+json",
        )
    return json_response({"error": e.error, **e.details}, e.status, e.headers)
