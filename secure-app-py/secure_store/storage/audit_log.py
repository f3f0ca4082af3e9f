"""The audit log at work: a thread that chains, writes and fsyncs lines, many requests to one fsync.

An *urgent* line (a denial, a write) is durable before its request is answered; other lines are
gathered for a moment and are durable soon after. If no sink can be written, `unavailable()` says so
and the api refuses requests; the lines that could not be written wait for the disk, none is lost.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from secure_store.config import ConfigError
from secure_store.core.audit import Entry, Head, make_line
from secure_store.storage.audit_files import Sink, raw_lines, read_end, set_torn_aside
from secure_store.storage.keyring import Keyring

GATHER_S = 0.02
RETRY_S = 0.2
MAX_WAITING = 50_000
HUNG_AFTER_S = 0.9


class AuditUnavailable(Exception):
    """No sink can be written: the request must be refused."""


@dataclass(slots=True)
class _Waiting:
    action: str
    addr: str
    outcome: str
    request_id: str
    status: int
    at_s: float
    who: str
    key: str
    detail: str
    durable: asyncio.Future[None] | None


class AuditLog:
    """Used on the event loop; the thread is its own."""

    def __init__(
        self,
        node_id: str,
        log_id: str,
        keyring: Keyring,
        paths: tuple[Path, ...],
        *,
        on_state: Callable[[str | None], None],
    ) -> None:
        self._node_id = node_id
        self._log_id = log_id
        self._key = keyring.audit_mac_key
        self._signer = keyring.signer
        self._sinks = [Sink(path) for path in paths]
        self._on_state = on_state  # (failure or None) on the loop, when it changes
        self._lock = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._urgent = False
        self._stopping = False
        self._busy_since: float | None = None  # monotonic, of the oldest line not yet durable
        self._failure: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = self._recover(
            paths
        )  # (seq, mac) of the last durable line; one object, one store
        self._signed = Head(log_id, "", node_id, -1)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self.fsyncs = 0
        self._second: tuple[int, str] = (-1, "")

    def _recover(self, paths: tuple[Path, ...]) -> tuple[int, bytes]:
        """Continue the chain where the longest sink ends; mend torn ends and shorter sinks."""
        self.torn = 0
        self.misfit = False
        try:
            ends = [read_end(path, self._key) for path in paths]
            for path, end in zip(paths, ends, strict=True):
                if end.torn:
                    set_torn_aside(path, end.torn)
                    self.torn += len(end.torn)
                self.misfit = self.misfit or not end.fits
            best = max(range(len(ends)), key=lambda i: ends[i].seq)
            for i, sink in enumerate(self._sinks):
                sink.open()
                if ends[i].seq < ends[best].seq:
                    lines = list(raw_lines(paths[best]))[ends[i].seq :]
                    if not sink.write(b"".join(lines)):
                        raise ConfigError(f"audit file {sink.failure}")
        except OSError as e:
            raise ConfigError(f"audit file {e.filename}: {e.strerror or e}") from None
        return ends[best].seq, ends[best].mac

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def seq(self) -> int:
        """The last durable entry."""
        return self._end[0]

    def stop(self) -> None:
        """Write what is waiting, then end the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join(2.0)

    # --- on the event loop --------------------------------------------------------------------

    def unavailable(self) -> str | None:
        """Why no request may be served now, or None. A hung disk counts after 0.9 s."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > HUNG_AFTER_S:
            return self._failure or "the audit disk hangs"
        if self._failure is not None:
            return self._failure
        return "too many lines are waiting" if len(self._waiting) > MAX_WAITING else None

    def note(
        self,
        action: str,
        *,
        addr: str,
        outcome: str,
        request_id: str,
        status: int,
        who: str,
        key: str = "",
        detail: str = "",
        urgent: bool = False,
    ) -> asyncio.Future[None] | None:
        """Add one line; an urgent one gives a future that is done when it is durable."""
        durable = None
        if urgent and self._loop is not None:
            durable = self._loop.create_future()
        line = _Waiting(
            action, addr, outcome, request_id, status, time.time(), who, key, detail, durable
        )
        with self._lock:
            self._waiting.append(line)
            if self._busy_since is None:
                self._busy_since = time.monotonic()
            if urgent and not self._urgent:
                self._urgent = True
                self._lock.notify()
            elif len(self._waiting) == 1:
                self._lock.notify()
        return durable

    def signed_head(self) -> Head:
        """The end of the durable chain, signed; the same object while it has not moved."""
        seq, mac = self._end
        if self._signed.seq != seq:
            head = Head(self._log_id, mac.hex(), self._node_id, seq)
            signature = self._signer.sign(head.signed_text()).hex()
            self._signed = msgspec.structs.replace(head, signature=signature)
        return self._signed

    # --- on the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            self._write(batch)

    def _take(self) -> list[_Waiting] | None:
        with self._lock:
            while not self._waiting and not self._stopping:
                self._lock.wait()
            if not self._urgent and not self._stopping:
                self._lock.wait(GATHER_S)
            if not self._waiting:
                return None
            batch, self._waiting = self._waiting, []
            self._urgent = False
            return batch

    def _write(self, batch: list[_Waiting]) -> None:
        seq, mac = self._end
        lines: list[bytes] = []
        for each in batch:
            seq += 1
            line, mac = make_line(self._key, mac, self._entry(each, seq))
            lines.append(line)
        data = b"".join(lines)
        good = [sink.write(data) for sink in self._sinks if not sink.hopeless]
        while not any(good):
            self._report("; ".join(s.failure or "" for s in self._sinks) or "no sink")
            self._refuse(batch)
            batch = []
            if self._stopping:
                return
            time.sleep(RETRY_S)
            good = [sink.write(b"") for sink in self._sinks]
        self.fsyncs += 1
        self._end = (seq, mac)
        with self._lock:
            self._busy_since = time.monotonic() if self._waiting else None
        self._report(None)
        self._tell([w.durable for w in batch if w.durable is not None], None)

    def _entry(self, each: _Waiting, seq: int) -> Entry:
        whole_s = int(each.at_s)
        if self._second[0] != whole_s:
            stamp = datetime.fromtimestamp(whole_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self._second = (whole_s, stamp)
        ts = f"{self._second[1]}.{int((each.at_s - whole_s) * 1000):03d}Z"
        return Entry(
            action=each.action,
            addr=each.addr,
            detail=each.detail,
            key=each.key,
            node=self._node_id,
            outcome=each.outcome,
            request_id=each.request_id,
            seq=seq,
            status=each.status,
            ts=ts,
            who=each.who,
        )

    def _refuse(self, batch: list[_Waiting]) -> None:
        futures = [w.durable for w in batch if w.durable is not None]
        self._tell(futures, AuditUnavailable("no audit sink can be written"))

    def _report(self, failure: str | None) -> None:
        if failure != self._failure and self._loop is not None:
            self._failure = failure
            self._loop.call_soon_threadsafe(self._on_state, failure)

    def _tell(self, futures: list[asyncio.Future[None]], error: Exception | None) -> None:
        if futures and self._loop is not None:
            self._loop.call_soon_threadsafe(_settle, futures, error)


def _settle(futures: list[asyncio.Future[None]], error: Exception | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
