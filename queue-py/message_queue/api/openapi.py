"""GET /openapi.json, made from the table that the routes are registered from: it cannot drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from message_queue import __version__
from message_queue.api.errors import Handler


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the HTTP table."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    answers: dict[int, str] = field(default_factory=lambda: {200: "OK"})
    media_type: str = "application/json"
    description: str = ""
    body_may_be_left_out: bool = False


def document(routes: Sequence[Route], title: str) -> bytes:
    """The OpenAPI 3.1 document as JSON."""
    structs = [s for route in routes for s in (route.body, route.query) if s is not None]
    _, components = msgspec.json.schema_components(
        structs, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": title, "version": __version__},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _operation(route: Route, components: dict[str, dict[str, object]]) -> dict[str, object]:
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": route.handler.__name__,
        "responses": {
            str(status): {
                "description": text,
                "content": {route.media_type if status < 300 else "application/json": {}},
            }
            for status, text in route.answers.items()
        },
    }
    if route.description:
        operation["description"] = route.description
    parameters: list[object] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in route.path.split("/")
        if part.startswith("{")
    ]
    if route.query is not None:
        schema = components[route.query.__name__]
        required = schema.get("required", [])
        properties = schema["properties"]
        assert isinstance(required, list) and isinstance(properties, dict)  # noqa: S101, PT018 - msgspec's shape
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": s}
            for name, s in properties.items()
        ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.body_may_be_left_out,
            "content": {
                "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{route.body.__name__}"}
                }
            },
        }
    return operation
