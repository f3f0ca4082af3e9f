"""The only file where the rooms meet: event -> core -> persist -> send -> answer.

Everything here runs on one event loop and nothing between an input and its effects awaits, so a
client that hangs up, or a handler that is cancelled, can stop nothing half-way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from mesi_cache import metrics
from mesi_cache.api.events import EventHub
from mesi_cache.api.keys import Listener
from mesi_cache.clock import now_ms
from mesi_cache.config import Config
from mesi_cache.core.cache.table import LETTER
from mesi_cache.core.directory.retries import FULL, REUSED
from mesi_cache.core.machine import Machine
from mesi_cache.core.messages import Backup, GetM, Message
from mesi_cache.core.messages import Hello as CoreHello
from mesi_cache.core.records import Claim, Once, Operation
from mesi_cache.core.settings import Settings
from mesi_cache.core.step import Answer, Changed, Found, Missing, Step, Transition, Unavailable
from mesi_cache.inside import Inside
from mesi_cache.logs import Narrator
from mesi_cache.metrics import Metrics
from mesi_cache.ripening import PATIENCE_MS, Ripening, instead, tellable
from mesi_cache.storage.main_memory import MainMemory
from mesi_cache.storage.store import RESERVED, Loaded, StoreUnavailable
from mesi_cache.transport.links import Hello, Links
from mesi_cache.transport.wire import AskEntry, TellEntry, Wire

log = logging.getLogger(__name__)

MAX_CALLS = 20_000
NAMED_S = 4.5
CLAIM_PREFIX = RESERVED + "once" + RESERVED
CLAIM_MS = 3_600_000  # how long an Idempotency-Key is remembered: an hour
MEMBERS_DIFFER_S = 2.0
HAND_OVER = 10_000
HIT_SAMPLE = 7  # a hit is so quick that timing each would double it: one in eight
STARTUP_GRACE_MS = 20
TICK_S = 0.005


class Node:
    """One member: `api.keys.Service` for the handlers, callbacks for the links and the store."""

    def __init__(
        self,
        config: Config,
        memory: MainMemory,
        counters: Metrics,
        events: EventHub,
        halted: Callable[[], None],
        *,
        transitions_at: int = logging.INFO,
    ) -> None:
        self._config = config
        self._memory = memory
        self._metrics = counters
        self._events = events
        self._halted = halted
        wait_ms = memory.lease_wait_ms
        grants_from_ms = now_ms() + wait_ms + STARTUP_GRACE_MS if wait_ms else 0.0
        self.machine = Machine(
            Settings(config.url, config.capacity, config.lease_ms, policy=config.policy),
            list(config.members),
            memory.epoch,
            applied=memory.restored.applied,
            retries=memory.restored.retries,
            grants_from_ms=grants_from_ms,
        )
        self._cache = self.machine.cache
        self._grants_from_ms = grants_from_ms
        self._links: Links[Wire] | None = None
        self._calls: dict[int, Listener] = {}
        self._drained: asyncio.Future[None] | None = None  # somebody waits until no call is left
        self._ripening = Ripening()
        self._hurry: asyncio.TimerHandle | None = None
        self._own: list[Message] = []  # messages to this member itself
        self._ready_records: list[tuple[str, Loaded]] = []
        self._running_own = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_ms = float("inf")
        self._ids = self.machine.names
        self._ids[config.url] = config.node_id
        self.differ: dict[str, float] = {}  # member -> when its other member list was last seen
        self._watchers: dict[str, list[asyncio.Future[None]]] = {}
        self._stopping = False
        self._narrator = Narrator(events.publish, transitions_at)
        self._inside = Inside(
            config, self.machine, memory, counters, lambda url, m: self._link().send(url, m)
        )

    def start(self, links: Links[Wire]) -> None:
        """Begin to serve. The links may be started afterwards."""
        self._links = links
        self._memory.start(
            on_settled=self._settled,
            on_loaded=self._loaded,
            applied_rows=lambda: list(self.machine.directory.applied.rows()),
            failed=lambda _: self._halt(),
        )
        if self._grants_from_ms:
            loop = asyncio.get_running_loop()
            loop.call_later((self._grants_from_ms - now_ms()) / 1000 + 0.001, self._leases_over)

    # --- what the api asks ----------------------------------------------------------------------

    def lookup(self, key: str) -> Found | None:
        began = now_ms()
        line = self._cache.lookup(key, began)
        if line is None or self.differ:
            return None
        record = line.record
        if record.value is None:
            return None  # cannot be: a slot never holds an absent value
        if self.machine.counts.hits & HIT_SAMPLE == 1:
            self.timed_hit(began)
        return Found(record.value, record.version, LETTER[line.state], True, record.expires_ms)

    def timed_hit(self, began_ms: float) -> None:
        """Take note of how long one hit took that began at `began_ms`."""
        self._metrics.hit_ms.observe(now_ms() - began_ms)

    def begin(self, key: str, operation: Operation | None, listener: Listener) -> None:
        reason = self._refusal(1)
        if reason is not None:
            listener.set_result(Unavailable(True, reason))
            return
        step = self._step()
        self._calls[self._cache.submit(step, key, operation)] = listener
        self._carry_out(step)

    async def read(self, key: str) -> Found | Missing | Unavailable:
        began = now_ms()
        answer = await self._ask(key, None)
        self._metrics.miss_ms.observe(now_ms() - began)
        return _as_read(answer)

    async def change(
        self, key: str, operation: Operation, name: str | None = None
    ) -> Changed | Unavailable:
        began = now_ms()
        if name is None:
            answer = await self._ask(key, operation)
        else:
            try:
                async with asyncio.timeout(NAMED_S):
                    answer = await self._change_once(key, operation, Once.of(name, key, operation))
            except TimeoutError:
                answer = Unavailable(False, "The key's home does not answer")
        self._metrics.write_ms.observe(now_ms() - began)
        return _as_change(answer)

    async def _change_once(self, key: str, operation: Operation, once: Once) -> Answer:
        """The name's own home sees to it that it means one change, the key's home that this change
        happens once."""
        claim = Claim(once.print.encode(), CLAIM_MS)
        (answer,) = await self._ask_many(((CLAIM_PREFIX + once.name, claim),))
        if not isinstance(answer, Changed):
            return Unavailable(True, "The home of the Idempotency-Key does not answer")
        if answer.outcome.value != claim.value:
            return Changed(REUSED)
        (answer,) = await self._ask_many(((key, operation),), once)
        if isinstance(answer, Changed) and answer.outcome == FULL:
            return Unavailable(True, "The key's home remembers too many Idempotency-Keys")
        return answer

    async def read_many(self, keys: Sequence[str]) -> list[Found | Missing | Unavailable]:
        found = [self.lookup(key) for key in keys]
        began = now_ms()
        wanted = [(key, None) for key, hit in zip(keys, found, strict=True) if hit is None]
        answers = iter(await self._ask_many(wanted) if wanted else ())
        self._metrics.miss_ms.observe(now_ms() - began)
        return [hit or _as_read(next(answers)) for hit in found]

    async def change_many(
        self, changes: Sequence[tuple[str, Operation]]
    ) -> list[Changed | Unavailable]:
        began = now_ms()
        answers = await self._ask_many(changes)
        self._metrics.write_ms.observe(now_ms() - began)
        return [_as_change(answer) for answer in answers]

    async def _ask(self, key: str, operation: Operation | None) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.begin(key, operation, future)
        return await future

    async def _ask_many(
        self, asked: Sequence[tuple[str, Operation | None]], once: Once | None = None
    ) -> list[Answer]:
        """All in one turn, so that what goes to one home leaves in one frame."""
        reason = self._refusal(len(asked))
        if reason is not None:
            return [Unavailable(True, reason)] * len(asked)
        step, futures = self._step(), list[asyncio.Future[Answer]]()
        loop = asyncio.get_running_loop()
        for key, operation in asked:
            future: asyncio.Future[Answer] = loop.create_future()
            self._calls[self._cache.submit(step, key, operation, once)] = future
            futures.append(future)
        self._carry_out(step)
        return [await future for future in futures]

    def watch(self, key: str) -> asyncio.Future[None]:
        """Done when the line of `key` next changes its state on this node, which may be never: wait
        with a deadline, and cancel it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watchers = self._watchers.setdefault(key, [])
        watchers.append(future)
        future.add_done_callback(lambda _: self._unwatch(key, future))
        return future

    def _unwatch(self, key: str, future: asyncio.Future[None]) -> None:
        watchers = self._watchers.get(key)
        if watchers is not None and future in watchers:
            watchers.remove(future)
            if not watchers:
                del self._watchers[key]

    def _refusal(self, calls: int) -> str | None:
        if self._stopping:
            return "This node is stopping"
        if len(self._calls) + calls > MAX_CALLS:
            return "Too many requests under way"
        return self._members_differ()

    def lines(self) -> list[dict[str, object]]:
        return self._inside.lines()

    async def directory(self, key: str) -> dict[str, object] | Unavailable:
        return await self._inside.directory(key)

    def metrics_json(self) -> dict[str, object]:
        return self._inside.metrics_json()

    def metrics_prometheus(self) -> bytes:
        return metrics.as_prometheus(self.metrics_json())

    def status(self) -> dict[str, object]:
        connected = self._links.connected if self._links is not None else frozenset[str]()
        return self._inside.status(connected, ready=self.not_ready_because() is None)

    def not_ready_because(self) -> str | None:
        left_ms = self._grants_from_ms - now_ms() if self._grants_from_ms else 0
        if left_ms > 0:
            return f"Waiting {left_ms:.0f} ms for leases from before the restart"
        if self._stopping:
            return "This node is stopping"
        return self._members_differ()

    def _members_differ(self) -> str | None:
        if not self.differ:
            return None
        seen = now_ms() - MEMBERS_DIFFER_S * 1000
        for url in [url for url, at in self.differ.items() if at <= seen]:
            del self.differ[url]
        if not self.differ:
            return None
        return f"Started with other --peers than {', '.join(sorted(self.differ))}"

    # --- what the links tell --------------------------------------------------------------------

    def on_batch(self, hello: Hello, messages: Sequence[Wire]) -> None:
        self._ids[hello.url] = hello.node_id
        step = self._step()
        for message in messages:
            match message:
                case AskEntry():
                    self._inside.on_ask(hello.url, message)
                case TellEntry():
                    self._inside.on_tell(message)
                case GetM() | Backup() if self._memory.overfull:
                    pass  # as if lost: there is no room for what it would change
                case _:
                    self.machine.receive(step, hello.url, hello.incarnation, message)
        self._carry_out(step)

    def on_up(self, hello: Hello) -> None:
        self._metrics.peers_connected += 1
        self._ids[hello.url] = hello.node_id
        self.differ.pop(hello.url, None)
        self._events.publish("peer_up", url=hello.url, id=hello.node_id)
        log.info("link to %s at %s is up", hello.node_id, hello.url)
        step = self._step()
        self.machine.receive(step, hello.url, hello.incarnation, CoreHello())
        self._carry_out(step)

    def on_down(self, url: str) -> None:
        self._metrics.peers_connected -= 1
        self._events.publish("peer_down", url=url)
        log.info("link to %s is down", self._name(url))

    def on_other_members(self, url: str) -> None:
        self.differ[url] = now_ms()

    # --- what the store tells -------------------------------------------------------------------

    def _settled(self) -> None:
        for step in self._ripening.ripe(self._memory.settled):
            self._release(step)

    def _loaded(self, records: Iterable[tuple[str, Loaded]]) -> None:
        step = self._step()
        self._take_in(step, records)
        self._carry_out(step)

    def _take_in(self, step: Step, records: Iterable[tuple[str, Loaded]]) -> None:
        for key, record in records:
            if isinstance(record, StoreUnavailable):
                self._metrics.store_failures += 1
                self.machine.load_failed(step, key)
            else:
                self.machine.loaded(step, key, record)

    def _leases_over(self) -> None:
        log.info("leases from before the restart are over: this home grants again")
        self._tick()
        task = asyncio.ensure_future(self._memory.forget_lease())
        task.add_done_callback(self._check_done)

    def _check_done(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("cannot write to the data directory: %s", task.exception())
            self._halt()

    # --- carrying out what the core decided -----------------------------------------------------

    def _step(self) -> Step:
        return Step(now_ms(), time.time() * 1000)

    def _carry_out(self, step: Step) -> None:
        """Log; then, once the log holds it as the flags demand, everything else, in order."""
        if step.log:
            try:
                position = self._memory.append(step.log)
            except OSError:
                log.exception("cannot write the log: nothing may be told any more")
                self._halt()
                return
        else:
            position = self._ripening.last  # it may tell of what is not durable yet
        if position <= self._memory.settled:
            self._release(step)
            return
        self._answer(tellable(step))
        if not self._ripening.add(position, step):
            self._answer(instead(step))
            self._load(step)
        elif self._hurry is None:
            loop = asyncio.get_running_loop()
            self._hurry = loop.call_later(PATIENCE_MS / 1000, self._hurry_up)
        self._arm()

    def _hurry_up(self) -> None:
        """Nobody waits longer than 5 s, whatever the disk or the store does."""
        self._hurry = None
        self._answer(self._ripening.overdue(now_ms()))
        if len(self._ripening):
            self._hurry = asyncio.get_running_loop().call_later(0.1, self._hurry_up)

    def _release(self, step: Step) -> None:
        for target, message in step.send:
            if target == self._config.url:
                self._own.append(message)
            else:
                self._link().send(target, message)
        self._answer(step.answers)
        if step.notes:
            self._wake_watchers(step.notes)
            # People are told when what was sent in this turn has left.
            asyncio.get_running_loop().call_soon(self._narrate, step.notes)
        self._load(step)
        self._run_own()

    def _wake_watchers(self, notes: Sequence[Transition]) -> None:
        if self._watchers:
            for note in notes:
                for watcher in self._watchers.pop(note.key, ()):
                    if not watcher.done():
                        watcher.set_result(None)

    def _narrate(self, notes: Sequence[Transition]) -> None:
        for note in notes:
            if not note.key.startswith(RESERVED):
                self._narrator.tell(note)

    def _answer(self, answers: Iterable[tuple[int, Answer]]) -> None:
        for token, answer in answers:
            listener = self._calls.pop(token, None)
            if listener is not None and not listener.done():
                listener.set_result(answer)
        if self._drained is not None and not self._calls and not self._drained.done():
            self._drained.set_result(None)

    def _load(self, step: Step) -> None:
        if step.load:
            self._ready_records.extend(self._memory.load(step.load))

    def _run_own(self) -> None:
        """What this member tells itself comes back in, after it was logged like everything else."""
        if self._running_own:
            return  # further up the stack
        self._running_own = True
        try:
            while self._own or self._ready_records:
                step = self._step()
                own, self._own = self._own, []
                for message in own:
                    if self._memory.overfull and isinstance(message, GetM | Backup):
                        continue
                    self.machine.receive(step, self._config.url, self.machine.epoch, message)
                records, self._ready_records = self._ready_records, []
                self._take_in(step, records)
                self._carry_out(step)
        finally:
            self._running_own = False
        self._arm()

    def _arm(self) -> None:
        at_ms = self.machine.next_tick_ms()
        if at_ms < self._timer_at_ms:
            if self._timer is not None:
                self._timer.cancel()
            # Nothing that is timed here needs milliseconds, and a busy node is due all the time.
            delay_s = max(TICK_S, (at_ms - now_ms()) / 1000)
            self._timer_at_ms = at_ms
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at_ms = None, float("inf")
        step = self._step()
        self.machine.tick(step)
        self._carry_out(step)

    def _halt(self) -> None:
        """A promise cannot be kept: stop at once, as after a crash."""
        self._stopping = True
        self._halted()

    # --- the end --------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Refuse new requests, finish those under way, give the lines back, store what is logged.
        Peers that are down are not waited for."""
        self._stopping = True
        if self._calls:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._drained,), timeout=1.0)
        step = self._step()
        self.machine.leave(step, HAND_OVER)
        self._carry_out(step)
        stopping = Unavailable(False, "This node is stopping")
        self._answer([(token, stopping) for token in self._calls])
        for timer in (self._timer, self._hurry):
            if timer is not None:
                timer.cancel()
        self._timer_at_ms = float("-inf")
        await self._memory.stop()

    def _name(self, url: str) -> str:
        return self._ids.get(url, url)

    def _link(self) -> Links[Wire]:
        if self._links is None:
            raise RuntimeError("start() comes first")
        return self._links


def _as_read(answer: Answer) -> Found | Missing | Unavailable:
    if isinstance(answer, Changed):
        raise TypeError("a read was answered as a change")
    return answer


def _as_change(answer: Answer) -> Changed | Unavailable:
    if isinstance(answer, Found | Missing):
        raise TypeError("a change was answered as a read")
    return answer
