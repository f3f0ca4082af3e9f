"""The aiohttp application: routes, the middleware, and what handlers find on it."""

from __future__ import annotations

from aiohttp import web

from lock_manager.api import errors
from lock_manager.api.events import EventHub
from lock_manager.api.guards import Guards
from lock_manager.api.keys import CONFIG, EVENTS, METRICS, SERVICE, Service
from lock_manager.api.routes import ROUTES
from lock_manager.config import Config
from lock_manager.metrics import Metrics


def build(
    service: Service,
    config: Config,
    metrics: Metrics,
    events: EventHub,
) -> web.Application:
    """Make the application that clients see."""
    guards = Guards(config.scheme, config.http_addr.host, config.http_addr.port)
    app = web.Application(
        middlewares=[errors.middleware(guards.check)], client_max_size=config.max_body_bytes
    )
    app[SERVICE] = service
    app[CONFIG] = config
    app[METRICS] = metrics
    app[EVENTS] = events
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)

    async def end_streams(_: web.Application) -> None:
        events.close()

    app.on_shutdown.append(end_streams)
    return app
