"""Prometheus metrics of this node, in base units; labels are model, outcome and the like, never a client's text."""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.collectors.inference import Answered
from agent.routing import NodeView

_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts each answered request; reads gauges when it is scraped."""

    def __init__(self, status: Callable[[], Sequence[dict[str, Any]]], peers: Callable[[], Sequence[NodeView]]) -> None:
        self._registry = CollectorRegistry()
        labels = ("model", "outcome")
        self._requests = self._counter("requests", "Client requests answered at this node as the door.", labels)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of answered requests.", ("model",))
        self._cached = self._counter("cached_tokens", "Prompt tokens found in a prompt cache.", ("model",))
        self._completion = self._counter("completion_tokens", "Tokens generated for clients.", ("model",))
        self._retries = self._counter(
            "retries", "Attempts on another node or loader before the first byte.", ("model",)
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From request to first token.")
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of one answer.")
        self._total = self._histogram("request_seconds", "From request to the end of the answer.")
        self._registry.register(_Gauges(status, peers))

    def answered(self, one: Answered) -> None:
        """Count one request."""
        self._requests.labels(one.model, one.outcome).inc(one.requests)
        self._prompt.labels(one.model).inc(one.prompt_tok)
        self._cached.labels(one.model).inc(one.cached_tok)
        self._completion.labels(one.model).inc(one.completion_tok)
        self._retries.labels(one.model).inc(one.retries)
        self._total.labels(one.model).observe(one.total_us / 1e6)
        if one.ttft_us is not None:
            self._ttft.labels(one.model).observe(one.ttft_us / 1e6)
        for gap in one.itl_us:
            self._itl.labels(one.model).observe(gap / 1e6)

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"mlxrack_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"mlxrack_{name}", text, ("model",), buckets=_LATENCY_BUCKETS, registry=self._registry)


class _Gauges(Collector):
    def __init__(self, status: Callable[[], Sequence[dict[str, Any]]], peers: Callable[[], Sequence[NodeView]]) -> None:
        self._status = status
        self._peers = peers

    def collect(self) -> list[GaugeMetricFamily]:
        ready = GaugeMetricFamily("mlxrack_model_ready", "1 when requests can be leased here.", labels=["model"])
        flight = GaugeMetricFamily("mlxrack_model_in_flight", "Requests that use the loader.", labels=["model"])
        footprint = GaugeMetricFamily(
            "mlxrack_loader_resident_bytes", "Resident bytes of the loader.", labels=["model"]
        )
        restarts = GaugeMetricFamily("mlxrack_loader_restarts", "Unwanted ends of the loader.", labels=["model"])
        for one in self._status():
            labels = [str(one["model"])]
            ready.add_metric(labels, 1.0 if one["state"] == "ready" else 0.0)
            flight.add_metric(labels, float(one["in_flight"]))
            restarts.add_metric(labels, float(one["restarts"]))
            if one["footprint_bytes"] is not None:
                footprint.add_metric(labels, float(one["footprint_bytes"]))
        up = GaugeMetricFamily("mlxrack_peer_up", "1 when the peer answers its beats.", labels=["peer"])
        for peer in self._peers():
            up.add_metric([peer.node], 1.0 if peer.state == "up" else 0.0)
        return [ready, flight, footprint, restarts, up]
