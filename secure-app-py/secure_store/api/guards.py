"""What is checked of every authenticated request before its handler runs.

A page in the user's browser must not be able to drive a node on localhost, so a browser request
that changes something, or opens a WebSocket, must come from the node's own origin. Own means an
address that this node was started with: the Host header is no evidence (DNS rebinding makes it
whatever the attacker likes).
"""

from __future__ import annotations

import ipaddress

from aiohttp import web

from secure_store.api.errors import ApiError

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Guards:
    """`origins` are the node's own, e.g. `https://127.0.0.1:8000`."""

    def __init__(self, scheme: str, host: str, port: int) -> None:
        hosts = {host, "localhost", "127.0.0.1", "[::1]"} if _is_local(host) else {host}
        self._origins = frozenset(f"{scheme}://{_bracketed(h)}:{port}" for h in hosts)

    def check(self, request: web.Request, *, is_plain: bool = False) -> None:
        """Raise ApiError 403 for a foreign Origin, 400 for a query key given twice (which a
        plain target has not)."""
        origin = request.headers.get("Origin")
        if origin is not None and origin not in self._origins and _changes_something(request):
            raise ApiError(403, "Cross-origin request refused", origin=origin[:256])
        if not is_plain and "&" in request.query_string:
            query = request.query
            for key in query:
                if len(query.getall(key)) > 1:
                    raise ApiError(400, "Duplicate query parameter", field=key)


def _changes_something(request: web.Request) -> bool:
    return request.method not in _SAFE or "Upgrade" in request.headers


def _is_local(host: str) -> bool:
    """Loopback, or a wildcard that answers on loopback too."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return ip.is_loopback or ip.is_unspecified


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
