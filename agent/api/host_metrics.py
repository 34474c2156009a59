"""Prometheus metrics of the machine: values of the last window, totals since the start, and the state of sensors and
uploads. What was not read is left out, never 0."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.telemetry.sensors.throttle import LEVELS, THROTTLED_FROM
from shared.records import HostSample, ThrottleEvent

F = TypeVar("F", GaugeMetricFamily, CounterMetricFamily)
_PRESSURES = ("normal", "warn", "critical", "unknown")
_GAUGES: tuple[tuple[str, str, float, str], ...] = (
    ("cpu_ppm", "cpu_ratio", 1e-6, "Share of CPU time that was not idle in the last window."),
    ("memory_total_bytes", "memory_total_bytes", 1, "Physical memory of the machine."),
    ("memory_used_bytes", "memory_used_bytes", 1, "Memory used, as docs/metrics.md defines it; mean of the window."),
    ("memory_used_max_bytes", "memory_used_max_bytes", 1, "Peak of memory used in the last window."),
    ("memory_wired_bytes", "memory_wired_bytes", 1, "Memory that cannot be paged out."),
    ("memory_compressed_bytes", "memory_compressor_bytes", 1, "Memory occupied by the compressor."),
    ("gpu_wired_limit_bytes", "gpu_wired_limit_bytes", 1, "GPU limit on wired memory, where one is set."),
    ("swap_used_bytes", "swap_used_bytes", 1, "Swap in use."),
    ("disk_free_bytes", "disk_free_bytes", 1, "Free space for models and spool."),
    ("throttled_5m_ppm", "thermal_throttled_fraction_5m", 1e-6, "Share of the last 5 min at heavy or above."),
    ("pressured_5m_ppm", "thermal_pressured_fraction_5m", 1e-6, "Share of the last 5 min at moderate or above."),
    ("thermal_coverage_ppm", "thermal_coverage_fraction_5m", 1e-6, "Share of the last 5 min with a known level."),
    ("package_temp_mc", "package_temperature_celsius", 1e-3, "Hottest CPU or GPU sensor in the last window."),
    ("pcore_temp_mc", "pcore_temperature_celsius", 1e-3, "Hottest performance core in the last window."),
    ("gpu_temp_mc", "gpu_temperature_celsius", 1e-3, "Hottest GPU sensor in the last window."),
    ("system_power_mw", "system_power_watts", 1e-3, "Power of the whole system, mean of the last window."),
    ("soc_power_mw", "soc_power_watts", 1e-3, "Power of CPU, GPU and Neural Engine, mean of the last window."),
)
_SOURCES = ("memory_source", "thermal_source", "temp_source", "energy_source")


class HostMetrics(Collector):
    """``push``, ``meters`` and ``audit`` return parts of the status."""

    def __init__(
        self,
        identity: dict[str, str],
        push: Callable[[], dict[str, Any]],
        meters: Callable[[], Sequence[dict[str, Any]]],
        audit: Callable[[], dict[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity, self._push, self._meters, self._clock = identity, push, meters, clock
        self._audit = audit
        self._last: tuple[float, HostSample] | None = None
        self._level_us: Counter[str] = Counter()
        self._energy_mj: Counter[str] = Counter()
        self._swapped: Counter[str] = Counter()
        self._throttles: Counter[str] = Counter()

    def sampled(self, sample: HostSample) -> None:
        """Add a closed window."""
        self._last = (self._clock(), sample)
        for level, spent_us in zip(LEVELS, sample.thermal_level_us, strict=False):
            self._level_us[level] += spent_us
        if sample.energy_mj is not None and sample.energy_source:
            self._energy_mj[sample.energy_source] += sample.energy_mj
        if sample.swap_in_bytes is not None and sample.swap_out_bytes is not None:
            self._swapped.update({"in": sample.swap_in_bytes, "out": sample.swap_out_bytes})

    def throttled(self, event: ThrottleEvent) -> None:
        """Count a crossing; a throttle already in progress at the start is not counted."""
        if not event.open_at_start:
            self._throttles[event.level] += 1

    def collect(self) -> Iterator[Metric]:
        """The metrics for a scrape."""
        yield InfoMetricFamily("mlxrack_agent", "Identity of this agent.", value=self._identity)
        yield from self._of_push()
        yield from self._of_meters()
        yield from _of_audit(self._audit())
        if self._last is None:
            return
        read_s, sample = self._last
        yield _gauge("sample_age_seconds", "Time since the last window was closed.", self._clock() - read_s)
        for field, name, factor, text in _GAUGES:
            if (value := getattr(sample, field)) is not None:
                yield _gauge(name, text, value * factor)
        yield from self._of_levels(sample)
        yield from self._sums()
        yield _sources(sample)

    def _of_push(self) -> Iterator[Metric]:
        push = self._push()
        yield _gauge("spool_waiting_batches", "Batches that wait for upload.", push["waiting_batches"])
        held = "Closed windows held in memory because writing to disk fails."
        yield _gauge("spool_held_batches", held, push["held_windows"])
        yield _gauge("push_ok", "1 while uploads succeed, 0 while batches wait.", push["state"] in ("ok", "idle"))
        dropped = CounterMetricFamily("mlxrack_spool_dropped_batches", "Batches dropped at the spool's limits.")
        dropped.add_metric([], push["dropped_batches"])
        yield dropped

    def _of_meters(self) -> Iterator[Metric]:
        wall = GaugeMetricFamily("mlxrack_wall_power_watts", "Power at a metered outlet.", labels=["meter", "nodes"])
        spent = CounterMetricFamily(
            "mlxrack_wall_energy_joules",
            "Energy through a metered outlet, over closed windows.",
            labels=["meter", "nodes"],
        )
        up = GaugeMetricFamily("mlxrack_meter_up", "1 while the meter can be read.", labels=["meter"])
        for meter in self._meters():
            labels = [meter["meter"], ",".join(meter["nodes"])]
            up.add_metric(labels[:1], 0.0 if meter["problem"] else 1.0)
            spent.add_metric(labels, meter["joules"])
            if meter["watts"] is not None:
                wall.add_metric(labels, meter["watts"])
        yield from (wall, spent, up)

    def _of_levels(self, sample: HostSample) -> Iterator[Metric]:
        if sample.thermal_level in LEVELS:
            level = LEVELS.index(sample.thermal_level)
            yield _gauge("thermal_pressure_level", "0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping.", level)
        if sample.memory_pressure is not None:
            levels = {name: sample.memory_pressure == name for name in _PRESSURES}
            yield _family(GaugeMetricFamily, "memory_pressure", "1 for the kernel's level.", "level", levels)
        fans = {str(number): rpm for number, rpm in enumerate(sample.fan_rpm)}
        yield _family(GaugeMetricFamily, "fan_rpm", "Fan speed in revolutions per minute.", "fan", fans)

    def _sums(self) -> Iterator[Metric]:
        if any(self._level_us.values()):  # where no level was ever known, no time at a level is known either
            yield from self._of_heat()
        joules = {source: used_mj / 1e3 for source, used_mj in self._energy_mj.items()}
        yield _family(CounterMetricFamily, "energy_joules", "Energy since the start, by source.", "source", joules)
        yield _family(CounterMetricFamily, "swapped_bytes", "Bytes swapped out and in.", "way", self._swapped)

    def _of_heat(self) -> Iterator[Metric]:
        rises = "Rises of the thermal pressure level to heavy or above."
        events = {level: self._throttles[level] for level in LEVELS[THROTTLED_FROM:]}
        yield _family(CounterMetricFamily, "thermal_throttle_events", rises, "to", events)
        spent_s = {level: self._level_us[level] / 1e6 for level in LEVELS}
        spent = "Time at each thermal pressure level."
        yield _family(CounterMetricFamily, "thermal_pressure_seconds", spent, "level", spent_s)


def _of_audit(found: dict[str, Any]) -> Iterator[Metric]:
    """Of a node that keeps an audit log."""
    if not found.get("enabled"):
        return
    yield _gauge("audit_ok", "1 while the audit log can be written.", not found["problem"])
    waiting = found["shipped"]["waiting_files"]
    yield _gauge("audit_waiting_files", "Closed files of the audit log that wait for upload.", waiting)
    for field, text in (("written", "Entries written to the audit log."), ("lost", "Entries that could not be.")):
        counted = CounterMetricFamily(f"mlxrack_audit_{field}_entries", text)
        counted.add_metric([], found[field])
        yield counted


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mlxrack_{name}", text, value=float(value))


def _family(kind: type[F], name: str, text: str, label: str, values: Mapping[str, float]) -> F:
    """A metric with one label and its values."""
    family = kind(f"mlxrack_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], float(number))
    return family


def _sources(sample: HostSample) -> GaugeMetricFamily:
    read = {str(getattr(sample, field)) for field in _SOURCES if getattr(sample, field) not in (None, "unknown", "")}
    states = dict.fromkeys(sorted(read), 1.0) | dict.fromkeys(sorted(sample.sources_failed), 0.0)
    return _family(GaugeMetricFamily, "source_up", "1 for a sensor that was read in the last window.", "source", states)
