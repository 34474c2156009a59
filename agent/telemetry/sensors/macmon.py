"""macmon (`macmon pipe`): an alternative source of power and temperatures without root, where it is installed.

Its temperatures are means over all sensors that answer, placeholders and offsets included, so they are used only where
the SMC itself cannot be read, and are labelled as such. Fields differ between versions and missing ones stay None;
0.0 degrees or watts mean "no reading".
"""

import msgspec

from agent.telemetry.sensors.reading import MOST_RPM, MOST_W, json_object, number


class Macmon(msgspec.Struct, frozen=True, kw_only=True):
    """One line; None for missing fields."""

    cpu_mean_c: float | None = None
    gpu_mean_c: float | None = None
    fans_rpm: tuple[int, ...] = ()
    system_w: float | None = None
    soc_w: float | None = None


def parse_macmon(raw: bytes) -> Macmon | None:
    """Parse one line of `macmon pipe`; None for anything else, including a truncated line."""
    tree = json_object(raw)
    if not isinstance(tree.get("temp"), dict):
        return None
    fans = tree.get("fans")
    listed = [fan for fan in fans if isinstance(fan, dict)] if isinstance(fans, list) else []
    rpm = [number(fan.get("rpm"), MOST_RPM) for fan in listed]
    return Macmon(
        cpu_mean_c=_celsius(tree["temp"].get("cpu_temp_avg")),
        gpu_mean_c=_celsius(tree["temp"].get("gpu_temp_avg")),
        fans_rpm=tuple(round(one) for one in rpm if one is not None),
        system_w=number(tree.get("sys_power"), MOST_W) or None,
        # a CPU power of exactly 0 means that it is not measured (as in macOS 27), and the sum lacks it
        soc_w=None if tree.get("cpu_power") == 0 else number(tree.get("all_power"), MOST_W) or None,
    )


def _celsius(value: object) -> float | None:
    found = number(value, 120.0)
    return found if found is not None and found > 15.0 else None
