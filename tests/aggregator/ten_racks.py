"""Ten made racks on their worst days, and the edges beside them: what a report has to be true for.

Each is a bucket of raw segments, as agents write them, an aggregator.toml, the operator's annotations, the periods to
report on and the moment at which they are judged. Nothing here knows the aggregator: what is right about a rack is
worked out elsewhere, from raw. ``write`` makes the folder that both read.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from msgspec.structs import replace

from scripts.bench_aggregate import segments
from shared.batch import Batch
from shared.records import Served
from shared.store_dir import DirectoryStore
from tests.made_models import CHAT, CODE, COMPARE, EXTRACT, LONG, TRANSLATE
from tests.made_rack import DAY_MS, HOUR_MS, Change, MadeRack, Outage, batches, list_price

ANNOTATIONS = "annotations/v1/incidents.toml"
MINUTE_MS = 60_000
SEGMENT = 24
"""Batches of a segment: in these coarse windows about a day."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """A rack to report on. ``rack`` makes its telemetry until ``until_ms``; ``toml`` is its aggregator.toml without
    the store; ``weeks`` and ``months`` are the periods to report on, ``nothing`` those of them in which no node
    reported; ``now_ms`` is when they are judged. Before ``named_ms`` its nodes called the rack ``old_name``. Requests
    of the key ``etl`` come in at the node ``gateway``, whoever computes them. With ``wall`` requests have task classes,
    and some are answered by other places."""

    rack: MadeRack
    until_ms: int
    now_ms: int
    toml: str
    weeks: tuple[str, ...] = ()
    months: tuple[str, ...] = ()
    nothing: tuple[str, ...] = ()
    annotations: str = ""
    named_ms: int = 0
    old_name: str = ""
    gateway: str = ""
    wall: bool = False

    @property
    def batches(self) -> dict[str, tuple[Batch, ...]]:
        """What each node reported, in its order. The same at each call."""
        made = {node: list(self._named(batches(self.rack, node, self.until_ms))) for node in self.rack.nodes}
        if self.gateway in made:
            _forward(made, self.gateway)
        if self.wall:
            made = {node: [_walled(one) for one in mine] for node, mine in made.items()}
        return {node: tuple(mine) for node, mine in made.items()}

    def _named(self, made: Iterable[Batch]) -> Iterable[Batch]:
        for one in made:
            yield replace(one, rack=self.old_name) if one.t_start_ms < self.named_ms else one


def _forward(made: dict[str, list[Batch]], gateway: str) -> None:
    """Move what was served to the key ``etl`` into the gateway's batch of the same window, where there is one."""
    there = {(one.t_start_ms, one.t_end_ms): place for place, one in enumerate(made[gateway])}
    for node in sorted(made.keys() - {gateway}):
        for place, one in enumerate(made[node]):
            target = there.get((one.t_start_ms, one.t_end_ms))
            moved = [r for r in one.records if isinstance(r, Served) and r.key_id == "etl"]
            if target is None or not moved:
                continue
            stay = tuple(r for r in one.records if not (isinstance(r, Served) and r.key_id == "etl"))
            made[node][place] = replace(one, records=stay)
            taken = made[gateway][target]
            made[gateway][target] = replace(taken, records=(*moved, *taken.records))


_CLASSES = ("ROUTINE", "REASONING", "ORCHESTRATION", "")
_PLACES = (("hosted", "outside"), ("ollama", "premises"), ("other", "outside"))


def _walled(one: Batch) -> Batch:
    """A batch whose requests have task classes, beside others that were answered elsewhere, failed there or were
    refused there. What a place had looks like work of the rack in everything but the place."""
    classed = [
        replace(r, task_class=_CLASSES[(one.seq + n) % 4]) if isinstance(r, Served) else r
        for n, r in enumerate(one.records)
    ]
    elsewhere = []
    for n, r in enumerate(r for r in classed if isinstance(r, Served) and r.requests > 1):
        place, category = _PLACES[(one.seq + n) % 3]
        outcome, finish = (("ok", "stop"), ("failed", ""), ("cancelled", ""), ("refused", "capacity"))[
            (one.seq + n) % 4
        ]
        elsewhere.append(
            replace(
                r,
                place=place,
                place_category=category,
                # an older gateway might leave these; they must count for nothing
                worker=r.worker if n % 5 == 0 else "",
                version=r.version if n % 5 == 0 else "",
                outcome=outcome,
                finish=finish,
                requests=r.requests // 2,
                usd_micro=(r.prompt_tok * 3 + r.completion_tok * 15) // 100 if category == "outside" else 0,
            )
        )
    return replace(one, records=(*classed, *elsewhere))


class Paths(NamedTuple):
    """Where a rack was written."""

    bucket: Path
    config: Path
    annotations: Path


def write(made: Made, folder: Path) -> Paths:
    """Raw segments in a directory store, the configuration of it, and the annotations (where there are any)."""
    paths = Paths(folder / "bucket", folder / "aggregator.toml", folder / "bucket" / ANNOTATIONS)
    store = DirectoryStore(paths.bucket)
    for mine in made.batches.values():
        for key, body in segments(iter(mine), SEGMENT):
            store.put(key, body)
    if made.annotations:
        store.put(ANNOTATIONS, made.annotations.encode())
    # the keys of the root come before the first table
    table = f'\n[store]\nkind = "directory"\npath = {json.dumps(str(paths.bucket))}\n'
    paths.config.write_text(made.toml + table, encoding="utf-8")
    return paths


def at(moment: str, zone: str = "Europe/Berlin") -> int:
    """Milliseconds of a moment on the clocks of a zone."""
    return int(datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def toml(rack: MadeRack, *, zone: str = "Europe/Berlin", price: float = 0.0, more: str = "", **of_node: str) -> str:
    """aggregator.toml without its store. ``of_node`` are further lines of a node's table, ``more`` further tables."""
    nodes = "".join(
        f'[[nodes]]\nid = "{node}"\nprice = {price or list_price():g}\n{of_node.get(node, "")}' for node in rack.nodes
    )
    return f'rack = "{rack.rack}"\ntimezone = "{zone}"\n{nodes}{more}'


# ---- a month of four nodes ----

_NODES = ("n1", "n2", "n3", "n4")
_MODELS = (replace(CHAT, nodes=("n1", "n2")), replace(CODE, nodes=("n2", "n3")), replace(EXTRACT, nodes=("n3", "n4")))
_PLAIN = MadeRack(
    seed=22,
    rack="ten",
    nodes=_NODES,
    models=_MODELS,
    since_ms=at("2026-09-28"),
    window_ms=2 * HOUR_MS,
    faults=0.3,
    metered=("n1",),
)
"""October 2026 in Berlin, whose clocks change on the 25th, and three days of September before it."""
_FROM_12TH, _FROM_19TH = (replace(_PLAIN, since_ms=at(day)) for day in ("2026-10-12", "2026-10-19"))
"""The same, installed in the course of the month: each day takes time to roll up."""
_WEEKS, _LATE, _MONTHS = ("2026-W41", "2026-W42", "2026-W43"), ("2026-W43", "2026-W44"), ("2026-10",)


def _month(rack: MadeRack, text: str = "", **fields: object) -> Made:
    """October of a rack."""
    made = Made(
        rack=rack,
        until_ms=at("2026-11-01"),
        now_ms=at("2026-11-02T07:30"),
        toml=text or toml(rack, more=COMPARE),
        weeks=_WEEKS,
        months=_MONTHS,
        gateway="n1",
    )
    return replace(made, **fields)


def _all(rack: MadeRack, since: str, until: str, kind: str) -> tuple[Outage, ...]:
    """Every node is away."""
    return tuple(Outage(node, at(since), at(until), kind) for node in rack.nodes)


def _dark() -> Made:
    """All nodes are without power for 36 hours; on another day as many requests are refused as are answered."""
    full = Change(cause="full", since_ms=at("2026-10-20"), until_ms=at("2026-10-21"), strength=0.5)
    dark = _all(_PLAIN, "2026-10-14T08:00", "2026-10-15T20:00", "power")
    return _month(replace(_FROM_12TH, planned=dark, changes=(full,), faults=0.0), weeks=_WEEKS[1:])


def _half_silent() -> Made:
    """Two of four nodes say nothing for 60 % of the month: one was asleep, of the other the windows are lost."""
    since, until = at("2026-10-05T10:00"), at("2026-10-24T00:00")
    silent = (Outage("n3", since, until, "asleep"), Outage("n4", since, until, "lost"))
    return _month(replace(_PLAIN, planned=silent, faults=0.0))


def _retired(line: str = "") -> Made:
    """A node has been silent since the 11th, for it was sold; with ``line`` the configuration says so."""
    rack = replace(_PLAIN, planned=(Outage("n4", at("2026-10-11"), at("2027-01-01"), "asleep"),))
    return _month(rack, toml(rack, more=COMPARE, n4=line))


def _renamed() -> Made:
    """The rack is called otherwise from the 15th on: what was written before is of another rack."""
    return _month(_PLAIN, named_ms=at("2026-10-15"), old_name="office", nothing=("2026-W41",))


def _shared() -> Made:
    """Two names that one loader answers: ``chat`` in short prompts and long answers, ``sum`` the other way round."""
    total = replace(CHAT, name="sum", loader="chat", prompt_tok=6_000, answer_tok=60, per_hour=50, key="etl")
    models = (replace(CHAT, answer_tok=500, per_hour=150), total)
    return _month(replace(_FROM_19TH, models=models, nodes=("n1", "n2")), weeks=_LATE)


def _apart() -> Made:
    """Two names with the same files and a loader each, on nodes that they share in part."""
    total = replace(CHAT, name="sum", files="chat", prompt_tok=6_000, answer_tok=60, per_hour=90, key="etl")
    models = (replace(CHAT, answer_tok=500, nodes=("n1", "n2")), replace(total, nodes=("n2", "n3")))
    return _month(replace(_FROM_19TH, models=models, nodes=("n1", "n2", "n3")), weeks=_LATE)


def _swapped() -> Made:
    """``code`` gets a new version in the middle of a week and of the month, and answers on both."""
    swap = Change(cause="swap", since_ms=at("2026-10-15T11:00"), model="code")
    return _month(replace(_FROM_12TH, changes=(swap,), faults=0.0), weeks=_WEEKS[1:])


_IDLE = replace(_FROM_19TH, models=tuple(replace(model, per_hour=model.per_hour / 1.4) for model in _MODELS))
_CHEAP = "".join(
    f'[[api_prices]]\nmodel = "{model.name}"\nname = "a host"\ninput_per_m = 0.004\noutput_per_m = 0.01\n'
    for model in _MODELS
)


def _negative() -> Made:
    """Nodes at 90,000 USD that are idle for 90 % of the time."""
    return _month(_IDLE, toml(_IDLE, price=90_000, more=COMPARE), weeks=_LATE)


def _undercut() -> Made:
    """API hosts are far cheaper than nodes at their list price."""
    return _month(_IDLE, toml(_IDLE, more=_CHEAP), weeks=_LATE)


def _zero() -> Made:
    """Nodes are up, models are in memory, nobody asks anything."""
    models = tuple(replace(model, per_hour=0.0) for model in _MODELS)
    return _month(replace(_FROM_19TH, models=models, faults=0.0), weeks=_LATE)


def _big() -> Made:
    """Fifty nodes and forty models for three days."""
    kinds = (CHAT, CODE, EXTRACT, LONG, TRANSLATE)
    nodes = tuple(f"mini-{n:02d}" for n in range(1, 51))
    models = tuple(
        replace(
            kinds[n % 5],
            name=f"{kinds[n % 5].name}-{n:02d}",
            per_hour=kinds[n % 5].per_hour / 3,
            burst=1,
            nodes=(nodes[n], nodes[(n + 11) % 50]),
        )
        for n in range(40)
    )
    rack = replace(
        _PLAIN, nodes=nodes, models=models, since_ms=at("2026-10-12"), window_ms=6 * HOUR_MS, faults=2.0, metered=()
    )
    return _month(rack, until_ms=at("2026-10-15"), weeks=("2026-W42",))


# ---- edges ----

_SMALL = replace(
    _PLAIN, nodes=("n1", "n2"), models=(replace(CHAT, nodes=()), replace(EXTRACT, nodes=())), since_ms=at("2026-10-12")
)
_WEEK = ("2026-W42",)


def _days(rack: MadeRack, until: str, zone: str = "Europe/Berlin", more: str = COMPARE, **fields: object) -> Made:
    """Some days of a rack of two nodes."""
    made = Made(
        rack=rack,
        until_ms=at(until, zone),
        now_ms=at(until, zone) + 40 * DAY_MS,
        toml=toml(rack, zone=zone, more=more),
        weeks=_WEEK,
        months=_MONTHS,
    )
    return replace(made, **fields)


def _empty(until: str, *nothing: str) -> Made:
    """Nodes reported until shortly before the month began, or to its first millisecond, which counts in it."""
    rack = replace(_SMALL, since_ms=at("2026-09-28"))
    return _days(rack, until, weeks=("2026-W40", "2026-W42"), nothing=("2026-W42", *nothing))


def _partial() -> Made:
    """The month is judged in its middle, and so is the week."""
    rack = replace(_SMALL, since_ms=at("2026-10-08"))
    return _days(rack, "2026-10-16T11:00", now_ms=at("2026-10-16T11:17"))


def _refused() -> Made:
    """Every request of the month is refused."""
    return _days(replace(_SMALL, changes=(Change(cause="full", since_ms=0),), faults=0.0), "2026-10-14")


def _one() -> Made:
    """A rack of one node, which restarts once."""
    rack = replace(
        _SMALL, nodes=("only",), planned=(Outage("only", at("2026-10-14T03:00"), at("2026-10-14T03:01"), "unclean"),)
    )
    return _days(replace(rack, faults=0.0), "2026-10-17")


def _annotated(text: str, fix: str, cause: str = "power") -> Made:
    """Both nodes are dark for five hours, which an operator explains in words of their language."""
    since, until = "2026-10-14T10:00", "2026-10-14T15:00"
    rack = replace(_SMALL, planned=_all(_SMALL, since, until, "power"), faults=0.0)
    note = f'[[incidents]]\nstart = {since}:00+02:00\nend = {until}:00+02:00\ncause = "{cause}"\n'
    return _days(rack, "2026-10-17", annotations=f'{note}text = "{text}"\nfix = "{fix}"\n')


def _clocks(zone: str, day: str, week: str, window_ms: int = 30 * MINUTE_MS) -> Made:
    """Three days around one on which the clocks of a zone change."""
    noon = at(f"{day}T12:00", zone)
    rack = replace(_SMALL, since_ms=noon - 36 * HOUR_MS, window_ms=window_ms, faults=0.0)
    made = _days(rack, f"{day}T12:00", zone, weeks=(week,), months=(day[:7],))
    return replace(made, until_ms=noon + 36 * HOUR_MS)


def _across_midnight() -> Made:
    """Each night a window lies across midnight, on the rack's clocks and in UTC; one also across the month's end."""
    zone = "Asia/Kolkata"  # 5:30 ahead: its midnight is another window's than that of UTC
    rack = replace(_SMALL, since_ms=at("2026-09-29T00:50", zone), window_ms=HOUR_MS, faults=0.0)
    return _days(rack, "2026-10-05T01:50", zone, weeks=("2026-W40",), months=("2026-09", "2026-10"))


def _kolkata() -> Made:
    """A zone that is not whole hours away from UTC, in windows that begin with its days."""
    zone = "Asia/Kolkata"
    rack = replace(_SMALL, since_ms=at("2026-10-12", zone), window_ms=30 * MINUTE_MS)
    return _days(rack, "2026-10-15", zone)


def _week_53() -> Made:
    """The week in which the year ends."""
    rack = replace(_SMALL, since_ms=at("2026-12-29"))
    return _days(rack, "2027-01-05", weeks=("2026-W53", "2027-W01"), months=("2026-12", "2027-01"))


def _ahead() -> Made:
    """One node's clock is ten to eleven minutes ahead, and goes further."""
    rack = replace(
        _SMALL, skewed=("n2",), skew_step_ms=10_000, window_ms=10 * MINUTE_MS, hot=1.0, intake_c=(26.0, 27.0)
    )
    return _days(rack, "2026-10-14")


TEN: dict[str, Made] = {
    "normal": _month(_PLAIN),
    "dark": _dark(),
    "half silent": _half_silent(),
    "retired": _retired(),
    "renamed": _renamed(),
    "shared version": _shared(),
    "swapped version": _swapped(),
    "negative saving": _negative(),
    "zero traffic": _zero(),
    "50 nodes": _big(),
}
"""The ten."""
EDGES: dict[str, Made] = {
    "retired, configured": _retired("retired = 2026-10-12\n"),
    "shared version, two loaders": _apart(),
    "cheap hosts": _undercut(),
    "empty month": _empty("2026-09-30T23:00", "2026-10"),
    "until midnight": _empty("2026-10-01"),
    "partial month": _partial(),
    "all refused": _refused(),
    "one node": _one(),
    "polish": _annotated(
        "UPS w Łodzi wyłączył się; wymieniono zasilacz źródła.", "Zażółć gęślą jaźń: nowy bezpiecznik."
    ),
    "japanese": _annotated("停電のため、棚全体が止まりました。", "無停電電源装置を交換しました。", "external"),
    "Berlin in March": _clocks("Europe/Berlin", "2026-03-29", "2026-W13"),
    "Berlin in October": _clocks("Europe/Berlin", "2026-10-25", "2026-W43"),
    "New York in March": _clocks("America/New_York", "2026-03-08", "2026-W10"),
    "New York in November": _clocks("America/New_York", "2026-11-01", "2026-W44"),
    "Lord Howe in April": _clocks("Australia/Lord_Howe", "2026-04-05", "2026-W14"),
    "Lord Howe in October": _clocks("Australia/Lord_Howe", "2026-10-04", "2026-W40"),
    "Kolkata": _kolkata(),
    "week 53": _week_53(),
    "clock ahead": _ahead(),
    "across midnight": _across_midnight(),
}
"""Racks on the edges of calendars, clocks, counts and languages."""
RACKS: dict[str, Made] = TEN | EDGES
