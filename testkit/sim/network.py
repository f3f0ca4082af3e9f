"""A datagram network between named nodes that delays, reorders, duplicates, loses and cuts.

A link is an ordered pair: a->b and b->a fail apart, as they do behind one TCP proxy each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from testkit.sim.clock import Clock

Deliver = Callable[[str, str, Any], None]
Predicate = Callable[[str, str, Any], bool]


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How one direction of one link behaves; probabilities are per message.

    `slow` of the messages take up to `slow_ms` instead, which is what reorders across round trips.
    `fifo` keeps the order of sending (a TCP stream without reconnects).
    """

    delay_ms: tuple[float, float] = (0.1, 2.0)
    slow: float = 0.02
    slow_ms: float = 50.0
    drop: float = 0.0
    duplicate: float = 0.0
    fifo: bool = False


PERFECT = LinkSettings(delay_ms=(0.1, 0.1), slow=0.0, fifo=True)
ROUGH = LinkSettings(delay_ms=(0.1, 5.0), slow=0.05, slow_ms=100.0, drop=0.02, duplicate=0.02)


class _Link:
    __slots__ = ("cut", "last_arrival_us", "last_delivered", "sent", "settings")

    def __init__(self, settings: LinkSettings) -> None:
        self.settings = settings
        self.cut = False
        self.sent = 0
        self.last_delivered = 0
        self.last_arrival_us = 0


class DropRule:
    """A targeted loss: messages that match `predicate` vanish, at most `times` of them."""

    __slots__ = ("hits", "predicate", "times")

    def __init__(self, predicate: Predicate, times: int | None) -> None:
        self.predicate = predicate
        self.times = times
        self.hits = 0

    def takes(self, source: str, target: str, message: Any) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        if not self.predicate(source, target, message):
            return False
        self.hits += 1
        return True


class Network:
    """Carries messages by reference: they must be immutable, or pass through `wire`.

    `wire` (for example `lambda m: decode(encode(m))`) makes every message cross the real codec.
    `counters` says what happened: sent, delivered, dropped, duplicated, cut, reordered, targeted.
    """

    def __init__(
        self,
        clock: Clock,
        rng: Random,
        names: Sequence[str],
        deliver: Deliver,
        settings: LinkSettings | None = None,
        wire: Callable[[Any], Any] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.counters: Counter[str] = Counter()
        self._clock = clock
        self._rng = rng
        self._deliver = deliver
        self._wire = wire
        default = settings or LinkSettings()
        self._links = {(a, b): _Link(default) for a in self.names for b in self.names}
        self._rules: list[DropRule] = []

    # -- traffic ---------------------------------------------------------------------------------

    def send(self, source: str, target: str, message: Any) -> None:
        """Hand a message to the link; whether and when it arrives is the link's business."""
        link = self._links[source, target]
        link.sent += 1
        counters, rng, settings = self.counters, self._rng, link.settings
        counters["sent"] += 1
        if link.cut:
            counters["cut"] += 1
            return
        if settings.drop and rng.random() < settings.drop:
            counters["dropped"] += 1
            return
        if self._rules and any(rule.takes(source, target, message) for rule in self._rules):
            counters["targeted"] += 1
            return
        if self._wire is not None:
            message = self._wire(message)
        self._schedule(source, target, link, message)
        if settings.duplicate and rng.random() < settings.duplicate:
            counters["duplicated"] += 1
            self._schedule(source, target, link, message)

    def _schedule(self, source: str, target: str, link: _Link, message: Any) -> None:
        settings, rng = link.settings, self._rng
        low, high = settings.delay_ms
        if settings.slow and rng.random() < settings.slow:
            high = settings.slow_ms
        arrival_us = self._clock.now_us + int((low + (high - low) * rng.random()) * 1000)
        if settings.fifo:
            arrival_us = max(arrival_us, link.last_arrival_us)
            link.last_arrival_us = arrival_us
        self._clock.call_at(arrival_us, self._arrive, source, target, link, link.sent, message)

    def _arrive(self, source: str, target: str, link: _Link, number: int, message: Any) -> None:
        # A cut also kills what is in flight: bytes inside a reset connection never arrive.
        if link.cut:
            self.counters["cut"] += 1
            return
        self.counters["delivered"] += 1
        if number < link.last_delivered:
            self.counters["reordered"] += 1
        link.last_delivered = number
        self._deliver(source, target, message)

    # -- faults ----------------------------------------------------------------------------------

    def configure(
        self,
        settings: LinkSettings,
        sources: Iterable[str] | None = None,
        targets: Iterable[str] | None = None,
    ) -> None:
        """Give new settings to the links from `sources` to `targets` (None means all)."""
        targets = None if targets is None else tuple(targets)
        for source in self.names if sources is None else sources:
            for target in self.names if targets is None else targets:
                self._links[source, target].settings = settings

    def cut(self, source: str, target: str, *, one_way: bool = False) -> None:
        """Nothing passes from `source` to `target` (nor back, unless `one_way`)."""
        self._links[source, target].cut = True
        if not one_way:
            self._links[target, source].cut = True

    def heal(self, source: str, target: str) -> None:
        """Undo `cut` in both directions."""
        self._links[source, target].cut = False
        self._links[target, source].cut = False

    def isolate(self, name: str) -> None:
        """Cut every link of one node, both ways."""
        for other in self.names:
            if other != name:
                self.cut(name, other)

    def partition(self, *groups: Iterable[str]) -> None:
        """Only nodes of one group hear each other; nodes not named are groups of their own."""
        side = {name: number for number, group in enumerate(groups) for name in group}
        for a in self.names:
            for b in self.names:
                same = a == b or (a in side and b in side and side[a] == side[b])
                self._links[a, b].cut = not same

    def heal_all(self) -> None:
        """Undo every cut; settings and targeted drops stay."""
        for link in self._links.values():
            link.cut = False

    def is_cut(self, source: str, target: str) -> bool:
        """True if nothing passes from `source` to `target` now."""
        return self._links[source, target].cut

    def drop_if(self, predicate: Predicate, times: int | None = None) -> DropRule:
        """Lose messages for which `predicate(source, target, message)`; `times` bounds it."""
        rule = DropRule(predicate, times)
        self._rules.append(rule)
        return rule

    def remove(self, rule: DropRule) -> None:
        """Take a targeted drop back."""
        self._rules.remove(rule)
