"""An answer as bytes, the same that aiohttp writes for `errors.py` and the handlers: the status
line, their headers in their order, the body (tests/unit/test_express_queue.py compares)."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

import msgspec

from message_queue.api.errors import ApiError

_encode = msgspec.json.Encoder().encode
_FIRST = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Answers:
    """Knows the date of this second."""

    __slots__ = ("_date", "_date_s")

    def __init__(self) -> None:
        self._date = b""
        self._date_s = 0

    def whole(self, status: int, request_id: bytes, body: bytes, more: bytes = b"") -> bytes:
        """A JSON answer; without a body when `status` says so (204). `more`: header lines."""
        now_s = int(time.time())
        if now_s != self._date_s:
            self._date_s, self._date = now_s, formatdate(now_s, usegmt=True).encode()
        if status == 204:
            return (
                b"%bX-Request-Id: %b\r\nServer: message-queue\r\n"
                b"X-Content-Type-Options: nosniff\r\nDate: %b\r\n\r\n"
                % (_FIRST[status], request_id, self._date)
            )
        return (
            b"%b%bContent-Type: application/json\r\nX-Request-Id: %b\r\nServer: message-queue\r\n"
            b"X-Content-Type-Options: nosniff\r\nContent-Length: %d\r\nDate: %b\r\n\r\n%b"
            % (_FIRST[status], more, request_id, len(body), self._date, body)
        )

    def refusal(self, error: ApiError, request_id: bytes) -> bytes:
        """An error, as the middleware words it for who did not ask for problem+json."""
        headers = error.headers or {}
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        body = _encode({"error": error.error, **error.details})
        return self.whole(error.status, request_id, body, more)
