"""Looking inside a node, for people: /lines, /directory, /metrics, /status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from mesi_cache import __version__, metrics
from mesi_cache.clock import now_ms
from mesi_cache.config import Config
from mesi_cache.core.cache.table import LETTER
from mesi_cache.core.directory.entry import Entry
from mesi_cache.core.machine import Machine
from mesi_cache.core.numbers import counter_of, epoch_of
from mesi_cache.core.records import Record
from mesi_cache.core.step import Unavailable
from mesi_cache.metrics import Metrics
from mesi_cache.storage.main_memory import MainMemory
from mesi_cache.storage.store import StoreUnavailable
from mesi_cache.transport.wire import AskEntry, TellEntry, Wire

ASK_S = 2.0
MOST_ANSWERING = 1_000


class Inside:
    """What one node can tell of itself, and of a key's home wherever that is."""

    def __init__(
        self,
        config: Config,
        machine: Machine,
        memory: MainMemory,
        counters: Metrics,
        send: Callable[[str, Wire], None],
    ) -> None:
        self._config = config
        self._machine = machine
        self._memory = memory
        self._metrics = counters
        self._send = send
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._next_ask = 1

    def lines(self) -> list[dict[str, object]]:
        now = now_ms()
        return [
            {
                "key": line.key,
                "state": LETTER[line.state],
                "version": line.record.version,
                "lease_left_ms": int(line.lease_left_ms(now)),
            }
            for line in self._machine.cache.lines.in_order()
        ]

    def metrics_json(self) -> dict[str, object]:
        states = {"M": 0, "E": 0, "S": 0}
        lines = self._machine.cache.lines
        for line in lines.values():
            states[LETTER[line.state]] += 1
        return metrics.as_json(
            self._metrics, self._machine.counts, len(lines), self._config.capacity, states
        )

    def status(self, connected: frozenset[str], *, ready: bool) -> dict[str, object]:
        return {
            "id": self._config.node_id,
            "url": self._config.url,
            "members": list(self._config.members),
            "peers_connected": sorted(connected),
            "epoch": self._machine.epoch,
            "lines": len(self._machine.cache.lines),
            "capacity": self._config.capacity,
            "keys_in_directory": len(self._machine.directory.entries),
            "lease_ms": self._config.lease_ms,
            "policy": self._config.policy,
            "write_policy": self._config.write_policy,
            "store_trouble": self._memory.trouble or None,
            "ready": ready,
            "version": __version__,
        }

    # --- the directory ------------------------------------------------------------------------

    async def directory(self, key: str) -> dict[str, object] | Unavailable:
        """The home's entry of `key`."""
        home = self._machine.placement.home(key)
        if home == self._config.url:
            return await self._entry(key)
        number = self._next_ask
        self._next_ask += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._send(home, AskEntry(key, number))
            async with asyncio.timeout(ASK_S):
                entry: dict[str, object] = msgspec.json.decode(await future)
            if "unavailable" in entry:
                return Unavailable(True, str(entry["unavailable"]))
            return entry
        except TimeoutError:
            return Unavailable(True, f"The key's home {home} does not answer")
        finally:
            self._asked.pop(number, None)

    def on_ask(self, source: str, ask: AskEntry) -> None:
        """A peer's client wants to see one of our entries."""
        if len(self._answering) < MOST_ANSWERING:
            task = asyncio.ensure_future(self._answer(source, ask))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    def on_tell(self, tell: TellEntry) -> None:
        future = self._asked.get(tell.request)
        if future is not None and not future.done():
            future.set_result(tell.entry)

    async def _answer(self, source: str, ask: AskEntry) -> None:
        entry = await self._entry(ask.key)
        if isinstance(entry, Unavailable):
            entry = {"unavailable": entry.reason}
        self._send(source, TellEntry(ask.request, msgspec.json.encode(entry)))

    async def _entry(self, key: str) -> dict[str, object] | Unavailable:
        """This home's view of `key`: what is in memory, or else what the store has. A deleted or
        absent key is at version 0, as a client sees it."""
        entry = self._machine.directory.entries.get(key)
        if entry is None or entry.state in ("N", "BUSY_LOAD"):
            record = await self._memory.peek(key)
            entry = self._machine.directory.entries.get(key) or entry  # it may be there by now
            if isinstance(record, StoreUnavailable):
                return Unavailable(True, f"The store does not answer: {record}")
        else:
            record = entry.record
        return _shown(key, self._name(self._config.url), entry, record, self._name)

    def _name(self, url: str) -> str:
        return self._machine.names.get(url, url)


def _shown(
    key: str, home: str, entry: Entry | None, record: Record | None, name: Callable[[str], str]
) -> dict[str, object]:
    answer: dict[str, object] = {
        "key": key, "home": home, "state": "U", "owner": None, "sharers": [],
        "version": record.version if record is not None and record.value is not None else 0,
        "transaction": None,
    }  # fmt: skip
    if entry is None:
        return answer
    copies = {name(url): copy.state for url, copy in entry.copies.items()}
    answer["state"] = "U" if entry.state == "N" else str(entry.state)
    answer["owner"] = next((who for who, state in copies.items() if state != "S"), None)
    answer["sharers"] = [who for who, state in copies.items() if state == "S"]
    current = entry.current
    if current is not None:
        answer["transaction"] = {
            "by": name(current.source),
            "request": type(current.message).__name__,
            "epoch": epoch_of(entry.number),
            "number": counter_of(entry.number),
            "waits_for": [name(url) for url in entry.waits],
            "queued": len(entry.queue),
        }
    return answer
