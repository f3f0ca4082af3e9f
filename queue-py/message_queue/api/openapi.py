"""The OpenAPI document, from the table that the routes are registered from: it cannot drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from message_queue import __version__
from message_queue.api.documented import Error
from message_queue.api.errors import Handler
from message_queue.api.schemas import Forms

_REF = "#/components/schemas/{name}"
_RETRIED = frozenset({429, 503, 507})
"""Come with a Retry-After."""


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the HTTP table. ``gives``: what a body of status 2xx may be; nothing: any."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    gives: tuple[type[msgspec.Struct], ...] = ()
    answers: dict[int, str] = field(default_factory=lambda: {200: "OK"})
    media_type: str = "application/json"
    description: str = ""
    body_may_be_left_out: bool = False
    body_forms: Forms = ()


def document(routes: Sequence[Route], title: str) -> bytes:
    """The OpenAPI 3.1 document as JSON."""
    structs: list[type[msgspec.Struct]] = [Error]
    for route in routes:
        structs += route.gives
        structs += [s for s in (route.body, route.query) if s is not None]
    _, components = msgspec.json.schema_components(structs, ref_template=_REF)
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        if route.body is not None and route.body_forms:
            components[route.body.__name__]["oneOf"] = route.body_forms
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": title, "version": __version__},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _operation(route: Route, components: Mapping[str, dict[str, object]]) -> dict[str, object]:
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": route.handler.__name__,
        "responses": {
            str(status): _response(route, status, text) for status, text in route.answers.items()
        },
    }
    if route.description:
        operation["description"] = route.description
    if parameters := _parameters(route, components):
        operation["parameters"] = parameters
    if route.body is not None:
        schema: dict[str, object] = _reference(route.body)
        if route.body_may_be_left_out:
            schema = {"anyOf": [schema, {"type": "null"}]}
        operation["requestBody"] = {
            "required": not route.body_may_be_left_out,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _reference(struct: type[msgspec.Struct]) -> dict[str, object]:
    return {"$ref": _REF.format(name=struct.__name__)}


def _response(route: Route, status: int, text: str) -> dict[str, object]:
    headers = {"X-Request-Id": {"schema": {"type": "string"}}}
    if status in _RETRIED:
        headers["Retry-After"] = {"schema": {"type": "integer"}}
    response: dict[str, object] = {"description": text, "headers": headers}
    if status >= 400:
        error = {"schema": _reference(Error)}
        problem: dict[str, object] = {"schema": {"type": "object"}}
        response["content"] = {"application/json": error, "application/problem+json": problem}
    elif status not in (101, 204):
        found = [_reference(struct) for struct in route.gives]
        schema = {"schema": {"anyOf": found} if len(found) > 1 else found[0]} if found else {}
        response["content"] = {route.media_type: schema}
    return response


def _parameters(route: Route, components: Mapping[str, dict[str, object]]) -> list[object]:
    parameters: list[object] = [
        {
            "name": part[1:-1],
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "maxLength": 256},
        }
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
    return parameters
