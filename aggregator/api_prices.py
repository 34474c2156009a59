"""Cost of the same work at API providers: offline, dated, by prompt size. Pure except for genai-prices, which ships
its own data and is never asked to update them.

Prices are tiered (at some providers a prompt over 200,000 tokens costs more per token), so work is not priced as one
sum: each prompt size bucket is priced as that many requests of its mean size. Cached prompt tokens are priced as
cached: a prompt cache hit here is assumed to be one there, and where a provider charges for writing its cache, the
other prompt tokens of a bucket with hits are written. Of what a provider offers, free and deprecated models do not
count. The library does not say when its prices were gathered: its version does, and `at` is the day asked about.
"""

import re
import statistics
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from importlib.metadata import version
from typing import Literal

import genai_prices
import msgspec
from genai_prices import data_snapshot

from aggregator.allocation import MILLION, rounded
from aggregator.config import AggregatorConfig, ApiPrice, decimal
from aggregator.cost import CostReport, ModelCost
from aggregator.phrases import percent
from aggregator.window import ServedSum, Window

SOURCE = f"genai-prices {version('genai-prices')}"
_TAIL = re.compile(r"([-_:]?(instruct|turbo|instant|versatile|it|fp8|bf16|fast|awq|chat|hf|v1:0))+$")


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's offer of a model and the cost of the span's work there."""

    provider: str
    model: str
    cost: Decimal


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A served name compared with APIs. ``median`` is the cost of the same open model at the host in the middle (of
    two, the cheaper), ``hosts`` are all of them, cheapest first; ``frontier`` is a different, configured model.
    ``saving`` is the median's cost minus ours, negative where an API would have been cheaper; ``share`` is ``saving`` /
    ``median``. ``times_cheaper`` is the frontier model's cost / ours, ``frontier_share`` what is saved against it, as a
    share."""

    model: str
    ours: Decimal | None
    same_as: str = ""
    median: Decimal | None = None
    lowest: Decimal | None = None
    highest: Decimal | None = None
    hosts: tuple[Host, ...] = ()
    saving: Decimal | None = None
    share: float | None = None
    frontier: str = ""
    frontier_cost: Decimal | None = None
    times_cheaper: float | None = None
    frontier_share: float | None = None
    why_not: str = ""


class Comparisons(msgspec.Struct, frozen=True, kw_only=True):
    """All comparisons. ``covered`` is the share of tokens with a comparable price; savings cover only those. ``ours``
    is their share of the total cost of the nodes. ``source`` is the origin of the prices, ``at`` the day asked about.
    ``verdict`` is "dearer" where ``saving`` is negative. ``break_even`` is how busy the nodes would have to be, at the
    same pace, for both to cost the same, and ``busy_share`` how busy they were; above 1 it cannot be reached."""

    source: str
    at: str
    covered: float | None
    ours: Decimal | None
    median: Decimal | None
    saving: Decimal | None
    share: float | None
    models: tuple[Comparison, ...]
    verdict: Literal["cheaper", "dearer", "unknown"] = "unknown"
    break_even: float | None = None
    busy_share: float | None = None


def compare(window: Window, money: CostReport, config: AggregatorConfig, at: datetime) -> Comparisons:
    """Price the span's answered work at APIs, with the prices at that time. Work of nodes without a configured price is
    excluded on both sides."""
    priced = {node.node for node in money.nodes if node.cost is not None}
    served = [s for s in window.served if s.outcome == "ok" and s.worker in priced]
    rows = [_one([s for s in served if s.model == model.model], model, config, at) for model in money.models]
    tokens = {m.model: sum(s.prompt_tok + s.completion_tok for s in served if s.model == m.model) for m in money.models}
    known = [r for r in rows if r.median is not None and r.ours is not None]
    total, covered = sum(tokens.values()), sum(tokens[r.model] for r in known)
    # idle time and lost work cost money, too, whichever model they are attributed to
    ours = rounded(money.total * covered / total) if money.total is not None and covered else None
    median = sum((r.median for r in known if r.median is not None), Decimal(0)) if known else None
    saving = median - ours if median is not None and ours is not None else None
    busy = money.busy_share
    return Comparisons(
        source=SOURCE,
        at=at.date().isoformat(),
        covered=covered / total if total else None,
        ours=ours,
        median=median,
        saving=saving,
        share=float(saving / median) if saving is not None and median else None,
        models=tuple(rows),
        verdict="unknown" if saving is None else "dearer" if saving < 0 else "cheaper",
        break_even=busy * float(ours / median) if busy is not None and ours is not None and median else None,
        busy_share=busy,
    )


def against(saving: float, other: str) -> str:
    """A saving as a share of another price: "12.3 % less than it"; where it is many times the other, "188 times as much
    as it"."""
    if saving < -1:
        return f"{1 - saving:,.{0 if saving < -9 else 1}f} times as much as {other}"
    if abs(saving) < 0.0005:
        return f"as much as {other}"
    return f"{abs(saving):.1%} {'less' if saving > 0 else 'more'} than {other}".replace("%", " %", 1)


def utilisation(found: Comparisons) -> str:
    """How busy the nodes were, and how busy they would have to be; "" where that is not known."""
    busy, limit = found.busy_share, found.break_even
    if busy is None or limit is None:
        return ""
    if found.verdict == "cheaper":
        return f"{percent(busy)} busy now; cheaper than API hosts down to {percent(limit)}"
    if limit > 1:
        return f"{percent(busy)} busy now; not cheaper than API hosts even when fully busy"
    return f"{percent(busy)} busy now; cheaper than API hosts above {percent(limit)}"


def hosts_of(same_as: str) -> list[tuple[str, str]]:
    """(provider, model) of every host of this open model; a host that is listed under two names appears with all of its
    offers, of which `_cheapest` takes one."""
    wanted = _plain(same_as)
    return [(provider, model) for provider, model, plain in _offers() if plain == wanted]


def hosts(
    same_as: str, *, requests: int, prompt_tok: int, cached_tok: int, completion_tok: int, at: datetime
) -> list[Host]:
    """The cheapest offer of each host of an open model for this work (as in `price`) in USD, cheapest first."""
    counts = {"prompt_tok": prompt_tok, "cached_tok": cached_tok, "completion_tok": completion_tok}
    offers = [(p, m, price(p, m, requests=requests, at=at, **counts)) for p, m in hosts_of(same_as)]
    return _cheapest([Host(provider=p, model=m, cost=cost) for p, m, cost in offers if cost is not None])


def company(provider: str) -> str:
    """The company behind a provider id: some hosts are listed again behind a router."""
    return provider.removeprefix("huggingface_").removesuffix("-ai")


def _cheapest(hosts: Sequence[Host]) -> list[Host]:
    """The cheapest offer of each company. Free offers are not prices."""
    best: dict[str, Host] = {}
    for host in sorted(hosts, key=lambda h: (h.cost, h.provider, h.model)):
        if host.cost > 0:
            best.setdefault(company(host.provider), host)
    return list(best.values())


def price(
    provider: str, model: str, *, requests: int, prompt_tok: int, cached_tok: int, completion_tok: int, at: datetime
) -> Decimal | None:
    """Cost of ``requests`` equal requests, None without a price. Token counts are totals over all of them."""
    if not requests:
        return Decimal(0)
    # exact means: of whole ones, an answer of 1.9 tokens would be priced as one of 1
    prompt, answer = (Decimal(tokens) / requests for tokens in (prompt_tok, completion_tok))
    cached = Decimal(min(cached_tok, prompt_tok)) / requests
    usage = genai_prices.Usage(
        input_tokens=prompt,
        cache_read_tokens=cached,
        # what is not read from the provider's cache is written to it; most charge nothing for that
        cache_write_tokens=prompt - cached if cached_tok else Decimal(0),
        output_tokens=answer,
    )
    try:
        found = genai_prices.calc_price(usage, model_ref=model, provider_id=provider, genai_request_timestamp=at)
    except (LookupError, ValueError):
        return None
    # means have 28 digits: what they lack must not decide a tie
    return rounded(round(found.total_price * requests, 15))


def _one(served: Sequence[ServedSum], model: ModelCost, config: AggregatorConfig, at: datetime) -> Comparison:
    rate = decimal(config.cost.usd_rate) if config.cost.usd_rate is not None else None
    if rate is None and config.cost.currency == "USD":
        rate = Decimal(1)
    own = next((p for p in config.api_prices if p.model == model.model), None)
    wish = next((c for c in config.compare if c.model == model.model), None)
    found = Comparison(model=model.model, ours=model.loaded)
    if not any(s.prompt_tok + s.completion_tok for s in served):
        # no work costs nothing anywhere, which is not a free offer
        why = "nothing was answered at a node with a price"
        same_as = own.name if own is not None else wish.same_as if wish is not None else ""
        frontier = wish.frontier if wish is not None else ""
        return msgspec.structs.replace(found, same_as=same_as, frontier=frontier, why_not=why)
    if own is not None:
        host = Host(provider="configured", model=own.name, cost=_configured(own, served))
        found = _with_hosts(found, own.name, [host])
    elif wish is not None and rate is None:
        why = f"API prices are in USD; set cost.usd_rate ({config.cost.currency} per USD)"
        found = msgspec.structs.replace(found, same_as=wish.same_as, why_not=why)
    elif wish is not None and wish.same_as and rate is not None:
        offers = [(p, m, _at(p, m, served, at)) for p, m in hosts_of(wish.same_as)]
        hosts = _cheapest([Host(provider=p, model=m, cost=rounded(c * rate)) for p, m, c in offers if c is not None])
        found = _with_hosts(found, wish.same_as, hosts)
        if not hosts:
            found = msgspec.structs.replace(found, why_not=f"{SOURCE} has no price for any host of {wish.same_as}")
    else:
        found = msgspec.structs.replace(found, why_not="no [[compare]] entry")
    if wish is not None and wish.frontier and rate is not None:
        provider, _, name = wish.frontier.partition("/")
        dollars = _at(provider, name, served, at)
        cost_there = rounded(dollars * rate) if dollars is not None else None
        found = msgspec.structs.replace(
            found,
            frontier=wish.frontier,
            frontier_cost=cost_there,
            times_cheaper=float(cost_there / model.loaded) if cost_there and model.loaded else None,
            frontier_share=float(1 - model.loaded / cost_there) if cost_there and model.loaded is not None else None,
        )
    return found


def _with_hosts(found: Comparison, same_as: str, hosts: Sequence[Host]) -> Comparison:
    """With the figures of the hosts, cheapest first."""
    if not (costs := [h.cost for h in hosts]):
        return msgspec.structs.replace(found, same_as=same_as)
    median = statistics.median_low(costs)
    saving = median - found.ours if found.ours is not None else None
    return msgspec.structs.replace(
        found,
        same_as=same_as,
        median=median,
        lowest=costs[0],
        highest=costs[-1],
        hosts=tuple(hosts),
        saving=saving,
        share=float(saving / median) if saving is not None and median else None,
    )


def _at(provider: str, model: str, served: Sequence[ServedSum], at: datetime) -> Decimal | None:
    """The work priced by prompt size bucket; None if any bucket has no price."""
    total = Decimal(0)
    for bucket in sorted({s.prompt_bucket_tok for s in served}):
        mine = [s for s in served if s.prompt_bucket_tok == bucket]
        part = price(
            provider,
            model,
            requests=sum(s.requests for s in mine),
            prompt_tok=sum(s.prompt_tok for s in mine),
            cached_tok=sum(s.cached_tok for s in mine),
            completion_tok=sum(s.completion_tok for s in mine),
            at=at,
        )
        if part is None:
            return None
        total += part
    return total


def _configured(own: ApiPrice, served: Sequence[ServedSum]) -> Decimal:
    prompt, completion = sum(s.prompt_tok for s in served), sum(s.completion_tok for s in served)
    return rounded((decimal(own.input_per_m) * prompt + decimal(own.output_per_m) * completion) / MILLION)


@lru_cache(maxsize=1)
def _offers() -> tuple[tuple[str, str, str], ...]:
    """Every priced offer that is not deprecated: provider, model, and the model's normalised name."""
    found = [
        (provider.id, model.id, _plain(model.id))
        for provider in data_snapshot.get_snapshot().providers
        for model in provider.models
        if not str(model.id).endswith(":free") and not model.deprecated
    ]
    return tuple(sorted(found))


def _plain(name: str) -> str:
    """A model's name without vendor, host path and variant."""
    last = name.lower().rsplit("/", 1)[-1].removeprefix("@cf/").split(":free")[0]
    last = re.sub(r"^(meta-|qwen\.|meta\.|google\.|openai\.|mistral\.)", "", last)
    return _TAIL.sub("", last)
