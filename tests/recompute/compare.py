"""Figure by figure: what the aggregator published against what was recomputed."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from . import apis, focus, happened, heat, periods, raw, underivable, usage, volume
from .evictions import evictions
from .lives import Rack
from .periods import Period
from .report import Judged

Found = dict[str, Any]
_MONEY = re.compile(r"-?\d+(\.\d+)?")
_CLOSE = 1e-9
_IDENTITY = (
    ("provider", "model"),
    ("scope", "node", "start_ms"),
    ("node", "model", "kind", "cost"),
    ("node", "model"),
    ("model",),
    ("node",),
    ("place", "category", "key_id", "task_class"),
    ("key_id", "task_class"),
    ("date",),
)
ABSENT = object()


@dataclass
class Outcome:
    """Of one rack. ``differences`` and ``verdicts`` are (path, theirs, ours)."""

    compared: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    differences: list[tuple[str, Any, Any]] = field(default_factory=list)
    verdicts: list[tuple[str, Any, Any]] = field(default_factory=list)

    def check(self, path: str, theirs: Any, ours: Any) -> None:
        """One leaf of the JSON."""
        if ours is ABSENT:
            self._unmatched(path, theirs)
            return
        if theirs is ABSENT:
            if ours is not None:
                self.differences.append((path, "nothing", _shown(ours)))
            return
        self.compared += 1
        if not same(theirs, ours):
            bad = self.verdicts if isinstance(ours, bool) or path.endswith("/kept") else self.differences
            bad.append((path, _shown(theirs), _shown(ours)))

    def _unmatched(self, path: str, theirs: Any) -> None:
        if not is_number(theirs):
            return
        reason = underivable.why(path)
        if reason:
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        else:
            self.differences.append((path, _shown(theirs), "not recomputed"))

    def tree(self, path: str, theirs: Any, ours: Any) -> None:
        """A document against another one."""
        one, other = dict(leaves(path, theirs)), dict(leaves(path, ours))
        for key in sorted(one.keys() | other.keys()):
            self.check(key, one.get(key, ABSENT), other.get(key, ABSENT))


def is_number(value: Any) -> bool:
    """A number, or money as text."""
    if isinstance(value, str):
        return bool(_MONEY.fullmatch(value)) and ("." in value or value == "0")
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(theirs: Any, ours: Any) -> bool:
    """Exactly for integers and money, to a billionth for floats."""
    if theirs is None or ours is None or isinstance(ours, bool) or isinstance(theirs, bool):
        return theirs is ours or (isinstance(ours, bool) and theirs == ours)
    if isinstance(ours, str) or isinstance(theirs, str):
        both_money = is_number(theirs) and is_number(ours)
        return Fraction(theirs) == Fraction(ours) if both_money else str(theirs) == str(ours)
    if isinstance(ours, int) and isinstance(theirs, int):
        return theirs == ours
    return bool(abs(theirs - ours) <= _CLOSE * max(abs(theirs), abs(ours)))


def _shown(value: Any) -> Any:
    return float(value) if isinstance(value, Fraction) else value


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf with its path; the items of a list are known by what they are about."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(f"{path}/{key}", one)
    elif isinstance(value, list):
        seen: dict[str, int] = {}
        for place, one in enumerate(value):
            name = identity(one, place)
            seen[name] = seen.get(name, 0) + 1
            yield from leaves(f"{path}/{name}" + (f"#{seen[name]}" if seen[name] > 1 else ""), one)
    else:
        yield path, value


def identity(one: Any, place: int) -> str:
    """What an item of a list is about."""
    if not isinstance(one, dict):
        return str(place)
    if "kind" in one and "value" in one:
        return f"{one['kind']} {one.get('name')}" if one["kind"] == "price" else str(one["kind"])
    for names in _IDENTITY:
        if all(name in one for name in names):
            names = names[:3] if "cost" in names else names
            return " ".join(str(one[name]) for name in names)
    return str(place)


def newest(folder: Path, name: str, form: str = "json") -> Path | None:
    """The newest revision of a document."""
    found = sorted(folder.glob(f"{name}-r*.{form}"), key=lambda p: int(p.stem.rpartition("-r")[2]))
    return found[-1] if found else None


def load(folder: Path, name: str) -> Any:
    """Its content, None where it was not published."""
    path = newest(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def read_rack(config: Path) -> Rack:
    """Raw, settings and notes of a rack in a directory store."""
    settings = periods.settings(config)
    bucket = Path(settings["store"]["path"])
    notes = periods.notes(bucket, str(settings.get("timezone", "UTC")))
    return Rack(raw.read(bucket, settings["rack"]), settings, notes)


def compare(config: Path, now_ms: int, weeks: tuple[str, ...], months: tuple[str, ...]) -> Outcome:
    """All reports of these periods that were published."""
    rack, found = read_rack(config), Outcome()
    reports = Path(rack.settings["store"]["path"]) / "report" / "v1"
    for name in weeks:
        _week(rack, periods.week(name, rack.zone, now_ms), reports / "weekly" / name, found)
    for name in months:
        _month(rack, periods.month(name, rack.zone, now_ms), reports / "monthly" / name, found)
    return found


def _week(rack: Rack, period: Period, folder: Path, found: Outcome) -> None:
    judged = Judged(rack, period)
    theirs = {name: load(folder, name) for name in ("cost", "uptime", "scorecard", "evictions", "placement")}
    if theirs["cost"] is None:
        found.check(f"{period.name}/published", "nothing", "nothing" if judged.empty else "reports")
        return
    before = Judged(rack, period.before())
    mine, so_far = Outcome(), judged.so_far()
    of_apis = judged.apis(theirs["cost"].get("apis") or {})
    mine.tree("cost", theirs["cost"], {"cost": judged.cost(before), "apis": of_apis} | so_far)
    mine.tree("uptime", theirs["uptime"], judged.uptime() | {"telemetry": judged.telemetry()} | so_far)
    mine.tree("scorecard", theirs["scorecard"], [one | so_far for one in judged.scorecard(of_apis)])
    mine.tree("evictions", theirs["evictions"], evictions(judged.counted) | so_far)
    mine.tree("placement", theirs["placement"], judged.placement(theirs["placement"]) | so_far)
    mine.tree("usage", load(folder, "usage"), judged.usage() | so_far)
    _more(mine, theirs["cost"])
    told = folder.parents[3] / "desired" / "v1" / "rates.json"
    if told.exists() and (rates := json.loads(told.read_text(encoding="utf-8")))["period"] == period.name:
        mine.tree("rates", {key: rates[key] for key in ("covered", "usd_rate", "models")}, judged.rates())
    if csv := newest(folder, "usage", "csv"):
        mine.tree("usage.csv", usage.shown(focus.read(csv)), judged.usage()["keys"])
    if csv := newest(folder, "focus", "csv"):
        rows = focus.read(csv)
        mine.tree("focus/cost", focus.shown(focus.sums(rows)), focus.shown(focus.wanted(judged.costs)))
        tokens = focus.wanted_tokens(rack, period, judged.costs)
        mine.tree("focus/tokens", focus.shown(focus.tokens(rows)), focus.shown(tokens))
    _add(found, period.name, mine)


def _month(rack: Rack, period: Period, folder: Path, found: Outcome) -> None:
    judged = Judged(rack, period)
    theirs = load(folder, "report")
    if theirs is None:
        found.check(f"{period.name}/published", "nothing", "nothing" if judged.empty else "reports")
        return
    before, mine = Judged(rack, period.before()), Outcome()
    of_apis = judged.apis(theirs.get("apis") or {})
    ours = {
        **judged.so_far(),
        "batches": len(judged.counted),
        "covered": judged.covered(),
        "volume": volume.of_month(judged.counted, period, judged.counts),
        "thermal": {"nodes": heat.of_nodes(rack, judged.there, period)},
        "evictions": evictions(judged.counted),
        "distribution": judged.placement(theirs["distribution"]),
        "cost": judged.cost(None if before.empty else before),
        "apis": of_apis,
        "uptime": judged.uptime(),
        "telemetry": judged.telemetry(),
        "swaps": happened.swaps(judged.counted),
        "scorecard": judged.scorecard(of_apis),
    }
    if "figures" in theirs:
        ours["figures"] = judged.figures(of_apis)
        ours["before"] = None if before.empty else before.figures(before.apis(theirs.get("apis") or {}))
    mine.tree("report", theirs, ours)
    _more(mine, theirs)
    _add(found, period.name, mine)


def _more(mine: Outcome, theirs: Found) -> None:
    """What must hold between figures of one document."""
    for one in (theirs.get("apis") or {}).get("models", []):
        for fault in apis.faults(one["hosts"]):
            mine.differences.append((f"apis/{one['model']}/hosts", fault, "does not count"))
    for one in theirs["cost"]["models"]:
        change = one.get("change") or {}
        for terms, now in (("terms", "loaded_per_m"), ("direct_terms", None)):
            if change.get(terms) and now and one.get("last_loaded_per_m"):
                step = float(one[now]) - float(one["last_loaded_per_m"])
                if abs(sum(change[terms].values()) - step) > 2e-6:
                    mine.differences.append((f"cost/{one['model']}/{terms}", sum(change[terms].values()), step))


def _add(found: Outcome, period: str, mine: Outcome) -> None:
    found.compared += mine.compared
    for reason, count in mine.skipped.items():
        found.skipped[reason] = found.skipped.get(reason, 0) + count
    found.differences += [(f"{period}/{path}", theirs, ours) for path, theirs, ours in mine.differences]
    found.verdicts += [(f"{period}/{path}", theirs, ours) for path, theirs, ours in mine.verdicts]
