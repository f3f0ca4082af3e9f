"""Every metric's name in one place.

The hot path touches plain integers; Prometheus families are built only when somebody scrapes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "lock"
_RECENT = 4096


class Latency:
    """Percentiles over the most recent 4096 observations, in milliseconds."""

    __slots__ = ("_at", "_ms", "count")

    def __init__(self) -> None:
        self._ms = array("d")
        self._at = 0
        self.count = 0

    def observe(self, ms: float) -> None:
        self.count += 1
        if len(self._ms) < _RECENT:
            self._ms.append(ms)
        else:
            self._ms[self._at] = ms
            self._at = (self._at + 1) % _RECENT

    def percentiles(self) -> dict[str, float]:
        """`{"p50": ms, "p95": ms, "p99": ms}`; zeros before the first observation."""
        ms = sorted(self._ms) or [0.0]
        return {f"p{q}": round(ms[min(len(ms) - 1, len(ms) * q // 100)], 3) for q in (50, 95, 99)}


@dataclass(slots=True)
class Metrics:
    # counters
    requests: int = 0
    errors: int = 0
    commands: int = 0  # applied here, whoever proposed them
    batches: int = 0  # log entries that carried them
    grants: int = 0
    waits: int = 0
    releases: int = 0
    timeouts: int = 0
    deadlocks: int = 0
    leases_expired: int = 0
    grants_reaped: int = 0
    elections_won: int = 0
    leaderships_lost: int = 0
    snapshots: int = 0
    peer_frames_sent: int = 0
    peer_messages_sent: int = 0
    peer_messages_dropped: int = 0
    # gauges
    is_leader: int = 0
    term: int = 0
    applied_index: int = 0
    locks: int = 0
    waiters: int = 0
    peers_connected: int = 0
    commit_ms: Latency = field(default_factory=Latency)  # proposed until applied, on the leader

    def as_json(self) -> dict[str, object]:
        numbers: dict[str, object] = {name: getattr(self, name) for name in (*COUNTERS, *GAUGES)}
        return {**numbers, "latency_ms": {"commit": self.commit_ms.percentiles()}}

    def as_prometheus(self) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Scrape(self))
        return generate_latest(registry)


GAUGES = ("is_leader", "term", "applied_index", "locks", "waiters", "peers_connected")
COUNTERS = tuple(
    name for name in Metrics.__dataclass_fields__ if name not in (*GAUGES, "commit_ms")
)


class _Scrape(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        for name in COUNTERS:
            value = getattr(self._metrics, name)
            yield CounterMetricFamily(f"{PREFIX}_{name}", name.replace("_", " "), value=value)
        for name in GAUGES:
            value = getattr(self._metrics, name)
            yield GaugeMetricFamily(f"{PREFIX}_{name}", name.replace("_", " "), value=value)
        latency = GaugeMetricFamily(
            f"{PREFIX}_latency_ms", "recent latency", labels=["of", "quantile"]
        )
        for quantile, ms in self._metrics.commit_ms.percentiles().items():
            latency.add_metric(["commit", quantile], ms)
        yield latency
