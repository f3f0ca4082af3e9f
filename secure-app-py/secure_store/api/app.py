"""The aiohttp application: routes, what is done around every handler, and what they find on it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

from aiohttp import web

from secure_store.api import access, errors
from secure_store.api.errors import ApiError, Handler
from secure_store.api.events import EventHub
from secure_store.api.guards import Guards
from secure_store.api.keys import (
    ACTION,
    CONFIG,
    EVENTS,
    LIMITER,
    METRICS,
    PRINCIPAL,
    REQUEST_ID,
    SERVICE,
    WATCHES,
    Service,
)
from secure_store.api.openapi import Route
from secure_store.api.reply import Reply
from secure_store.api.routes import ROUTES
from secure_store.api.translate import api_error
from secure_store.api.watch import WatchHub
from secure_store.config import Config
from secure_store.core.limiter import Limiter
from secure_store.metrics import Metrics

# A target with at most one parameter, whose value needs no decoding, and whose name is no token's:
# nothing in its query can be wrong that the handler would not see.
_PLAIN = re.compile(r"[a-z/]*(?:\?(?:key|prefix|after|limit)=[A-Za-z0-9/._~:@-]*)?")


def build(
    service: Service,
    config: Config,
    metrics: Metrics,
    events: EventHub,
    watches: WatchHub,
    peer_routes: Sequence[Route],
    hang_up: Callable[[], None],
) -> web.Application:
    """Make the application; `peer_routes` are the transport's, which `server` passes in, and
    `hang_up` ends them at shutdown."""
    guards = Guards("https", config.addr.host, config.addr.port)
    app = web.Application(client_max_size=config.max_body_bytes)
    app[SERVICE] = service
    app[CONFIG] = config
    app[METRICS] = metrics
    app[EVENTS] = events
    app[WATCHES] = watches
    app[LIMITER] = Limiter()
    around = Around(service, metrics, guards)
    for route in (*ROUTES, *peer_routes):
        app.router.add_route(route.method, route.path, around.handler(route))
    unmatched = Route("*", "/{path:.*}", nowhere((*ROUTES, *peer_routes)), "", is_public=True)
    app.router.add_route("*", unmatched.path, around.handler(unmatched, action="unknown"))

    async def end_streams(_: web.Application) -> None:
        events.close()
        watches.close()
        hang_up()

    app.on_shutdown.append(end_streams)
    return app


def nowhere(routes: Sequence[Route]) -> Handler:
    """The handler of what is not in the table: 404, or 405 and what would be allowed."""
    shapes = [
        (route.method, re.compile(re.sub(r"\{\w+\}", "[^/]+", route.path))) for route in routes
    ]

    async def answer(request: web.Request) -> web.StreamResponse:
        allowed = sorted({method for method, shape in shapes if shape.fullmatch(request.path)})
        if allowed:
            raise ApiError(405, "Method not allowed", headers={"Allow": ",".join(allowed)})
        raise ApiError(404, "Not found")

    return answer


class Around:
    """What is done around every handler, in this order: request id; is the audit log alive; who
    asks (401); guards and the handler (400, 403, 421 …); the audit line; headers.

    Wrapped around each handler once, at the start: aiohttp's middlewares would cost two more
    coroutines and a look at the route a request.
    """

    def __init__(self, service: Service, metrics: Metrics, guards: Guards) -> None:
        self._service = service
        self._metrics = metrics
        self._guards = guards

    def handler(self, route: Route, action: str = "") -> Handler:
        """The route's handler with everything around it; `action` is what the audit log calls it
        (default: the handler's name)."""
        name = action or route.action or route.handler.__name__
        handler, audit, metrics, guards = (
            route.handler,
            self._service.audit,
            self._metrics,
            self._guards,
        )
        is_audited, is_public = not route.is_probe, route.is_public
        clock = time.perf_counter_ns

        async def answer(request: web.Request) -> web.StreamResponse:
            began_ns = clock()
            request_id = request[REQUEST_ID] = errors.request_id_of(request)
            request[ACTION] = name
            metrics.requests += 1
            response: web.StreamResponse
            try:
                if is_audited and audit.unavailable() is not None:
                    raise access.no_audit()
                is_plain = _PLAIN.fullmatch(request.raw_path) is not None
                if not is_public:
                    request[PRINCIPAL] = await access.authenticate(request, is_plain=is_plain)
                guards.check(request, is_plain=is_plain)
                response = await handler(request)
            except (asyncio.CancelledError, ConnectionError):
                # The client hung up: there is nobody to answer, but what it had begun goes on.
                access.note_hang_up(request, name)
                raise
            except Exception as e:  # noqa: BLE001 - every exception becomes an answer; see to_response
                response = errors.to_response(request, api_error(e, self._service))
            if is_audited:
                try:
                    durable = access.note(request, response.status, is_write=route.is_write)
                    if durable is not None:
                        await access.until_durable(request, durable, response.status)
                except ApiError as e:
                    response = errors.to_response(request, e)
            self._count(response.status)
            if not (isinstance(response, Reply) or response.prepared):
                errors.secure(response, request_id)
            metrics.request_ms.observe((clock() - began_ns) / 1e6)
            return response

        return answer

    def _count(self, status: int) -> None:
        if status >= 400:
            self._metrics.errors += 1
            self._metrics.unauthenticated += status == 401
            self._metrics.forbidden += status == 403
