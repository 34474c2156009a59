"""Heat of the nodes and what to do about their room. Pure.

"Throttled" has two measures. A node's heat is a share of the time for which its thermal level is known; advice, moves,
causes and alerts rest on it. The heat of the promise is a share of the time in which models worked: a chip that is hot
while it is idle slows nobody.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from aggregator.phrases import listed
from aggregator.window import HostSum, Window, at_least_one, seconds
from shared.records import ThrottleEvent

HOT_MC = 95_000
"""The highest temperature that is safe: a node that comes to it is at its limit, and is named."""
COOLER_C = 10
"""What can be asked of a room in degrees. Beyond it something else is wrong: blocked air, dust, the place."""
TARGET_SHARE = 0.01
"""Default target: a node that was throttled for more of its time needs more air."""
MOVE_SHARE = 0.03
"""A node that was throttled for more of its time gives up a model."""
LEAST_KNOWN_S = 300.0
"""A share of less time than this is "no data", and moves no model: a single window would make it."""
LEAST_WORKED_S = 300.0
"""The same for the time in which models worked."""
KNOWN_SHARE = 0.8
"""A share is one of the known time where that is at least this part of the time that the node reported."""
REPORTED_SHARE = 0.1
"""A model is moved for the heat of no less than this part of the time that any node reported."""
ROSE_SHARE = 0.05
"""A rise against the week before that explains slower tokens."""
ALERT_SHARE = 0.05
"""Default of the alert, over minutes."""

NAMED = 8
"""Nodes that a sentence about the rack names, worst first; it counts the others, and ``nodes`` has all."""

Fix = Literal["", "intake", "air"]


class NodeHeat(msgspec.Struct, frozen=True, kw_only=True):
    """One node's heat; temperatures in thousandths of a degree, ``throttled_share`` of its time (see ``share``) and in
    words. ``peak_mc`` is the highest of its peaks, ``intake_mc`` the lowest mean temperature of its idle chip in a
    window: its intake air was no warmer then. ``fix`` is what it needs: cooler intake air, by ``cooler_c`` degrees, or
    first more air; "" for nothing. ``advice`` says all that in a sentence."""

    node: str
    peak_package_mc: int | None
    peak_pcore_mc: int | None
    throttle_events: int
    throttled_share: float | None
    throttled: str = "no data"
    peak_mc: int | None = None
    intake_mc: int | None = None
    too_long: bool = False
    fix: Fix = ""
    cooler_c: int | None = None
    advice: str = ""

    @property
    def hot(self) -> bool:
        """Whether it came to its limit."""
        return self.peak_mc is not None and self.peak_mc >= HOT_MC


class Thermal(msgspec.Struct, frozen=True, kw_only=True):
    """Heat of the rack and what to do about the room; ``kind`` is what the advice rests on: nodes that were throttled
    too long, nodes that came to their limit, neither, or no reading. ``because`` are the figures behind the advice."""

    nodes: tuple[NodeHeat, ...]
    advice: str
    because: str = ""
    kind: Literal["throttled", "hot", "cool", "unknown"]


def share(window: Window, *nodes: str) -> float | None:
    """Share of the time of nodes in which they were throttled; where too little of that is known, the rest counts as
    cool. None where it is one of less than LEAST_KNOWN_S, or nothing is known."""
    hosts = [host for host in window.hosts if host.node in nodes]
    hot_us, known_us = sum(h.throttled_us for h in hosts), sum(h.thermal_known_us for h in hosts)
    reported_us = sum(seconds(window.reported(node)) for node in nodes) * 1e6
    of_us = known_us if known_us >= KNOWN_SHARE * reported_us else reported_us
    return min(1.0, hot_us / of_us) if known_us and of_us >= LEAST_KNOWN_S * 1e6 else None


def share_to_move(window: Window, node: str) -> float | None:
    """The same, None where it is not known for long enough to move a model for it."""
    host, rack_s = window.host(node), seconds(at_least_one(map(window.reported, window.nodes)))
    needed_s = max(LEAST_KNOWN_S, KNOWN_SHARE * seconds(window.reported(node)), REPORTED_SHARE * rack_s)
    return share(window, node) if host is not None and host.thermal_known_us >= needed_s * 1e6 else None


def of_work(window: Window) -> tuple[float | None, float]:
    """Heat of the promise, and the seconds in which models worked while the level was known: of each window at most
    all of it, however many models worked at once, and throttled for as much of it as it was at most. The share is None
    for less than LEAST_WORKED_S."""
    worked_us = sum(host.worked_us for host in window.hosts)
    hot_us = sum(host.throttled_worked_us for host in window.hosts)
    return (hot_us / worked_us if worked_us >= LEAST_WORKED_S * 1e6 else None), worked_us / 1e6


def digits_beside(value: float, limit: float, least: int) -> int:
    """Digits, ``least`` or more, with which a value lies on the same side of a limit as it does exactly: "1.004 %", not
    "1.00 %", where 1 % is the most."""
    for digits in range(least, least + 9):
        said = round(value, digits)
        if (said > limit, said < limit) == (value > limit, value < limit):
            return digits
    return least


def percent_beside(value: float, limit: float, least: int = 1) -> str:
    """A share as "2.3%", with enough digits not to contradict the limit it is compared with."""
    return f"{value:.{digits_beside(value, limit, least + 2) - 2}%}"


def shown(value: float | None, limit: float) -> str:
    """The same for a table, as "2.3 %" or "no data"."""
    return percent_beside(value, limit).replace("%", " %") if value is not None else "no data"


def thermal(window: Window, target: float = TARGET_SHARE) -> Thermal:
    """Peaks and throttling of every node, and what to do about the room; ``target`` is the highest tolerable share."""
    nodes = tuple(_heat(window, node, target) for node in window.nodes)
    if any(n.too_long or n.hot for n in nodes):
        kind: Literal["throttled", "hot"] = "throttled" if any(n.too_long for n in nodes) else "hot"
        advice, because = _advice(nodes, target)
        return Thermal(nodes=nodes, kind=kind, advice=advice, because=because)
    cool = [f"no node came to {HOT_MC // 1000} °C"] if any(n.peak_mc is not None for n in nodes) else []
    if any(n.throttled_share is not None for n in nodes):
        cool.append(f"heat throttled none for more than {target * 100:g} % of its time")
    if cool:
        return Thermal(nodes=nodes, kind="cool", advice=f"Nothing to change: {' and '.join(cool)}.")
    least = f"a temperature, or a thermal level for {LEAST_KNOWN_S:.0f} s"
    return Thermal(nodes=nodes, kind="unknown", advice=f"No data: no node told {least}.")


def _heat(window: Window, node: str, target: float) -> NodeHeat:
    host, of_time = window.host(node), share(window, node)
    peaks = _peaks(host)
    peak_mc = max(peaks, default=None)
    too_long = of_time is not None and of_time > target
    found = NodeHeat(
        node=node,
        peak_package_mc=host.package_temp_mc if host is not None else None,
        peak_pcore_mc=host.pcore_temp_mc if host is not None else None,
        throttle_events=sum(m.node == node and not event.open_at_start for m, event in window.of(ThrottleEvent)),
        throttled_share=of_time,
        throttled=shown(of_time, target),
        peak_mc=peak_mc,
        intake_mc=host.idle_package_mc if host is not None else None,
        too_long=too_long,
    )
    fix, cooler_c = needed(peak_mc, too_long=too_long)
    found = msgspec.structs.replace(found, fix=fix, cooler_c=cooler_c)
    return msgspec.structs.replace(found, advice=_sentence(found, target))


def _peaks(host: HostSum | None) -> list[int]:
    each = (host.package_temp_mc, host.pcore_temp_mc, host.gpu_temp_mc) if host is not None else ()
    return [one for one in each if one is not None]


def needed(peak_mc: int | None, *, too_long: bool) -> tuple[Fix, int | None]:
    """What a node needs, and by how many degrees its intake air must be cooler. At the same work and fan speed a chip
    is warmer than its intake air by the same number of degrees, so what its peak lies above HOT_MC, the air must be
    cooler. A node that is throttled without coming to HOT_MC, or by more than COOLER_C degrees above it, has another
    trouble than the room."""
    if peak_mc is not None and peak_mc >= HOT_MC:
        cooler_c = max(1, math.ceil((peak_mc - HOT_MC) / 1000))
        return ("intake", cooler_c) if cooler_c <= COOLER_C else ("air", None)
    return ("air" if too_long else ""), None


def needs(one: NodeHeat) -> str:
    """What a node needs, in words; "" for nothing. A chip that was throttled would have become hotter than it did."""
    by = f"by {one.cooler_c} °C" + (" or more" if one.too_long else "")
    return {"intake": f"intake air cooler {by}", "air": "more air first, then look for dust, another place"}.get(
        one.fix, ""
    )


def _sentence(one: NodeHeat, target: float) -> str:
    """What one node needs, why, and what is known of its intake air; "" for a node that needs nothing."""
    why = [f"it came to {celsius(one.peak_mc)}"] if one.peak_mc is not None else []
    why += [f"heat throttled it for {one.throttled} of its time, over {target * 100:g} %"] if one.too_long else []
    return f"{needs(one)}: {' and '.join(why)}; {_intake(one)}" if one.fix else ""


def _intake(one: NodeHeat) -> str:
    if one.intake_mc is None:
        return "no ambient sensor: fit one"
    return f"the idle temperature of its chip, {celsius(one.intake_mc)}, is an upper bound of the intake air then"


def _advice(nodes: Sequence[NodeHeat], target: float) -> tuple[str, str]:
    """For the rack: what to do where, worst first; and why, with what is known of the intake air."""
    worst = sorted(nodes, key=lambda n: (-(n.peak_mc or 0), -(n.throttled_share or 0), n.node))
    intake, air = ([n for n in worst if n.fix == fix] for fix in ("intake", "air"))
    long, hot = ([n for n in worst if getattr(n, name)] for name in ("too_long", "hot"))
    bound = [n for n in worst if n.fix and n.intake_mc is not None]
    unknown = [n for n in worst if n.fix and n.intake_mc is None]
    advice = (
        _listed("Make the intake air cooler:", intake, lambda n: needs(n).removeprefix("intake air cooler ")),
        _listed("First give more air, then look for dust and another place:", air),
        _listed("No ambient sensor: fit one at", unknown),
    )
    because = (
        _listed(f"Throttled by heat for more than {target * 100:g} % of the time:", long, lambda n: n.throttled),
        _listed(f"At {HOT_MC // 1000} °C or more:", hot, lambda n: celsius(n.peak_mc)),
        _listed(
            "Idle temperature of the chip, an upper bound of the intake air:", bound, lambda n: celsius(n.intake_mc)
        ),
    )
    return " ".join(filter(None, advice)), " ".join(filter(None, because))


def _listed(what: str, nodes: Sequence[NodeHeat], figure: Callable[[NodeHeat], str] = lambda n: "") -> str:
    """A sentence that names nodes with a figure of each; "" without nodes."""
    named = [f"{n.node} {figure(n)}".rstrip() for n in nodes]
    return f"{what} {listed(named, NAMED)}." if nodes else ""


def celsius(value_mc: int | None) -> str:
    """A temperature in degrees, with enough digits to be seen on the right side of HOT_MC."""
    if value_mc is None:
        return "no data"
    return f"{value_mc / 1000:.{digits_beside(value_mc / 1000, HOT_MC / 1000, 1)}f} °C"
