"""The plain read of a key, answered in the turn of the loop that brought it.

aiohttp makes a request object, a task, a writer and a look at the route for each request, which
costs more than the read. A `GET /get?key=…` without anything unusual about it needs none of them:
aiohttp's parser has parsed it, and this gives the bytes of its answer, the same as the handler's
(api/operations.get inside api/app.Around).

It answers 200, or nothing: whatever is not allowed, not found, not settled, not plain, or not to be
read here goes the usual way, as if nobody had looked. So there is one place where a refusal is
decided, counted and audited.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from multidict import CIMultiDictProxy

from secure_store.api import reply
from secure_store.api.access import MAX_TOKEN_CHARACTERS
from secure_store.api.errors import new_request_id
from secure_store.api.keys import Service
from secure_store.core.kv import Damaged
from secure_store.metrics import Metrics

PLAIN_GET = re.compile(r"/get\?key=([A-Za-z0-9/._~:@-]{1,256})")
# Headers that would change the answer, or what is to be done before it.
_UNUSUAL = ("X-Read-From", "X-Request-Id", "Expect", "Upgrade", "Content-Length", "Origin")

Headers = CIMultiDictProxy[str]
RawHeaders = tuple[tuple[bytes, bytes], ...]


def plain_token(headers: Headers) -> str | None:
    """The token of a request that has nothing else to say; None: the usual way."""
    if any(name in headers for name in _UNUSUAL):
        return None
    given = headers.getall("Authorization", ())
    if len(given) != 1:
        return None
    scheme, _, token = given[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_CHARACTERS:
        return None
    return token


class Express:
    """`get(path, token, addr)` gives the whole answer, or None: the usual way."""

    def __init__(self, service: Service, metrics: Metrics, action: str) -> None:
        self._service = service
        self._metrics = metrics
        self._action = action
        self._clock = time.perf_counter_ns

    def get(self, path: str, token: str, addr: str) -> bytes | None:
        asked = PLAIN_GET.fullmatch(path)
        if asked is None or ".." in path:
            return None
        began_ns = self._clock()
        key = asked[1]
        service = self._service
        audit = service.audit
        if audit.unavailable() is not None or service.is_unsettled():
            return None
        principal = service.authenticate(token)
        if principal is None or principal.uses_left >= 0:
            return None
        if not service.allows(principal, "read", key):
            return None
        try:
            found = service.read(key, None)
        except Damaged:
            return None
        if found is None:
            return None
        version, text = found
        request_id = new_request_id()
        audit.note_read(self._action, addr, request_id, principal.name, service.audit_key(key))
        body = b'{"key":"%s","value":%s}' % (key.encode(), text)
        metrics = self._metrics
        metrics.requests += 1
        more = reply.DEGRADED if service.is_degraded() else b""
        answer = reply.head(request_id, len(body), version, more) + body
        metrics.request_ms.observe((self._clock() - began_ns) / 1e6)
        return answer


Remembered = tuple[RawHeaders, str | None]
NOTHING: Remembered = ((), None)
Get = Callable[[str, str, str], bytes | None]
