"""The figures of a week's and a month's reports, in the shape in which they are published."""

from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any

from . import apis, cost, happened, heat, lives, placed, spans, uptime, usage, verdicts, volume, work
from .cost import Costs
from .lives import Life, Rack
from .money import per_m, text
from .periods import Period
from .raw import Batch

Found = dict[str, Any]


class Judged:
    """A rack in a period: everything that its reports are made of."""

    def __init__(self, rack: Rack, period: Period) -> None:
        self.rack, self.period = rack, period
        self.counted: list[Batch] = rack.ended_in(period.start_ms, period.end_ms)
        self.there: dict[str, Life] = lives.lives(rack, period)
        self.costs: Costs = cost.costs(rack, period)
        self.answered = volume.total(volume.answered(self.counted))
        self.counts = uptime.requests(self.counted)

    @property
    def empty(self) -> bool:
        """Whether no node reported."""
        return not self.counted

    def uptime(self) -> Found:
        """Availability and incidents."""
        until = lives.until(self.rack, self.period)
        nodes = [uptime.of_node(one) for one in self.there.values()]
        return {
            **uptime.of_requests(self.counts),
            **uptime.refused(self.counted),
            "rack": uptime.of_rack(self.there.values()),
            "nodes": nodes,
            "incidents": happened.incidents(self.rack, self.there, self.period, until),
            "desired": happened.desired(self.counted),
            "lost_batches": happened.lost(self.counted),
        }

    def telemetry(self) -> Found:
        """What of a period did not arrive."""
        return happened.telemetry(self.rack, self.counted, lives.until(self.rack, self.period))

    def day(self) -> date:
        """The day whose API prices count."""
        return min(self.period.last - timedelta(days=1), datetime.fromtimestamp(self.period.now_ms / 1000, UTC).date())

    def apis(self, theirs: Found) -> Found:
        """The same work at API hosts; which offers are compared is taken from the report."""
        compared = apis.Compared(self.costs, self.counted, self.rack.settings, self.day())
        models = [compared.of(one["model"], one["hosts"]) for one in theirs.get("models", [])]
        whole = compared.whole(models)
        return whole | {"models": [{k: v for k, v in one.items() if k != "exact"} for one in models]}

    def cost(self, before: "Judged | None") -> Found:
        """Costs by name, node, row and key."""
        one = self.costs
        found = {
            "total": text(one.total),
            "idle": text(one.idle),
            "silent": text(one.silent),
            "average_per_m": text(one.average_per_m),
            "unattributed": text(one.unattributed),
            "unshared": text(one.unshared),
            "tokens": one.whole_tok,
            "busy_share": apis.busy_share(one),
            "models": [self._model(name, before) for name in sorted(one.everywhere)],
            "nodes": [*map(_node, one.nodes.values()), *map(_unpriced, one.unpriced)],
            "rows": [row for node in one.nodes.values() for row in _rows(node, self.tokens_at(node.node))],
            **self.usage(),
        }
        return found | {"unpriced_nodes": [node.node for node in one.unpriced]}

    def usage(self) -> Found:
        """By key and class, and by place."""
        return {"keys": usage.of_keys(self.costs, self.counted), "places": usage.of_places(self.counted)}

    def rates(self) -> Found:
        """What tokens of each name cost in US dollars, as nodes are told."""
        settings = self.rack.settings.get("cost", {})
        usd = Fraction(str(settings.get("usd_rate", 1)))
        prices = {name: self.prices(name) for name in sorted(self.costs.paid)}
        found = usage.of_rates(
            {name: (self.costs.loaded[name], self.costs.direct[name], one) for name, one in prices.items()}, usd
        )
        for name, one in found.items():
            one["tokens"] = self.costs.everywhere[name].whole
        return {"covered": self.covered(), "usd_rate": float(usd), "models": found}

    def tokens_at(self, node: str) -> dict[str, int]:
        """Prompt and answer tokens of each name at a node, over all outcomes."""
        found: dict[str, int] = {}
        for (worker, name, _), one in work.served_tokens(self.counted).items():
            if worker == node:
                found[name] = found.get(name, 0) + one.whole
        return found

    def prices(self, name: str) -> Found:
        """Per million tokens of a name."""
        one = self.costs
        tokens = one.tokens[name]
        direct = per_m(one.direct[name], tokens.whole)
        share = cost.floor_share(name, one, self.counted)
        return {
            "tokens": tokens.whole,
            "cached_per_m": Fraction(0),
            "exact": (one.loaded[name] / (tokens.whole or 1), one.direct[name] / (tokens.whole or 1)),
            "direct_per_m": direct,
            "loaded_per_m": per_m(one.loaded[name], tokens.whole),
            "floor_per_m": None if direct is None else one.direct[name] / tokens.whole * 10**6 * share,
            "uncached_per_m": per_m(one.parts[name][0], tokens.uncached),
            "output_per_m": per_m(one.parts[name][1], tokens.answer),
        }

    def _model(self, name: str, before: "Judged | None") -> Found:
        one, prices = self.costs, self.prices(name)
        tokens, (prefill, decode) = one.everywhere[name], one.work[name]
        answered = volume.by_model(volume.answered(self.counted)).get(name, volume.Sums())
        counts = {"prompt_tok": tokens.prompt, "cached_tok": tokens.cached, "completion_tok": tokens.answer}
        counts |= {"requests": answered.requests}
        if name not in one.paid:  # nothing worked for it at a node with a price
            nothing = dict.fromkeys(("direct", "loaded", "direct_per_m", "loaded_per_m", "floor_per_m"))
            return {"model": name, **counts, "busy_s": round(float((prefill + decode) / 10**6), 3), **nothing}
        money = {"direct": one.direct[name], "loaded": one.loaded[name]}
        at_priced = [r for r in volume.answered(self.counted) if r.get("worker", "") in one.nodes]
        priced = volume.by_model(at_priced).get(name, volume.Sums())
        cut = priced.cut / priced.requests if priced.requests else None
        paid, (paid_prefill, paid_decode) = one.tokens.get(name, work.Tokens()), one.priced_work(name)
        busy = {"prefill_s": float(paid_prefill / 10**6), "decode_s": float(paid_decode / 10**6)}
        factors = {"tokens": paid.whole, "requests": priced.requests, **busy, "cut_share": cut}
        factors |= {"prompt_tok": paid.prompt, "cached_tok": paid.cached, "completion_tok": paid.answer}
        factors |= {what: float(value) for what, value in money.items()}
        factors["busy_s"] = float((paid_prefill + paid_decode) / 10**6)
        nodes = [node for node in one.nodes.values() if name in node.work]
        owned = sum(node.reported_ms + node.unheard_ms for node in nodes)
        factors["reported_share"] = sum(node.reported_ms for node in nodes) / owned if owned else None
        found = {"model": name, **counts, "busy_s": round(float((prefill + decode) / 10**6), 3)}
        found |= {what: text(value) for what, value in (money | prices).items() if what not in ("tokens", "exact")}
        return found | {"factors": factors} | _change(name, prices, before, self.rack.settings.get("cost", {}))

    def scorecard(self, apis_of: Found) -> list[Found]:
        """The promises."""
        figures = {
            **{k: v for k, v in uptime.of_requests(self.counts).items() if k == "request_share"},
            "itl_us": self.answered.itl.quantile(0.95),
            "rack": uptime.of_rack(self.there.values()),
            "throttled": heat.promise(self.counted),
            "swap_s": happened.swaps(self.counted)["longest_s"],
            "saving": apis_of.get("share"),
            "apis": apis_of.get("models", []),
        }
        return verdicts.scorecard(self.rack.settings, figures)

    def placement(self, theirs: Found) -> Found:
        """Memory, load and requests. Which nodes are away, and so hold nothing, is taken from the report."""
        away = (theirs or {}).get("silent", {})
        until = lives.until(self.rack, self.period)
        gone = {node for node, life in self.there.items() if life.known and life.known[-1][1] < until}
        there = {node: life for node, life in self.there.items() if node not in {*away, *gone}}
        seen = {node: [one.end_ms for one in self.rack.of(node) if one.end_ms <= until] for node in away}
        last = {node: max(ends, default=None) for node, ends in seen.items()}
        return {
            "nodes": placed.nodes(self.rack, there, self.period),
            "placed": placed.rows(self.rack, self.there, self.period),
            "silent": last,
        }

    def figures(self, apis_of: Found) -> Found:
        """The headline."""
        rack = uptime.of_rack(self.there.values())
        hot = [one["peak_mc"] for one in heat.of_nodes(self.rack, self.there, self.period)]
        return {
            "requests": self.answered.requests,
            "failed": self.counts["failed"],
            "refused": self.counts["refused"],
            "prompt_tok": self.answered.prompt_tok,
            "completion_tok": self.answered.completion_tok,
            "total": text(self.costs.total),
            "average_per_m": text(self.costs.average_per_m),
            "saving_share": apis_of.get("share"),
            "rack_up": rack["share"],
            "request_share": uptime.of_requests(self.counts)["request_share"],
            "itl_p95_us": self.answered.itl.quantile(0.95),
            "throttled": heat.promise(self.counted),
            "peak_mc": max((one for one in hot if one is not None), default=None),
            "evictions": len(happened.events(self.counted, "model_evicted")),
            "busy_share": apis.busy_share(self.costs),
            "covered": self.covered(),
            "days": len(self.period.days()),
            "blank_days": self.blank_days(),
        }

    def blank_days(self) -> int:
        """Days, but for those to come, on which no node reported and nothing was counted."""
        until = lives.until(self.rack, self.period)
        reported = [span for one in self.there.values() for span in one.reported]
        counted = {one["date"] for one in volume.of_days(self.counted, self.period) if one["requests"]}
        begun = [(s, e) for day, s, e in self.period.days() if s < until and day.isoformat() not in counted]
        return sum(not any(a < end and b > start for a, b in reported) for start, end in begun)

    def so_far(self) -> Found:
        """Until when it is judged, where it is not over."""
        return {} if self.period.over else {"so_far_until_ms": lives.until(self.rack, self.period)}

    def covered(self) -> float | None:
        """The share of all nodes' time that is known or excused."""
        unknown = sum(spans.length(one.unknown) for one in self.there.values())
        whole = sum(spans.length(one.known) for one in self.there.values())
        return (whole - unknown) / whole if whole else None


def _change(name: str, prices: Found, before: Judged | None, settings: Found) -> Found:
    """Against the period before."""
    if before is None or name not in before.costs.everywhere:
        return {"last_loaded_per_m": None}
    last = before.prices(name)
    if not all(prices["exact"]):
        return {"last_loaded_per_m": text(last["loaded_per_m"])}
    ratios = {
        kind: float(prices["exact"][place] / last["exact"][place]) if last["exact"][place] else None
        for place, kind in enumerate(("ratio", "direct_ratio"))
    }
    change = ratios | {"flagged": verdicts.flagged(prices, last, settings)}
    return {"last_loaded_per_m": text(last["loaded_per_m"]), "change": change}


def _node(node: cost.NodeCost) -> Found:
    return {
        "node": node.node,
        "reported_s": node.reported_ms / 1000,
        "busy_s": round(node.busy_us / 10**6, 3),
        "watts": text(node.watts),
        "power": node.source,
        "rate_per_h": text(node.rate_per_h),
        "cost": text(node.cost),
        "idle": text(node.idle),
        "silent": text(node.silent),
        "silent_s": node.unheard_ms / 1000,
    }


def _unpriced(node: cost.NodeCost) -> Found:
    keys = ("node", "reported_s", "busy_s", "watts", "power", "silent_s")
    return {key: value for key, value in _node(node).items() if key in keys}


def _rows(node: cost.NodeCost, tokens: dict[str, int]) -> list[Found]:
    rows = [
        {"node": node.node, "model": name, "kind": "model" if name else "unattributed", "cost": text(money)}
        | {"busy_s": round(float(sum(node.work[name]) / 10**6), 3), "quiet_s": 0.0, "tokens": tokens.get(name, 0)}
        for name, money in node.rows.items()
    ]
    idle_s = max(0.0, node.reported_ms / 1000 - node.busy_us / 10**6)
    quiet = [("idle", idle_s, node.idle), ("silent", node.unheard_ms / 1000, node.silent)]
    return rows + [
        {"node": node.node, "model": "", "kind": kind, "cost": text(money), "quiet_s": round(seconds, 3)}
        | {"busy_s": 0.0, "tokens": 0}
        for kind, seconds, money in quiet
        if seconds or money
    ]
