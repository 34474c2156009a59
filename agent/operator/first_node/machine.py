"""Which machine this is: whether it is a Mac, and where its system libraries are."""

import sys

from agent.telemetry.sensors import smc
from agent.telemetry.sensors.system_library import LIBRARY as SYSTEM

PLATFORM, LIBRARY, IOKIT = sys.platform, SYSTEM, smc.IOKIT
"""Read at the time of use."""
ENERGY_S, SAMPLED_S = 8.0, 5.0
"""How long energy counters and sensors are watched."""


def is_mac() -> bool:
    """Whether the steps for a Mac are taken."""
    return PLATFORM == "darwin"
