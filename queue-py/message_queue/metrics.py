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

PREFIX = "queue"
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
    requests: int = 0
    errors: int = 0
    produced: int = 0
    delivered: int = 0
    redelivered: int = 0
    acked: int = 0
    dead_lettered: int = 0
    forwarded: int = 0
    damaged_records: int = 0
    peer_frames_sent: int = 0
    peer_messages_sent: int = 0
    peer_messages_dropped: int = 0
    peers_connected: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    """How often the replication said what (elections, losses, …)."""
    stored_ms: Latency = field(default_factory=Latency)
    """From the owner's side: asked to stored on a majority (produce, ack, settings)."""

    def as_json(self) -> dict[str, object]:
        return {
            "requests": self.requests,
            "errors": self.errors,
            "messages_produced": self.produced,
            "messages_delivered": self.delivered,
            "messages_redelivered": self.redelivered,
            "messages_acked": self.acked,
            "messages_dead_lettered": self.dead_lettered,
            "operations_forwarded": self.forwarded,
            "damaged_records": self.damaged_records,
            "peer_frames_sent": self.peer_frames_sent,
            "peer_messages_sent": self.peer_messages_sent,
            "peer_messages_dropped": self.peer_messages_dropped,
            "peers_connected": self.peers_connected,
            "replication": dict(sorted(self.notes.items())),
            "latency_ms": {"stored": self.stored_ms.percentiles()},
        }

    def as_prometheus(self) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Scrape(self))
        return generate_latest(registry)


_GAUGES = frozenset({"peers_connected"})


class _Scrape(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        for name, value in self._metrics.as_json().items():
            if isinstance(value, int):
                family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
                yield family(f"{PREFIX}_{name}", name.replace("_", " "), value=value)
        replication = CounterMetricFamily(
            f"{PREFIX}_replication", "what the replication went through", labels=["event"]
        )
        for name, count in self._metrics.notes.items():
            replication.add_metric([name], count)
        yield replication
        latency = GaugeMetricFamily(
            f"{PREFIX}_latency_ms", "recent latency", labels=["of", "quantile"]
        )
        for quantile, ms in self._metrics.stored_ms.percentiles().items():
            latency.add_metric(["stored", quantile], ms)
        yield latency
