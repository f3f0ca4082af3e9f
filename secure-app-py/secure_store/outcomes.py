"""What comes back to the client's user: typed errors, values, and one node's answer."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec


class SecureError(Exception):
    """Base of all errors of this client."""


class Refused(SecureError):
    """The request itself is refused; `status` and `body` of the answer."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status}: {body.get('error', 'refused')}")
        self.status = status
        self.body = body


class Unauthenticated(Refused):
    """401: the token is unknown, expired, used up or revoked."""


class Forbidden(Refused):
    """403: the token's roles do not allow this."""


class NotFound(Refused):
    """404: there is no such key, version, token or role."""


class Conflict(Refused):
    """409: `expected_version` is not the current one (`current_version`), or a promotion is
    refused."""

    @property
    def current_version(self) -> int | None:
        return self.body.get("current_version")


class Unavailable(SecureError):
    """No answer in time. If not `definite`, a write may have happened, or still happen."""

    def __init__(self, message: str, *, definite: bool) -> None:
        super().__init__(message)
        self.definite = definite


class Untrusted(SecureError):
    """A node could not prove that it is one of ours; nothing was sent to it."""


_REFUSALS = {401: Unauthenticated, 403: Forbidden, 404: NotFound, 409: Conflict}


class Entry(msgspec.Struct, frozen=True):
    """A value and its version."""

    value: Any
    version: int


class Written(msgspec.Struct, frozen=True):
    """A decided write. `degraded`: it is on one disk only, because the replica is away."""

    version: int | None
    degraded: bool


class Change(msgspec.Struct, frozen=True):
    """One event of a watch. `kind`: set, delete, undelete, destroy, or lost (some were missed:
    read again what matters)."""

    kind: str
    key: str = ""
    version: int = 0
    value: Any = None
    id: str = ""


class NewToken(msgspec.Struct, frozen=True):
    """A token that was made; this is the only time that it is shown."""

    token: str
    accessor: str
    expires_ms: int | None = None

    def __repr__(self) -> str:
        return f"NewToken(accessor={self.accessor!r})"


class Broken(Exception):
    """A try without an answer. `definite`: the request was not even sent."""

    def __init__(self, message: str, *, definite: bool) -> None:
        super().__init__(message)
        self.definite = definite


class Answer:
    """What a node said."""

    def __init__(self, response: aiohttp.ClientResponse, raw: bytes) -> None:
        self.status = response.status
        self.degraded = response.headers.get("X-Replication") == "degraded"
        retry = response.headers.get("Retry-After", "")
        self.retry_after_s = float(retry) if retry.isascii() and retry.isdigit() else 0.0
        etag = response.headers.get("ETag", "").strip('"')
        self.version = int(etag) if etag.isascii() and etag.isdigit() else None
        try:
            decoded = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            decoded = None
        self.body: dict[str, Any] = decoded if isinstance(decoded, dict) else {}


def refusal(answer: Answer) -> Refused:
    return _REFUSALS.get(answer.status, Refused)(answer.status, answer.body)
