"""What each client key had, by task class, and what other places had of it."""

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from . import work
from .cost import Costs
from .money import divided, rounded, text
from .raw import Batch, Record
from .work import ZERO, Two

Found = dict[str, Any]
User = tuple[str, str]
_REASONS = ("capacity", "limit", "request")


def of_keys(costs_of: Costs, counted: list[Batch]) -> list[Found]:
    """A name's time and cost by the part of its prefill and decode time that a key and class took."""
    here = [one for batch in counted for one in batch.served]
    away = [one for batch in counted for one in batch.elsewhere]
    busy, money = defaultdict[User, Fraction](Fraction), defaultdict[User, Fraction](Fraction)
    for name in sorted(costs_of.everywhere):
        mine = [one for one in here if one["model"] == name]
        for user, us in _parts(mine, costs_of.work[name]).items():
            busy[user] += us
        paid = [one for one in mine if one.get("worker", "") in costs_of.nodes]
        parts = _parts(paid, costs_of.priced_work(name)) if name in costs_of.paid else {}
        for user, part in divided(
            costs_of.loaded.get(name, ZERO), [at for at in sorted(parts.items()) if at[1]]
        ).items():
            money[user] += part
    whole = sum(work.busy_us(counted).values())
    return [
        _counted(user, here, away)
        | {"busy_s": float(round(busy[user] / 10**6, 3)), "busy_share": float(busy[user] / whole) if whole else None}
        | {"cost": text(money.get(user))}
        for user in sorted({_user(one) for one in (*here, *away)})
    ]


def _user(one: Record) -> User:
    return one.get("key_id", ""), one.get("task_class", "")


def _parts(records: list[Record], took: Two) -> dict[User, Fraction]:
    """Microseconds of each key and class."""
    tokens: dict[User, list[int]] = defaultdict(lambda: [0, 0])
    for one in records:
        both = tokens[_user(one)]
        both[0] += one.get("prompt_tok", 0) - one.get("cached_tok", 0)
        both[1] += one.get("completion_tok", 0)
    whole = [sum(both[kind] for both in tokens.values()) or 1 for kind in (0, 1)]
    return {user: sum((Fraction(took[k] * both[k]) / whole[k] for k in (0, 1)), ZERO) for user, both in tokens.items()}


def _sum(records: list[Record], of: str, where: Callable[[Record], bool] = lambda one: True) -> int:
    return sum(one.get(of, 0) for one in records if where(one))


def _counted(user: User, here: list[Record], away: list[Record]) -> Found:
    here, away = ([one for one in records if _user(one) == user] for records in (here, away))
    both = here + away
    found: Found = {"key_id": user[0], "task_class": user[1]}
    found["requests"] = _sum(here, "requests", lambda one: one.get("outcome", "ok") == "ok")
    found |= {name: _sum(here, name) for name in ("prompt_tok", "cached_tok", "completion_tok")}
    for outcome in ("failed", "cancelled"):
        found[outcome] = _sum(both, "requests", lambda one, it=outcome: one.get("outcome", "ok") == it)  # type: ignore[misc]
    refused = [one for one in both if one.get("outcome", "ok") == "refused"]
    for reason in _REASONS:
        found[f"refused_{reason}"] = _sum(refused, "requests", lambda one, it=reason: one.get("finish") == it)  # type: ignore[misc]
    found["refused_unsaid"] = _sum(refused, "requests", lambda one: one.get("finish") not in _REASONS)
    for where in ("premises", "outside"):
        found[f"{where}_requests"] = _sum(away, "requests", lambda one, it=where: _category(one) == it)  # type: ignore[misc]
    return found | {"provider_usd": text(Fraction(_sum(away, "usd_micro"), 10**6))}


def _category(one: Record) -> str:
    return "premises" if one.get("place_category") == "premises" else "outside"


def of_places(counted: list[Batch]) -> list[Found]:
    """By place, key and class: requests, the place's own tokens, and its charge."""
    groups: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    for one in (record for batch in counted for record in batch.elsewhere):
        groups[one["place"], _category(one), *_user(one)].append(one)
    return [
        dict(zip(("place", "category", "key_id", "task_class"), at, strict=True))
        | {name: _sum(mine, name) for name in ("requests", "prompt_tok", "cached_tok", "completion_tok")}
        | {"answered": _sum(mine, "requests", lambda one: one.get("outcome", "ok") == "ok")}
        | {"usd": text(Fraction(_sum(mine, "usd_micro"), 10**6))}
        for at, mine in sorted(groups.items())
    ]


def shown(rows: list[dict[str, str]]) -> list[Found]:
    """Rows of the CSV with the types of the JSON."""
    counts = (
        "requests",
        "_tok",
        "failed",
        "cancelled",
        "refused_capacity",
        "refused_limit",
        "refused_request",
        "unsaid",
    )
    found = []
    for row in rows:
        one: Found = {key: value for key, value in row.items() if key not in ("period", "currency", "x_SoFarUntil")}
        for key, value in one.items():
            if key.endswith(counts):
                one[key] = int(value)
            elif key.startswith("busy_"):
                one[key] = float(value) if value else None
            elif key == "cost":
                one[key] = value or None
        found.append(one)
    return found


def of_rates(names: dict[str, tuple[Fraction, Fraction, Found]], usd: Fraction) -> dict[str, Found]:
    """Prices of the work of each name with idle time, in dollars; a kind of token that it had none of has the price of
    all kinds."""
    found = {}
    for name, (loaded, direct, prices) in names.items():
        if not direct or prices["loaded_per_m"] is None:
            continue
        kinds = (prices[kind] for kind in ("uncached_per_m", "output_per_m"))
        prompt, answer = (prices["loaded_per_m"] if one is None else one * loaded / direct for one in kinds)
        found[name] = {
            "usd_per_mtok_in": text(rounded(prompt / usd)),
            "usd_per_mtok_cached": "0",
            "usd_per_mtok_out": text(rounded(answer / usd)),
        }
    return found
