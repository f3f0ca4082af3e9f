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

PREFIX = "secure_store"
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
    """Counters; `gauges` are read when somebody scrapes."""

    requests: int = 0
    errors: int = 0
    unauthenticated: int = 0
    forbidden: int = 0
    throttled: int = 0
    gets: int = 0
    writes: int = 0
    writes_degraded: int = 0
    writes_rejected: int = 0
    writes_unknown: int = 0
    audit_refusals: int = 0
    damaged_reads: int = 0
    values_expired: int = 0
    audit_fsyncs: int = 0
    commits: int = 0
    links: int = 0
    gauges: dict[str, int] = field(default_factory=dict)
    request_ms: Latency = field(default_factory=Latency)

    def as_json(self) -> dict[str, object]:
        names = [n for n in Metrics.__dataclass_fields__ if n not in ("gauges", "request_ms")]
        counters: dict[str, object] = {name: getattr(self, name) for name in names}
        latency = {"latency_ms": {"request": self.request_ms.percentiles()}}
        return {**counters, **self.gauges, **latency}

    def as_prometheus(self) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Scrape(self))
        return generate_latest(registry)


class _Scrape(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        for name, value in self._metrics.as_json().items():
            if isinstance(value, int):
                family = GaugeMetricFamily if name in self._metrics.gauges else CounterMetricFamily
                yield family(f"{PREFIX}_{name}", name.replace("_", " "), value=value)
        latency = GaugeMetricFamily(
            f"{PREFIX}_latency_ms", "recent latency", labels=["of", "quantile"]
        )
        for quantile, ms in self._metrics.request_ms.percentiles().items():
            latency.add_metric(["request", quantile], ms)
        yield latency
