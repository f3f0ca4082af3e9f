"""The aiohttp application: routes, the middleware, and what handlers find on it."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from message_queue.api import errors
from message_queue.api.events import EventHub
from message_queue.api.guards import Guards
from message_queue.api.keys import CONFIG, EVENTS, METRICS, SERVICE, Service
from message_queue.api.routes import ROUTES
from message_queue.api.stream import STREAMS, Streams
from message_queue.config import Config
from message_queue.metrics import Metrics


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
    app[STREAMS] = Streams()
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    app.add_routes(peer_routes)

    async def end_streams(_: web.Application) -> None:
        events.close()

    app.on_shutdown.append(end_streams)
    return app


async def stop(app: web.Application) -> None:
    """The node is about to stop: clients that stay go elsewhere. Within 0.6 s."""
    await app[STREAMS].stop()
