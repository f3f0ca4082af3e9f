"""Log lines on stderr: one readable line each, or one JSON object each. No secret, ever."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from mesi_cache.core.step import Transition

TRANSITIONS_PER_S = 50

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


# Which transitions a person wants to see, and under which word.
_WORDS = {
    "inv": "INVALIDATE",
    "fetch_drop": "INVALIDATE",
    "refused": "INVALIDATE",
    "lost": "INVALIDATE",
    "fetch_keep": "DOWNGRADE",
    "data_s": "FILL",
    "data_e": "FILL",
    "data_m": "MODIFY",
    "data_dead": "USE-ONCE",
    "commit": "MODIFY",
    "evict": "EVICT",
    "erased": "ERASE",
}


class Narrator:
    """Tells what happens to the lines: `INVALIDATE key=city S->I from=nodeA`.

    At most TRANSITIONS_PER_S lines a second: logging must not be what a busy node does.
    """

    def __init__(self, publish: Callable[..., None], level: int = logging.INFO) -> None:
        """`publish` feeds the event stream."""
        self._publish = publish
        self._level = level
        self._log = logging.getLogger("mesi_cache.transitions")
        self._window_s = 0.0
        self._left = 0
        self._skipped = 0

    def tell(self, note: Transition) -> None:
        word = _WORDS.get(note.event)
        if word is None and note.event == "store" and note.before == "S":
            word = "UPGRADE"
        if word is None:
            return
        self._publish("transition", word=word, key=note.key, before=note.before, after=note.after)
        if self._may_log():
            came = f" from={note.origin}" if note.origin else ""
            self._log.log(
                self._level, "%s key=%s %s->%s%s", word, note.key, note.before, note.after, came
            )

    def _may_log(self) -> bool:
        if not self._log.isEnabledFor(self._level):
            return False
        now_s = time.monotonic()
        if now_s >= self._window_s + 1:
            if self._skipped:
                self._log.log(self._level, "… and %d more transitions", self._skipped)
            self._window_s, self._left, self._skipped = now_s, TRANSITIONS_PER_S, 0
        if self._left <= 0:
            self._skipped += 1
            return False
        self._left -= 1
        return True
