"""One simulated cluster: nodes, their disks and clocks, the network between them.

A node is anything with the four methods of `Node`; it reaches the world only through its `Host`.
Every call into a node passes `World._enter`, where crash, pause and halt are honoured and the
harness checks its invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from testkit.history import History
from testkit.sim import tasks
from testkit.sim.clock import Clock, Timer
from testkit.sim.coverage import Coverage
from testkit.sim.disk import Disk, DiskSettings
from testkit.sim.network import LinkSettings, Network
from testkit.sim.trace import Trace


class Node(Protocol):
    """What a simulated node must do. Optional besides: `on_peer_disconnected(peer)` (a connection
    reset as a hint), `on_sync_failed(token)` (must call `host.halt`), `on_stop()` (SIGTERM)."""

    def start(self, disk: Disk) -> None:
        """Begin from what the disk holds (empty at first)."""

    def on_message(self, source: str, message: Any) -> None:
        """A peer's message."""

    def on_timer(self, name: str) -> None:
        """A timer set with `host.set_timer` is due."""

    def on_sync_done(self, token: Any) -> None:
        """All that was written before `disk.sync(token)` is durable."""


N = TypeVar("N", bound=Node)


class Host:
    """A node's only gate to the world, made anew at every start."""

    __slots__ = (
        "_base_us",
        "_rate_ppm",
        "_timers",
        "_world",
        "alive",
        "disk",
        "name",
        "peers",
        "rng",
    )

    def __init__(self, world: World[Any], name: str, incarnation: int) -> None:
        self._world = world
        self.name = name
        self.peers = tuple(other for other in world.names if other != name)
        self.disk = world.disks[name]
        self.rng = Random(f"{world.seed}/{name}/{incarnation}")
        self.alive = True
        self._timers: dict[str, Timer] = {}
        drift = world.drift_ppm
        self._rate_ppm = 1_000_000 + (self.rng.randint(-drift, drift) if drift else 0)
        self._base_us = self.rng.randint(0, 10**12) if drift else 0

    def now_us(self) -> int:
        """This node's monotonic clock (drifts, and starts anywhere, when clock skew is on)."""
        return self._base_us + self._world.clock.now_us * self._rate_ppm // 1_000_000

    def now_ms(self) -> int:
        """`now_us` in whole milliseconds."""
        return self.now_us() // 1000

    def wall_ms(self) -> int:
        """This node's wall clock, which faults may make jump."""
        return (
            1_700_000_000_000
            + self._world.clock.now_us // 1000
            + self._world.wall_offset_ms[self.name]
        )

    def send(self, target: str, message: Any) -> None:
        """Send a datagram; ignored after this incarnation died."""
        if self.alive:
            world = self._world
            world.trace.add(world.clock.now_us, "send", self.name, "->", target, message)
            world.network.send(self.name, target, message)

    def set_timer(self, name: str, delay_ms: float) -> None:
        """Call `on_timer(name)` after `delay_ms` of this node's clock; replaces that name's."""
        self.cancel_timer(name)
        if self.alive:
            true_ms = delay_ms * 1_000_000 / self._rate_ppm
            self._timers[name] = self._world.clock.call_later(true_ms, self._fire, name)

    def cancel_timer(self, name: str) -> None:
        """Forget a timer; harmless if there is none."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _fire(self, name: str) -> None:
        self._timers.pop(name, None)
        self._world.timer_due(self, name)

    def cover(self, name: str, count: int = 1) -> None:
        """Count a happening for `coverage.require`."""
        self._world.coverage.hit(name, count)

    def log(self, *details: Any) -> None:
        """Add a line to the trace."""
        self._world.trace.add(self._world.clock.now_us, "log", self.name, *details)

    def halt(self, why: str) -> None:
        """Stop this node for good reason (a failed fsync, a corrupt store); it may be restarted."""
        self._world.halt(self, why)

    def retire(self) -> None:
        """The incarnation is over: nothing it does reaches the world any more."""
        self.alive = False
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()


class World(Generic[N]):
    """The cluster of one run; harnesses read `nodes` and may script faults of their own."""

    def __init__(
        self,
        seed: int,
        names: tuple[str, ...],
        build: Callable[[Host], N],
        *,
        check: Callable[[str], None],
        link: LinkSettings | None = None,
        disk: DiskSettings | None = None,
        wire: Callable[[Any], Any] | None = None,
        drift_ppm: int = 0,
        reset_hints: bool = True,
        trace: Trace | None = None,
    ) -> None:
        self.seed = seed
        self.names = names
        self.clock = Clock()
        self.coverage = Coverage()
        self.trace = trace or Trace()
        self.drift_ppm = drift_ppm
        self.rng = Random(f"{seed}/clients")
        self.history = History(clock=lambda: self.clock.now_us)
        self.nodes: dict[str, N] = {}  # running ones, paused included
        self.events = 0
        self.wall_offset_ms = dict.fromkeys(names, 0)
        self.network = Network(
            self.clock, Random(f"{seed}/network"), names, self._arrived, link, wire
        )
        self.disks = {
            name: Disk(self.clock, Random(f"{seed}/disk/{name}"), self._on_sync(name), disk)
            for name in names
        }
        self._build = build
        self._check = check
        self._reset_hints = reset_hints
        self._hosts: dict[str, Host] = {}
        self._paused: dict[str, list[tuple[str, Callable[[N], None]]]] = {}
        self._incarnations = dict.fromkeys(names, 0)

    # -- for clients -----------------------------------------------------------------------------

    def node(self, name: str) -> N | None:
        """The running node, or None while it is down."""
        return self.nodes.get(name)

    def tell(self, name: str, action: Callable[[N], None], delay_ms: float = 0.1) -> None:
        """A client's request: run `action(node)` after `delay_ms` if the node is up then.

        It waits while the node is paused and is lost if the node is down: time the reply out.
        """
        self.clock.call_later(delay_ms, self._enter, name, "request", action)

    def promise(self, timeout_ms: float | None = None) -> tasks.Promise:
        """A reply to wait for; TIMED_OUT after `timeout_ms`."""
        return tasks.promise(self.clock, timeout_ms)

    def sleep_ms(self, delay_ms: float) -> tasks.Promise:
        """`await world.sleep_ms(5)`."""
        return tasks.promise(self.clock, delay_ms)

    def spawn(self, coroutine: Coroutine[tasks.Promise, Any, Any]) -> tasks.Promise:
        """Run a client coroutine on the virtual clock."""
        return tasks.spawn(self.clock, coroutine)

    # -- faults ----------------------------------------------------------------------------------

    def is_up(self, name: str) -> bool:
        """True while the process exists (also when paused)."""
        return name in self.nodes

    def is_paused(self, name: str) -> bool:
        """True between pause and resume."""
        return name in self._paused

    def start(self, name: str) -> None:
        """Start a node from its disk; nothing if it runs."""
        if name in self.nodes:
            return
        self._incarnations[name] += 1
        host = Host(self, name, self._incarnations[name])
        self._note("start", name, self._incarnations[name])
        self._hosts[name] = host
        node = self._build(host)
        if not host.alive:  # refused to start (a damaged store)
            return
        self.nodes[name] = node
        self._enter(name, "", lambda started: started.start(host.disk))

    def crash(self, name: str, *, power: bool = False) -> None:
        """kill -9 (`power`: the machine loses power); what the disk does not protect is lost."""
        if name not in self.nodes:
            return
        self._note("crash", name, "power" if power else "process")
        self._down(name)
        self.disks[name].crash(power=power)

    def stop(self, name: str) -> None:
        """SIGTERM: the node's `on_stop()` if it has one, then the end of the process."""
        node = self.nodes.get(name)
        if node is None:
            return
        on_stop = getattr(node, "on_stop", None)
        if on_stop is not None:
            self._enter(name, "stop", lambda _: on_stop())
        self.crash(name)

    def power_cut(self) -> None:
        """Every machine loses power at once."""
        for name in self.names:
            self.crash(name, power=True)

    def start_all(self) -> None:
        """Start every node that is down."""
        for name in self.names:
            self.start(name)

    def pause(self, name: str) -> None:
        """SIGSTOP: messages, timers and syncs wait; the node's clock goes on."""
        if name in self.nodes and name not in self._paused:
            self._note("pause", name)
            self._paused[name] = []

    def resume(self, name: str) -> None:
        """SIGCONT: all that waited happens now, in the order it came."""
        waiting = self._paused.pop(name, None)
        if waiting is not None:
            self._note("resume", name)
            for what, action in waiting:
                self.clock.call_later(0, self._enter, name, what, action, self._hosts[name])

    def wipe(self, name: str) -> None:
        """The node dies and its disk is lost."""
        self.crash(name)
        self._note("wipe", name)
        self.disks[name].wipe()

    def heal_everything(self) -> None:
        """No cut, no pause, no sync about to fail, every node up."""
        self._note("heal")
        self.network.heal_all()
        for name in self.names:
            self.disks[name].heal()
            self.resume(name)
        self.start_all()

    def halt(self, host: Host, why: str) -> None:
        """Called by `Host.halt`."""
        if host.alive:
            self._note("halt", host.name, why)
            self.coverage.hit("halts")
            self._down(host.name)
            self.disks[host.name].crash(power=True)

    # -- events ----------------------------------------------------------------------------------

    def timer_due(self, host: Host, name: str) -> None:
        """Called by a host's timer."""
        self._enter(host.name, "timer " + name, lambda node: node.on_timer(name), host)

    def _arrived(self, source: str, target: str, message: Any) -> None:
        host = self._hosts.get(target)
        if host is None or not host.alive:
            self.network.counters["to_dead"] += 1
            return
        if target in self._paused:
            self._paused[target].append(("deliver", lambda node: node.on_message(source, message)))
            return
        self.trace.add(self.clock.now_us, "deliver", target, "<-", source, message)
        self.events += 1
        self.nodes[target].on_message(source, message)
        self._check(target)

    def _on_sync(self, name: str) -> Callable[[Any, bool], None]:
        def completed(token: Any, ok: bool) -> None:
            if ok:
                self._enter(name, "synced", lambda node: node.on_sync_done(token))
            else:
                self.coverage.hit("failed_syncs")
                self._enter(name, "sync failed", lambda node: self._sync_failed(node, name, token))

        return completed

    def _sync_failed(self, node: N, name: str, token: Any) -> None:
        host = self._hosts[name]
        on_failed = getattr(node, "on_sync_failed", None)
        if on_failed is None:
            host.halt("fsync failed")
            return
        on_failed(token)
        assert not host.alive, f"{name} went on after a failed fsync"

    def _enter(
        self, name: str, what: str, action: Callable[[N], None], host: Host | None = None
    ) -> None:
        """The one way into a node: not when dead, later when paused, checked afterwards."""
        node = self.nodes.get(name)
        if node is None or (host is not None and not host.alive):
            return
        if name in self._paused:
            self._paused[name].append((what, action))
            return
        if what:
            self.trace.add(self.clock.now_us, what, name)
        self.events += 1
        action(node)
        self._check(name)

    def _down(self, name: str) -> None:
        self._hosts[name].retire()
        self.nodes.pop(name, None)
        self._paused.pop(name, None)
        if self._reset_hints:
            for peer in self.names:
                if peer in self.nodes and not self.network.is_cut(name, peer):
                    delay_ms = 0.1 + self.rng.random()
                    self.clock.call_later(delay_ms, self._enter, peer, "reset", _hint(name))

    def _note(self, kind: str, *details: Any) -> None:
        self.trace.add(self.clock.now_us, kind.upper(), *details)


def _hint(dead: str) -> Callable[[Any], None]:
    def tell(node: Any) -> None:
        hear = getattr(node, "on_peer_disconnected", None)
        if hear is not None:
            hear(dead)

    return tell
