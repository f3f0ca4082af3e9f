"""The aiohttp application: routes, the one middleware, and what handlers find on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from secure_store.api import access, errors
from secure_store.api.errors import Handler
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
from secure_store.api.routes import ROUTES
from secure_store.api.translate import api_error
from secure_store.api.watch import WatchHub
from secure_store.config import Config
from secure_store.core.limiter import Limiter
from secure_store.metrics import Metrics


def build(
    service: Service,
    config: Config,
    metrics: Metrics,
    events: EventHub,
    watches: WatchHub,
    peer_routes: Sequence[web.RouteDef],
    hang_up: Callable[[], None],
) -> web.Application:
    """Make the application; `peer_routes` are the transport's, which `server` passes in, and
    `hang_up` ends them at shutdown."""
    guards = Guards("https", config.addr.host, config.addr.port)
    table = {(r.method, r.path): r for r in ROUTES}
    app = web.Application(
        middlewares=[middleware(guards, table)], client_max_size=config.max_body_bytes
    )
    app[SERVICE] = service
    app[CONFIG] = config
    app[METRICS] = metrics
    app[EVENTS] = events
    app[WATCHES] = watches
    app[LIMITER] = Limiter()
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    app.add_routes(peer_routes)

    async def end_streams(_: web.Application) -> None:
        events.close()
        watches.close()
        hang_up()

    app.on_shutdown.append(end_streams)
    return app


def middleware(guards: Guards, table: dict[tuple[str, str], Route]) -> Middleware:
    """The outermost layer, in this order: request id; is the audit log alive; is there such a
    route; who asks (401); guards and the handler (400, 403, 421 …); the audit line; headers."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        began_ns = time.perf_counter_ns()
        request_id = errors.request_id_of(request)
        request[REQUEST_ID] = request_id
        app = request.app
        metrics = app[METRICS]
        metrics.requests += 1
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else ""
        route = table.get((request.method, path))
        request[ACTION] = action = _action(route, path)
        try:
            response = await _respond(request, handler, route, guards)
        except (asyncio.CancelledError, ConnectionError):
            # The client hung up: there is nobody to answer, but what it had begun goes on.
            access.note_hang_up(request, action)
            raise
        except Exception as e:  # noqa: BLE001 - every exception becomes an answer; see to_response
            response = errors.to_response(request, api_error(e, app[SERVICE]))
        if route is None or not route.is_probe:
            try:
                is_write = route is not None and route.is_write
                await access.audit(request, action, response.status, is_write=is_write)
            except errors.ApiError as e:
                response = errors.to_response(request, e)
        if response.status >= 400:
            metrics.errors += 1
            metrics.unauthenticated += response.status == 401
            metrics.forbidden += response.status == 403
        if not response.prepared:
            errors.secure(response, request_id)
        metrics.request_ms.observe((time.perf_counter_ns() - began_ns) / 1e6)
        return response

    return answer


def _action(route: Route | None, path: str) -> str:
    """What a request is called in the audit log."""
    if route is not None:
        return route.handler.__name__
    return path.strip("/") or "unknown"


async def _respond(
    request: web.Request, handler: Handler, route: Route | None, guards: Guards
) -> web.StreamResponse:
    if route is not None and not route.is_probe:
        access.check_audit(request.app[SERVICE])
    if request.match_info.http_exception is not None:
        raise request.match_info.http_exception
    if route is not None and not route.is_public:
        request[PRINCIPAL] = await access.authenticate(request)
    guards.check(request)
    return await handler(request)
