"""Further made racks, for rules that none of the ten and their edges comes to: evictions, pinned models, and what an
operator can configure about money."""

from msgspec.structs import replace

from tests.aggregator.ten_racks import RACKS, Made, at, toml
from tests.made_models import CHAT, CODE, COMPARE, EXTRACT, LONG
from tests.made_rack import MadeRack

_SINCE, _UNTIL, _ZONE = "2026-10-05", "2026-10-16", "Europe/Berlin"
_RACK = MadeRack(
    seed=3,
    rack="more",
    nodes=("n1", "n2"),
    models=(replace(CHAT, nodes=()), replace(EXTRACT, nodes=("n1",))),
    since_ms=at(_SINCE),
    window_ms=3_600_000,
)


def _made(rack: MadeRack, text: str = "") -> Made:
    return Made(
        rack=rack,
        until_ms=at(_UNTIL),
        now_ms=at("2026-11-02T07:30"),
        toml=text or toml(rack, more=COMPARE),
        weeks=("2026-W41", "2026-W42"),
        months=("2026-10",),
    )


def _evictions() -> Made:
    """Four models share the memory of one node, which has room for two or three of them."""
    models = tuple(replace(one, nodes=()) for one in (CHAT, CODE, LONG, EXTRACT))
    slow = tuple(replace(one, per_hour=one.per_hour / 12) for one in models)
    return _made(replace(_RACK, nodes=("n1",), models=slow, window_ms=600_000))


def _pinned() -> Made:
    """A pinned model beside one that is not."""
    return _made(replace(_RACK, models=(replace(CHAT, pinned=True), replace(EXTRACT, nodes=("n1",)))))


_MONEY = """
[cost]
currency = "EUR"
usd_rate = 0.9
electricity_per_kwh = 0.31
pue = 1.25
flag_ratio = 1.1
flag_min_tok = 1000
[scorecard]
uptime = 0.9
itl_p95_ms = 20.0
throttled = 0.0
"""


def _configured() -> Made:
    """Prices, lives and targets that nobody else has; one node has no price, one was bought before it reported."""
    of_node = {"n1": "life_years = 2.5\nresidual = 0.35\nother_per_month = 12.5\nsince = 2026-10-01\n"}
    rack = replace(_RACK, nodes=("n1", "n2", "n3"))
    text = toml(rack, more=COMPARE + _MONEY, price=1799.95, **of_node)
    return _made(rack, text.replace('id = "n3"\nprice = 1799.95', 'id = "n3"'))


def _walled() -> Made:
    """Task classes, and places besides the rack; one node has no price."""
    rack = replace(_RACK, nodes=("n1", "n2", "n3"), faults=0.5, models=(CHAT, replace(EXTRACT, key="etl", nodes=())))
    return replace(_made(rack, toml(rack, more=COMPARE).replace('id = "n3"\nprice', 'id = "n3"\nwatts')), wall=True)


MORE: dict[str, Made] = {
    "evictions": _evictions(),
    "pinned": _pinned(),
    "configured": _configured(),
    "places": _walled(),
}
"""By name."""
ALL: dict[str, Made] = RACKS | MORE
"""Every rack that is recomputed."""
