"""The aiohttp application: routes, the middleware, and what handlers find on it."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from mesi_cache.api import errors
from mesi_cache.api.events import EventHub
from mesi_cache.api.guards import Guards
from mesi_cache.api.keys import CONFIG, EVENTS, METRICS, SERVICE, Service
from mesi_cache.api.routes import ROUTES
from mesi_cache.config import Config
from mesi_cache.metrics import Metrics


def build(
    service: Service,
    config: Config,
    metrics: Metrics,
    events: EventHub,
    peer_routes: Sequence[web.RouteDef],
) -> web.Application:
    """Make the application; `peer_routes` are the transport's, which `server` passes in."""
    guards = Guards(config.scheme, config.addr.host, config.addr.port)
    app = web.Application(
        middlewares=[errors.middleware(guards.check)], client_max_size=config.max_body_bytes
    )
    app[SERVICE] = service
    app[CONFIG] = config
    app[METRICS] = metrics
    app[EVENTS] = events
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    app.add_routes(peer_routes)

    async def end_streams(_: web.Application) -> None:
        events.close()

    app.on_shutdown.append(end_streams)
    return app
