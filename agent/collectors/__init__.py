"""Sensors of the machine, one file per thing read: pure ``parse_*`` on top, a reader below."""

from agent.collectors.host import HostCollector
from agent.collectors.memory import MemoryCollector
from agent.collectors.power import PowerCollector
from agent.collectors.reading import Collector
from agent.collectors.thermal import ThermalCollector


def all_collectors() -> tuple[Collector, ...]:
    """Every collector, in the order of the report."""
    return (HostCollector(), MemoryCollector(), ThermalCollector(), PowerCollector())
