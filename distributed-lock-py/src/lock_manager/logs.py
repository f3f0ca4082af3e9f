"""Log lines on stderr: one readable line each, or one JSON object each. No secret, ever."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import msgspec

# A client's text in a log line must not start a second line or move a terminal's cursor.
_CONTROL = {c: f"\\x{c:02x}" for c in (*range(32), 127, *range(128, 160), 0x2028, 0x2029)}


def one_line(text: str) -> str:
    return text.translate(_CONTROL)


class _Text(logging.Formatter):
    def __init__(self, node_id: str) -> None:
        super().__init__()
        self._node_id = node_id

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{at} {record.levelname:<7} [{self._node_id}] {one_line(record.getMessage())}"
        if record.exc_info:  # a bug: the traceback is worth more than the one-line rule
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def __init__(self, node_id: str) -> None:
        super().__init__()
        self._node_id = node_id

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "node": self._node_id,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(node_id: str, log_format: str, log_level: str) -> None:
    """Send every logger's lines to stderr in `log_format` (`text` or `json`)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(node_id) if log_format == "json" else _Text(node_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp").setLevel(
        logging.ERROR
    )  # malformed requests are answered, not logged


class Sparing:
    """Says each thing once in a while, however often it happens: a peer that is refused comes back
    five times a second, for as long as it lives."""

    def __init__(self, every_s: float = 60.0, most: int = 64) -> None:
        self._every_s = every_s
        self._most = most  # things that are remembered
        self._said: dict[str, tuple[float, int]] = {}  # when; how often it was kept back since

    def again(self, what: str, now_s: float) -> str | None:
        """The text to log now (with what was kept back), or None."""
        said_s, kept_back = self._said.get(what, (-self._every_s, 0))
        if now_s - said_s < self._every_s:
            self._said[what] = (said_s, kept_back + 1)
            return None
        self._said.pop(what, None)
        if len(self._said) >= self._most:
            del self._said[next(iter(self._said))]
        self._said[what] = (now_s, 0)
        return f"{what} ({kept_back} more times since the last line)" if kept_back else what
