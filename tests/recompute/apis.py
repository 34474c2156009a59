"""What API hosts would have charged for the same work."""

from collections import defaultdict
from datetime import UTC, date, datetime, time
from fractions import Fraction
from typing import Any

from genai_prices import data_snapshot, types

from .cost import Costs
from .money import rounded, text
from .raw import Batch
from .volume import Sums, total

Buckets = dict[int, Sums]
MILLION = 10**6


def answered(counted: list[Batch], nodes: set[str]) -> dict[str, Buckets]:
    """Answered work on priced nodes, by name and prompt size."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for one in (record for batch in counted for record in batch.served):
        if one.get("outcome", "ok") == "ok" and one.get("worker", "") in nodes:
            found[one["model"]][one.get("prompt_bucket_tok", 0)].append(one)
    return {name: {size: total(mine) for size, mine in by.items()} for name, by in sorted(found.items())}


def charge(provider: str, model: str, buckets: Buckets, day: date) -> Fraction | None:
    """What an offer costs, in dollars, at the prices of the end of that day."""
    offer = find(provider, model)
    if offer is None:
        return None
    price = offer.get_prices(datetime.combine(day, time(23, 59, 59), UTC))
    return sum((rounded(_bucket(price, sums)) for sums in buckets.values()), Fraction())


def find(provider: str, model: str) -> types.ModelInfo | None:
    """An offer by the ids of company and model."""
    for one in data_snapshot.get_snapshot().providers:
        if one.id == provider:
            exact = (offer for offer in one.models if offer.id == model)
            return next(exact, None) or one.find_model(model)
    return None


def _bucket(price: types.ModelPrice, sums: Sums) -> Fraction:
    """So many requests of mean size."""
    if not sums.requests:
        return Fraction()
    size = Fraction(sums.prompt_tok, sums.requests)
    fresh, read, write, out = (
        _at(getattr(price, f"{name}_mtok"), size) for name in ("input", "cache_read", "cache_write", "output")
    )
    into = fresh or Fraction()
    cached = into if read is None else read
    computed = write if write is not None and sums.cached_tok else into
    cost = (sums.prompt_tok - sums.cached_tok) * computed + sums.cached_tok * cached
    each = _at(getattr(price, "requests_kcount", None), size)
    return (cost + sums.completion_tok * (out or 0)) / MILLION + sums.requests * (each or Fraction()) / 1000


def _at(price: Any, size: Fraction) -> Fraction | None:
    """The price of a tier: that of the size of a prompt."""
    if isinstance(price, types.TieredPrices):
        reached = [tier.price for tier in price.tiers if size > tier.start]
        return Fraction(reached[-1] if reached else price.base)
    return None if price is None else Fraction(price)


def faults(offers: list[dict[str, Any]]) -> list[str]:
    """Offers that must not count, by what the price library says of them."""
    found = []
    companies = [one["provider"] for one in offers]
    for one in offers:
        offer = find(one["provider"], one["model"])
        if companies.count(one["provider"]) > 1:
            found.append(f"{one['provider']} counts more than once")
        if offer is not None and offer.deprecated:
            found.append(f"{one['provider']}: {one['model']} is deprecated")
        if not float(one["cost"]):
            found.append(f"{one['provider']}: {one['model']} is free")
    return found


class Compared:
    """Names against hosts and frontier models. ``offers`` are those that the report compared with, by name: which model
    of a host is "the same" is no figure."""

    def __init__(self, costs: Costs, counted: list[Batch], settings: dict[str, Any], day: date) -> None:
        self.costs, self.settings, self.day = costs, settings, day
        self.work = answered(counted, set(costs.nodes))
        self.rate = Fraction(settings.get("cost", {}).get("usd_rate", 1))
        self.tables = {one["model"]: one for one in settings.get("compare", [])}

    def of(self, name: str, offers: list[dict[str, Any]]) -> dict[str, Any]:
        """One name; one without work on priced nodes is compared with nothing."""
        if not any(one.tokens for one in self.work.get(name, {}).values()):
            nothing = dict.fromkeys(("median", "saving", "share", "frontier_cost", "times_cheaper", "frontier_share"))
            paid = self.costs.loaded.get(name, Fraction()) if name in self.costs.paid else None
            return {"model": name, "ours": None if paid is None else text(paid), "hosts": [], **nothing}
        hosts = sorted((self._host(name, one) for one in offers), key=lambda h: (h["exact"], h["provider"]))
        ours = self.costs.loaded.get(name, Fraction())
        found: dict[str, Any] = {"model": name, "hosts": [self._shown(h) for h in hosts]}
        found["ours"] = text(ours) if name in self.costs.paid else None
        if hosts:
            prices = [rounded(h["exact"]) for h in hosts]
            middle = prices[(len(prices) - 1) // 2]
            found |= {"median": text(middle), "lowest": text(prices[0]), "highest": text(prices[-1])}
            found |= {"saving": text(middle - ours), "share": float((middle - ours) / middle), "exact": middle}
        return found | self._frontier(name, ours)

    def _host(self, name: str, offer: dict[str, Any]) -> dict[str, Any]:
        cost = charge(offer["provider"], offer["model"], self.work.get(name, {}), self.day)
        if cost is None:
            cost = self._configured(name, offer) / self.rate
        return {"provider": offer["provider"], "model": offer["model"], "exact": cost * self.rate}

    @staticmethod
    def _shown(host: dict[str, Any]) -> dict[str, Any]:
        return {"provider": host["provider"], "model": host["model"], "cost": text(rounded(host["exact"]))}

    def _configured(self, name: str, offer: dict[str, Any]) -> Fraction:
        """By a price of the operator, in the rack's currency."""
        own = [one for one in self.settings.get("api_prices", []) if one["model"] == name]
        own = [one for one in own if one["name"] in (offer["model"], offer["provider"])]
        sums = self.work.get(name, {}).values()
        into, out = sum(one.prompt_tok for one in sums), sum(one.completion_tok for one in sums)
        return (
            sum((Fraction(p["input_per_m"]) * into + Fraction(p["output_per_m"]) * out for p in own), Fraction())
            / MILLION
        )

    def _frontier(self, name: str, ours: Fraction) -> dict[str, Any]:
        wanted = self.tables.get(name, {}).get("frontier")
        if not wanted:
            return {"frontier_cost": None, "times_cheaper": None, "frontier_share": None}
        provider, _, model = str(wanted).partition("/")
        cost = charge(provider, model, self.work.get(name, {}), self.day)
        if cost is None:
            return {}
        there = rounded(cost * self.rate)
        times = float(there / ours) if ours else None
        share = float((there - ours) / there) if there else None
        return {"frontier": wanted, "frontier_cost": text(there), "times_cheaper": times, "frontier_share": share}

    def whole(self, models: list[dict[str, Any]]) -> dict[str, Any]:
        """Over all names that can be compared."""
        tokens = {name: sum(one.tokens for one in by.values()) for name, by in self.work.items()}
        like = [one for one in models if one.get("exact") is not None]
        share = Fraction(sum(tokens.get(one["model"], 0) for one in like), sum(tokens.values()) or 1)
        if not like:
            covered = 0.0 if sum(tokens.values()) else None
            busy = busy_share(self.costs)
            return {"median": None, "saving": None, "share": None, "covered": covered, "busy_share": busy}
        ours, middle = rounded(self.costs.total * share), sum((one["exact"] for one in like), Fraction())
        found = {"covered": float(share), "ours": text(ours), "median": text(middle), "saving": text(middle - ours)}
        return found | {"share": float((middle - ours) / middle), **self._busy(ours, middle)}

    def _busy(self, ours: Fraction, middle: Fraction) -> dict[str, Any]:
        busy = busy_share(self.costs)
        return {"busy_share": busy, "break_even": None if busy is None else busy * float(ours / middle)}


def busy_share(costs: Costs) -> float | None:
    """Mean of the priced nodes, by time, of which each is busy for at most all; busy seconds are known to the ms."""
    reported = sum(one.reported_ms for one in costs.nodes.values())
    busy = sum(min(round(one.busy_us / 1000), one.reported_ms) for one in costs.nodes.values())
    return busy / reported if reported else None
