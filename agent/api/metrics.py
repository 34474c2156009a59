"""Prometheus metrics of this node, in base units; labels are model, outcome and the like, never text of clients."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from agent.api.host_metrics import HostMetrics
from agent.telemetry.ledger import Answered
from agent.views import NodeView
from agent.wire.frames import Reported
from shared.records import (
    CertificateExpires,
    EngineWindow,
    Event,
    ModelEvicted,
    ModelMissed,
    SwapFinished,
    ThrottleEvent,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # an extra series per counter that nobody reads
_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

_ENGINE = {
    "prefill_tok": ("prefill_tokens", "Prompt tokens computed."),
    "decode_tok": ("decode_tokens", "Tokens generated, delivered or not."),
    "wasted_tok": ("wasted_tokens", "Tokens generated for abandoned requests."),
    "steps": ("steps", "Engine steps; decode tokens divided by steps is the batch occupancy."),
    "queue_us": ("queue_seconds", "Time that prompts waited for their first prefill chunk."),
    "padding_tok": ("padding_tokens", "Padding read by decode steps, in tokens of KV cache."),
    "rebuilds": ("rebuilds", "Batches that failed and were rebuilt."),
    "cache_hits": ("cache_hits", "Prompts with a prefix in the prompt cache."),
    "cache_misses": ("cache_misses", "Prompts without a prefix in the prompt cache."),
    "cache_saved_tok": ("cache_saved_tokens", "Prompt tokens not computed again."),
    "disk_restored_tok": ("disk_restored_tokens", "Prompt tokens whose KV states were restored from disk."),
    "cache_evictions": ("cache_evictions", "Entries evicted from the prompt cache to keep its budget."),
}
_LEVELS = {
    "cache_bytes": "Bytes accounted to the prompt cache.",
    "disk_bytes": "Bytes of prompt cache on disk.",
    "active_bytes": "Active MLX memory in bytes.",
}
_STATUS = (
    ("state", "model_ready", "1 when the model accepts requests here."),
    ("in_flight", "model_in_flight", "Requests that hold a lease."),
    ("waiting", "model_waiting", "Requests that wait for the model."),
    ("footprint_bytes", "loader_resident_bytes", "Resident bytes of the loader."),
    ("need_bytes", "model_planned_bytes", "Bytes planned for the model."),
    ("restarts", "loader_restarts", "Unexpected exits of the loader."),
    ("silent_s", "loader_silent_seconds", "Time since the loader's last progress on pending work."),
)
"""Gauges of the models' status: its field, name, text."""
_PEAKS = {
    "queue_max": "Longest queue in the last closed window.",
    "kv_peak_bytes": "Peak KV cache bytes of running requests in the last closed window, padding included.",
    "peak_bytes": "Peak MLX memory in bytes in the last closed window.",
}


class Metrics:
    """Counts each answered request; reads gauges on scrape. ``host`` holds the machine's metrics."""

    def __init__(
        self, status: Callable[[], Sequence[dict[str, Any]]], peers: Callable[[], Sequence[NodeView]], host: HostMetrics
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(host)
        self.host = host
        labels = ("model", "outcome")
        self._requests = self._counter("requests", "Client requests answered at this node as gateway.", labels)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self._cached = self._counter("cached_tokens", "Prompt tokens found in a prompt cache.")
        self._completion = self._counter("completion_tokens", "Tokens generated for clients.")
        self._retries = self._counter("retries", "Attempts on another node or loader before the first byte.")
        self._continued = self._counter("continuations", "Answers continued by another loader after the first byte.")
        self._latencies = {
            "time_to_first_token_seconds": _Latency("Time from request to first token (TTFT)."),
            "inter_token_latency_seconds": _Latency("Time between two tokens of one answer (ITL)."),
            "request_seconds": _Latency("Time from request to the end of the answer."),
        }
        self._ttft, self._itl, self._total = self._latencies.values()
        self._busy = self._counter("engine_busy_seconds", "Busy time of the engine, by phase.", ("model", "phase"))
        self._engine = {field: self._counter(f"engine_{name}", text) for field, (name, text) in _ENGINE.items()}
        self._levels = {field: self._gauge(f"engine_{field}", text) for field, text in _LEVELS.items()}
        self._peaks = {field: self._gauge(f"engine_{field}", text) for field, text in _PEAKS.items()}
        where = ("place", "category", "outcome")
        self._elsewhere = self._counter("elsewhere_requests", "Requests sent to a place besides the rack.", where)
        self._usd = self._counter("elsewhere_usd", "US dollars that other places charged.", ("place",))
        self._evicted = self._counter("model_evictions", "Models evicted from memory.", ("model", "reason"))
        self._missed = self._counter("model_misses", "First requests for a model after its eviction.")
        self._swaps = self._counter("swaps", "Swaps by outcome.", labels)
        expires = "When a certificate of this node ends, in seconds since 1970."
        self._expires = Gauge(
            "mlxrack_certificate_expires_timestamp_seconds", expires, ("certificate",), registry=self._registry
        )
        self._by_model: dict[str, _ByModel] = {}
        self._registry.register(_Gauges(status, peers))
        self._registry.register(_Histograms(self._latencies))

    def answered(self, one: Answered) -> None:
        """Count one request."""
        if (by_model := self._by_model.get(one.model)) is None:
            # a label lookup costs more than the count
            by_model = self._by_model[one.model] = _ByModel(self, one.model)
        if one.place:
            # another place's tokens and times are no measure of this rack
            self._elsewhere.labels(one.place, one.place_category, one.outcome).inc(one.requests)
            self._usd.labels(one.place).inc(one.usd_micro / 1e6)
        else:
            by_model.count(one)
        self._requests.labels(one.model, one.outcome).inc(one.requests)

    def engine(self, model: str, reported: Reported) -> None:
        """Add what an engine did since its last report."""
        self._busy.labels(model, "prefill").inc(reported.busy_prefill_us / 1e6)
        self._busy.labels(model, "decode").inc(reported.busy_decode_us / 1e6)
        for field, counter in self._engine.items():
            amount = getattr(reported, field)
            counter.labels(model).inc(amount / 1e6 if field.endswith("_us") else amount)
        for field, gauge in self._levels.items():
            gauge.labels(model).set(getattr(reported, field))

    def closed(self, windows: Sequence[EngineWindow]) -> None:
        """Set the peaks of a closed window."""
        for window in windows:
            for field, gauge in self._peaks.items():
                gauge.labels(window.model).set(getattr(window, field))

    def event(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, ModelEvicted):
            self._evicted.labels(event.model, event.reason).inc()
        elif isinstance(event, ModelMissed):
            self._missed.labels(event.model).inc()
        elif isinstance(event, SwapFinished):
            self._swaps.labels(event.model, event.outcome).inc()
        elif isinstance(event, ThrottleEvent):
            self.host.throttled(event)
        elif isinstance(event, CertificateExpires):
            self._expires.labels(event.certificate).set(event.not_after_ms / 1000)

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ("model",)) -> Counter:
        return Counter(f"mlxrack_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"mlxrack_{name}", text, ("model",), registry=self._registry)


class _Counts:
    """One model's values by bucket. The client library's histogram takes one value at a time, and five times as
    long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_LATENCY_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value in seconds, ``times`` times."""
        self.counts[bisect_left(_LATENCY_BUCKETS, value)] += times
        self.sum += value * times


class _Latency:
    """One histogram for every model."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.models: dict[str, _Counts] = {}

    def of(self, model: str) -> _Counts:
        """The counts of one model."""
        return self.models.setdefault(model, _Counts())


class _Histograms(Collector):
    def __init__(self, latencies: Mapping[str, _Latency]) -> None:
        self._latencies = latencies

    def collect(self) -> list[HistogramMetricFamily]:
        found = []
        for name, latency in self._latencies.items():
            family = HistogramMetricFamily(f"mlxrack_{name}", latency.text, labels=["model"])
            for model, one in latency.models.items():
                uppers = [*(floatToGoString(edge) for edge in _LATENCY_BUCKETS), "+Inf"]  # type: ignore[no-untyped-call]
                family.add_metric([model], list(zip(uppers, accumulate(one.counts), strict=True)), one.sum)
            found.append(family)
        return found


class _ByModel:
    """The series of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        counted = ("prompt_tok", "cached_tok", "completion_tok", "retries", "continuations")
        families = (metrics._prompt, metrics._cached, metrics._completion, metrics._retries, metrics._continued)
        self._counters = [(name, family.labels(model)) for name, family in zip(counted, families, strict=True)]
        self._ttft, self._itl, self._total = (one.of(model) for one in (metrics._ttft, metrics._itl, metrics._total))

    def count(self, one: Answered) -> None:
        """Add one request."""
        for name, counter in self._counters:
            if amount := getattr(one, name):
                counter.inc(amount)
        self._total.observe(one.total_us / 1e6)
        if one.ttft_us is not None:
            self._ttft.observe(one.ttft_us / 1e6)
        for gap, times in one.itl_us:
            self._itl.observe(gap / 1e6, times)


class _Gauges(Collector):
    def __init__(self, status: Callable[[], Sequence[dict[str, Any]]], peers: Callable[[], Sequence[NodeView]]) -> None:
        self._status, self._peers = status, peers

    def collect(self) -> list[GaugeMetricFamily]:
        found = [GaugeMetricFamily(f"mlxrack_{name}", text, labels=["model"]) for _, name, text in _STATUS]
        for one in self._status():
            for (field, _, _), family in zip(_STATUS, found, strict=True):
                value = one[field] == "ready" if field == "state" else one[field]
                if value is not None:
                    family.add_metric([str(one["model"])], float(value))
        up = GaugeMetricFamily("mlxrack_peer_up", "1 when the peer answers heartbeats.", labels=["peer"])
        for peer in self._peers():
            up.add_metric([peer.node], 1.0 if peer.state == "up" else 0.0)
        return [*found, up]
