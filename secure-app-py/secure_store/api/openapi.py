"""GET /openapi.json, made from the table that the routes are registered from: it cannot drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from secure_store import __version__
from secure_store.api.answers import Problem, Refusal
from secure_store.api.errors import Handler

ROLE_SCHEMA = {"type": "string", "pattern": "^[a-z][a-z0-9._-]{0,63}$"}  # policy.check_role_name
_SENTENCES = {
    400: "Bad input: invalid JSON, a field, a query parameter, a token in the URL",
    401: "No valid token",
    403: "Not allowed",
    404: "Not found",
    409: "It is not as it was expected",
    413: "Too large",
    421: "Not the primary: `primary` says who is",
    422: "The Idempotency-Key was used for another request",
    429: "Too many invalid tokens from this address",
    503: "Not now; `definite` false: the outcome is unknown",
    507: "There is no room for more",
}
_HEADERS = {
    400: {"WWW-Authenticate": False},
    401: {"WWW-Authenticate": True},
    403: {"WWW-Authenticate": False},
    429: {"Retry-After": True},
    503: {"Retry-After": False},
}  # whether each is there in every such answer
_EVERY = (400, 401, 403, 421, 429, 503)  # 421: a token with a use limit, at the replica


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the HTTP table."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None  # the body of a 200, if that is JSON
    refusals: tuple[int, ...] = ()  # besides those that every route of its kind may give
    media_types: tuple[str, ...] = ("application/json",)
    headers: tuple[str, ...] = ()  # of a 200, not in every one
    is_public: bool = False  # answers without a token
    is_probe: bool = False  # says nothing worth an audit line
    is_write: bool = False  # its audit line is durable before its answer
    action: str = ""  # what the audit log calls it (default: the handler's name)


def document(routes: Sequence[Route], title: str) -> bytes:
    """The OpenAPI 3.1 document as JSON."""
    shapes = [s for route in routes for s in (route.body, route.query, route.answer) if s]
    _, components = msgspec.json.schema_components(
        [*shapes, Refusal, Problem], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": title, "version": __version__},
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"bearer": []}],
        }
    )


def _operation(route: Route, components: dict[str, dict[str, object]]) -> dict[str, object]:
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": route.handler.__name__,
        "responses": {str(status): _answer(route, status) for status in statuses(route)},
    }
    if route.is_public:
        operation["security"] = []
    parameters: list[object] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": ROLE_SCHEMA}
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
            "required": bool(components[route.body.__name__]["required"]),  # else none is `{}`
            "content": {"application/json": {"schema": _reference(route.body)}},
        }
    return operation


def statuses(route: Route) -> list[int]:
    """Every status that the route may answer with, but for 500."""
    common = (400,) if route.is_public else _EVERY
    with_body = (413,) if route.body is not None else ()
    return sorted({200, *common, *with_body, *route.refusals})


def _answer(route: Route, status: int) -> dict[str, object]:
    """One of a route's answers."""
    if status == 200:
        schema = {} if route.answer is None else {"schema": _reference(route.answer)}
        content = {t: schema if t == "application/json" else {} for t in route.media_types}
        headers = dict.fromkeys(route.headers, False)
    else:
        content = {
            "application/json": {"schema": _reference(Refusal)},
            "application/problem+json": {"schema": _reference(Problem)},
        }
        headers = _HEADERS.get(status, {})
    return {
        "description": "OK" if status == 200 else _SENTENCES[status],
        "content": content,
        "headers": {
            name: {"required": always, "schema": {"type": "string"}}
            for name, always in {"X-Request-Id": True, **headers}.items()
        },
    }


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}
