"""macmon (`macmon pipe`): an alternative source of power and temperatures without root, where it is installed.

Its temperatures are means over all sensors that answer, placeholders and offsets included, so they are used only where
the SMC itself cannot be read, and are labelled as such. Fields differ between versions and missing ones stay None;
0.0 degrees or watts mean "no reading".

Its watts of the system are the larger of a measurement and the sum of the chip's parts, which is an estimate: where
both are equal, nothing of the whole was measured, and the parts exceed what was.
"""

from collections.abc import Mapping

import msgspec

from agent.telemetry.sensors.reading import MOST_OVER_SYSTEM, MOST_RPM, MOST_W, json_object, number

ALIKE = 1e-4
"""Watts that differ by no more than this share were not measured apart; two measurements differ by more."""
_PARTS, _MEMORY = ("cpu_power", "gpu_power", "ane_power"), ("ram_power", "gpu_ram_power")


class Macmon(msgspec.Struct, frozen=True, kw_only=True):
    """One line; None for missing fields. ``problem`` says why watts that it has are not believed."""

    cpu_mean_c: float | None = None
    gpu_mean_c: float | None = None
    fans_rpm: tuple[int, ...] = ()
    system_w: float | None = None
    soc_w: float | None = None
    problem: str = ""


def parse_macmon(raw: bytes) -> Macmon | None:
    """Parse one line of `macmon pipe`; None for anything else, including a truncated line."""
    tree = json_object(raw)
    if not isinstance(tree.get("temp"), dict):
        return None
    fans = tree.get("fans")
    listed = [fan for fan in fans if isinstance(fan, dict)] if isinstance(fans, list) else []
    rpm = [number(fan.get("rpm"), MOST_RPM) for fan in listed]
    system_w, soc_w, problem = powers(tree)
    return Macmon(
        cpu_mean_c=_celsius(tree["temp"].get("cpu_temp_avg")),
        gpu_mean_c=_celsius(tree["temp"].get("gpu_temp_avg")),
        fans_rpm=tuple(round(one) for one in rpm if one is not None),
        system_w=system_w,
        soc_w=soc_w,
        problem=problem,
    )


def powers(tree: Mapping[str, object]) -> tuple[float | None, float | None, str]:
    """Watts of the system and of the chip, each None where it is not believed, and why."""
    system_w = number(tree.get("sys_power"), MOST_W) or None
    parts = {name: number(tree[name], MOST_W) for name in (*_PARTS, *_MEMORY) if name in tree}
    summed_w = [sum(parts.get(name) or 0.0 for name in names) for names in (_PARTS, (*_PARTS, *_MEMORY))]
    soc_w = number(tree.get("all_power"), MOST_W) or None
    if system_w is not None and any(_alike(system_w, one) for one in (soc_w, *summed_w) if one):
        return None, None, f"{system_w:.1f} W of the system are only the sum of the chip's parts, nothing was measured"
    # a CPU power of exactly 0 means that it is not measured (as in macOS 27), and the sum lacks it
    lacks = parts.get("cpu_power", 1.0) == 0 or any(parts.get(name, 0.0) is None for name in _PARTS)
    if soc_w is None or lacks or soc_w < (1 - ALIKE) * summed_w[0]:
        return system_w, None, ""
    if system_w is not None and soc_w > MOST_OVER_SYSTEM * system_w:
        return system_w, None, f"{soc_w:.1f} W of the chip, more than the whole system's {system_w:.1f} W"
    return system_w, soc_w, ""


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= ALIKE * max(one, other)


def _celsius(value: object) -> float | None:
    found = number(value, 120.0)
    return found if found is not None and found > 15.0 else None
