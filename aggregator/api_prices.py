"""Cost of the same work at API providers: offline, dated, by prompt size. Pure except for genai-prices, which ships
its own data and is never asked to update them.

Prices are tiered (at some providers a prompt over 200,000 tokens costs more per token), so work is not priced as one
sum: each prompt size bucket is priced as that many requests of its mean size. Cached prompt tokens are priced as
cached: a prompt cache hit here is assumed to be one there.
"""

import re
import statistics
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from importlib.metadata import version

import genai_prices
import msgspec
from genai_prices import data_snapshot

from aggregator.config import AggregatorConfig, ApiPrice, decimal
from aggregator.cost import MILLION, CostReport, ModelCost, rounded
from aggregator.window import ServedSum, Window

SOURCE = f"genai-prices {version('genai-prices')}"
_TAIL = re.compile(r"([-_:]?(instruct|turbo|instant|versatile|it|fp8|bf16|fast|awq|chat|hf|v1:0))+$")


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's offer of a model and the cost of the span's work there."""

    provider: str
    model: str
    cost: Decimal


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A served name compared with APIs. ``median`` is the cost of the same open model at the median host, ``hosts`` are
    all of them, cheapest first; ``frontier`` is a different, configured model. ``saving`` is the median's cost minus
    ours, negative where an API would have been cheaper; ``share`` is ``saving`` / ``median``."""

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
    why_not: str = ""


class Comparisons(msgspec.Struct, frozen=True, kw_only=True):
    """All comparisons. ``covered`` is the share of tokens with a comparable price; savings cover only those. ``ours``
    is their share of the total cost of the nodes. ``source`` and ``at`` are the origin and date of the prices."""

    source: str
    at: str
    covered: float | None
    ours: Decimal | None
    median: Decimal | None
    saving: Decimal | None
    share: float | None
    models: tuple[Comparison, ...]


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
    return Comparisons(
        source=SOURCE,
        at=at.date().isoformat(),
        covered=covered / total if total else None,
        ours=ours,
        median=median,
        saving=saving,
        share=float(saving / median) if saving is not None and median else None,
        models=tuple(rows),
    )


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
    usage = genai_prices.Usage(
        input_tokens=prompt_tok // requests,
        cache_read_tokens=min(cached_tok, prompt_tok) // requests,
        output_tokens=completion_tok // requests,
    )
    whole = max(1, prompt_tok // requests + completion_tok // requests)
    try:
        found = genai_prices.calc_price(usage, model_ref=model, provider_id=provider, genai_request_timestamp=at)
    except (LookupError, ValueError):
        return None
    # corrects for the integer division of the means
    exact = Decimal(prompt_tok + completion_tok) / (whole * requests)
    return rounded(found.total_price * requests * exact)


def _one(served: Sequence[ServedSum], model: ModelCost, config: AggregatorConfig, at: datetime) -> Comparison:
    rate = decimal(config.cost.usd_rate) if config.cost.usd_rate is not None else None
    if rate is None and config.cost.currency == "USD":
        rate = Decimal(1)
    own = next((p for p in config.api_prices if p.model == model.model), None)
    wish = next((c for c in config.compare if c.model == model.model), None)
    found = Comparison(model=model.model, ours=model.loaded)
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
        times = float(cost_there / model.loaded) if cost_there and model.loaded else None
        found = msgspec.structs.replace(found, frontier=wish.frontier, frontier_cost=cost_there, times_cheaper=times)
    return found


def _with_hosts(found: Comparison, same_as: str, hosts: Sequence[Host]) -> Comparison:
    """With the figures of the hosts, cheapest first."""
    if not (costs := [h.cost for h in hosts]):
        return msgspec.structs.replace(found, same_as=same_as)
    median = rounded(Decimal(statistics.median(costs)))
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
    """Every priced offer: provider, model, and the model's normalised name."""
    found = [
        (provider.id, model.id, _plain(model.id))
        for provider in data_snapshot.get_snapshot().providers
        for model in provider.models
        if not str(model.id).endswith(":free")
    ]
    return tuple(sorted(found))


def _plain(name: str) -> str:
    """A model's name without vendor, host path and variant."""
    last = name.lower().rsplit("/", 1)[-1].removeprefix("@cf/").split(":free")[0]
    last = re.sub(r"^(meta-|qwen\.|meta\.|google\.|openai\.|mistral\.)", "", last)
    return _TAIL.sub("", last)
