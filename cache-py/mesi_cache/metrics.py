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

from mesi_cache.core.counts import Counts

PREFIX = "mesi_cache"
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
        return {f"p{q}": round(ms[min(len(ms) - 1, len(ms) * q // 100)], 4) for q in (50, 95, 99)}


@dataclass(slots=True)
class Metrics:
    """What the api and the transport count; the core counts its own (`Counts`)."""

    requests: int = 0
    errors: int = 0
    peer_frames_sent: int = 0
    peer_messages_sent: int = 0
    peer_messages_dropped: int = 0
    peers_connected: int = 0
    store_failures: int = 0
    hit_ms: Latency = field(default_factory=Latency)
    miss_ms: Latency = field(default_factory=Latency)
    write_ms: Latency = field(default_factory=Latency)

    def latencies(self) -> dict[str, dict[str, float]]:
        kinds = (("hit", self.hit_ms), ("miss", self.miss_ms), ("write", self.write_ms))
        return {name: latency.percentiles() for name, latency in kinds}


def as_json(
    metrics: Metrics, counts: Counts, lines: int, capacity: int, states: dict[str, int]
) -> dict[str, object]:
    """The body of GET /metrics."""
    latency = metrics.latencies()
    return {
        "hits": counts.hits,
        "misses": counts.misses,
        "hit_ratio": round(counts.hits / max(1, counts.hits + counts.misses), 4),
        "reads": counts.reads,
        "writes": counts.writes,
        "invalidations_sent": counts.invalidations_sent,
        "invalidations_received": counts.invalidations_received,
        "writebacks": counts.writebacks,
        "evictions": counts.evictions,
        "upgrades": counts.upgrades,
        "coherence_messages": metrics.peer_messages_sent,
        "lines": lines,
        "capacity": capacity,
        "states": states,
        "latency_ms": latency,
        "latency": latency,  # the same by the word that people look for
        "use_once": counts.use_once,
        "refetches": counts.refetches,
        "lease_waits": counts.lease_waits,
        "protocol_ignored": counts.ignored,
        "peer_frames_sent": metrics.peer_frames_sent,
        "peer_messages_dropped": metrics.peer_messages_dropped,
        "peers_connected": metrics.peers_connected,
        "store_failures": metrics.store_failures,
        "requests": metrics.requests,
        "errors": metrics.errors,
    }


def as_prometheus(values: dict[str, object]) -> bytes:
    """`as_json`'s values as Prometheus text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scrape(values))
    return generate_latest(registry)


_GAUGES = frozenset({"hit_ratio", "lines", "capacity", "peers_connected"})


class _Scrape(Collector):
    def __init__(self, values: dict[str, object]) -> None:
        self._values = values

    def collect(self) -> Iterable[Metric]:
        for name, value in self._values.items():
            if isinstance(value, int | float):
                family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
                yield family(f"{PREFIX}_{name}", name.replace("_", " "), value=value)
            elif name == "states" and isinstance(value, dict):
                states = GaugeMetricFamily(f"{PREFIX}_states", "lines by state", labels=["state"])
                for state, count in value.items():
                    states.add_metric([state], count)
                yield states
            elif name == "latency_ms" and isinstance(value, dict):
                latency = GaugeMetricFamily(
                    f"{PREFIX}_latency_ms", "recent latency", labels=["of", "quantile"]
                )
                for kind, percentiles in value.items():
                    for quantile, ms in percentiles.items():
                        latency.add_metric([kind, quantile], ms)
                yield latency
