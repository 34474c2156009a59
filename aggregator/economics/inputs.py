"""What was asked, and the figures that follow: each that nobody gave becomes an assumption with its source. Pure but
for genai-prices, as aggregator/api_prices.py.
"""

import math
import re
import statistics
from datetime import datetime
from decimal import Decimal

import msgspec

from aggregator import api_prices
from aggregator.config import Cost, decimal
from aggregator.economics import capacity
from aggregator.economics.capacity import MONTH_S, Model, Node, Work
from aggregator.packing import CAP
from shared.errors import Refused

FRONTIER, NOT_COMPARED, DOLLARS = "openai/gpt-4o", "none", "USD"
NODE_CHIP, NODE_MEMORY_GB, NODE_PRICE_USD, NODE_W = "M4 Pro", 64.0, 2_000.0, 60.0
MILLION = 1e6
MOST, LEAST_PRICE = 1e15, 1e-4
"""Larger amounts, and lower prices of a million tokens that are not zero, are typing errors."""
_REQUESTS, _REQUEST_TOK = 2_500, 4_000
"""The work that is priced: so many requests of so many tokens (a few hosts charge long prompts more for each token)."""
_CONTRADICTION = 0.05
"""Spend, tokens and price that differ by more than this share contradict each other."""
_CHOICE = "a choice; your own figure replaces it"
_USUAL: dict[str, tuple[float, str]] = {
    "kept": (0.8, "a choice: a fifth of the work stays with a frontier model"),
    "growth": (0.0, "a choice: the API work stays as it is"),
    "cached": (0.0, "a choice: no part of a prompt repeats"),
    "duty": (0.33, "eight of 24 hours as busy as the busiest five minutes, nothing in the others"),
    "setup": (0.0, _CHOICE),
    "other_per_month": (0.0, _CHOICE),
    "people_per_month": (0.0, "a choice: no time of staff is counted"),
    "residual": (0.2, _CHOICE),
    "months": (36.0, "a usual time of depreciation for computers"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "nodes": (1, 100_000),
    "months": (1, 240),
    "growth": (-0.5, 1),
    "duty": (0.05, 1),
    "bits": (1, 32),
    "kv_kib_per_tok": (0.001, 100_000),
    "node_tok_s": (0.001, 1e9),
    "usd_rate": (1e-6, 1e6),
    **dict.fromkeys(("kept", "residual"), (0.0, 1.0)),
    "cached": (0.0, 0.999),
}


class Inputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What somebody gave; None is what nobody did. Each is an option of the command line. Money is in ``currency``,
    prices are for a million tokens, shares from 0 to 1, ``mix`` is prompt tokens to answer tokens like "3:1"."""

    nodes: int
    api_spend: float | None = None
    tokens: float | None = None
    price_per_m: float | None = None
    input_per_m: float | None = None
    cached_per_m: float | None = None
    output_per_m: float | None = None
    api_model: str | None = None
    growth: float | None = None
    kept: float | None = None
    mix: str | None = None
    cached: float | None = None
    duty: float | None = None
    model_class: str | None = None
    bits: float | None = None
    kv_kib_per_tok: float | None = None
    same_as: str | None = None
    chip: str | None = None
    memory: float | None = None
    node_tok_s: float | None = None
    node_price: float | None = None
    setup: float | None = None
    watts: float | None = None
    electricity_per_kwh: float | None = None
    other_per_month: float | None = None
    people_per_month: float | None = None
    residual: float | None = None
    months: int | None = None
    currency: str | None = None
    usd_rate: float | None = None


class Assumption(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that nobody gave, and where it comes from."""

    name: str
    value: float | str
    source: str


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Every number of the calculation. ``node_tok_s`` is what a node computes that works all the time, 0 where the
    model does not fit; ``duty`` is the mean load as a share of the load in the busiest five minutes, in which a node
    may be busy for CAP. ``hosts_per_m`` is the price of the same open model at the median API host."""

    api_spend: float
    tokens: float
    price_per_m: float
    nodes: int
    node_tok_s: float
    duty: float
    kept: float
    growth: float
    node_price: float
    setup: float
    watts: float
    electricity_per_kwh: float
    other_per_month: float
    people_per_month: float
    residual: float
    months: int
    hosts_per_m: float | None = None

    @property
    def full_tok(self) -> float:
        """Tokens per month of all nodes if they worked all the time."""
        return self.node_tok_s * MONTH_S * self.nodes

    @property
    def capacity_tok(self) -> float:
        """Tokens per month that all nodes can carry at a utilisation that is realistic."""
        return self.full_tok * CAP * self.duty


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """``inputs`` is what was given, ``assumptions`` what was not, ``figures`` both; the model, work and node they are
    for; the open model whose price at API hosts is compared ("" for none); the currency per US dollar, if known."""

    inputs: Inputs
    assumptions: tuple[Assumption, ...]
    figures: Figures
    model: Model
    work: Work
    node: Node
    same_as: str
    currency: str
    usd_rate: float | None


class _Book:
    """Takes each figure as given or, with its source, as assumed. ``missing`` are flags without which US dollars would
    be taken for another currency."""

    def __init__(self, inputs: Inputs, configured_rate: float | None) -> None:
        self.inputs, self.assumed, self.missing = inputs, list[Assumption](), list[str]()
        self.currency = inputs.currency or DOLLARS
        self.foreign = self.currency != DOLLARS
        self.rate = (inputs.usd_rate or configured_rate) if self.foreign else 1.0
        if inputs.currency is None:
            self.assume("currency", DOLLARS, "that of list prices and API prices")
        if self.foreign and inputs.usd_rate is None and configured_rate is not None:
            self.assume("usd_rate", configured_rate, "cost.usd_rate of the configuration")

    def assume(self, name: str, value: float | str, source: str) -> None:
        self.assumed.append(Assumption(name=name, value=value, source=source))

    def number(self, name: str, usual: float, source: str) -> float:
        value: float | None = getattr(self.inputs, name)
        if value is None:
            self.assume(name, usual, source)
        return usual if value is None else float(value)

    def usual(self, name: str) -> float:
        return self.number(name, *_USUAL[name])

    def dollars(self, name: str, usd: float, source: str) -> float:
        """A price, given in the currency or assumed in US dollars."""
        if getattr(self.inputs, name) is None and self.rate is None:
            self.missing.append(f"--{name.replace('_', '-')} in {self.currency}")
        told = f"{source}; {usd:g} USD at {self.rate} {self.currency} per USD" if self.foreign else source
        return self.number(name, self.converted(usd), told)

    def converted(self, usd: float) -> float:
        """US dollars in the currency; without a rate the run ends with what is missing."""
        return float(decimal(usd) * decimal(self.rate or 1.0))


def settle(inputs: Inputs, at: datetime, configured_rate: float | None = None) -> Settled:
    """The figures of what was given, with API prices of that time; ``configured_rate`` holds where no usd-rate was
    given. Raises Refused for what is impossible, contradictory or missing."""
    check(inputs)
    book = _Book(inputs, configured_rate)
    work, model, duty = _work(book), _model(book), book.usual("duty")
    node, node_price, watts = _node(book, CAP * duty)
    price_per_m = _price(book, work, at)
    electricity = book.dollars("electricity_per_kwh", Cost().electricity_per_kwh, "the default of [cost]")
    if book.missing:
        missing = ", ".join(book.missing)
        raise Refused(f"economics: without --usd-rate ({book.currency} per US dollar) give {missing}")
    node_tok_s = inputs.node_tok_s or book.number("node_tok_s", *capacity.node_tok_s(model, work, node))
    same_as, hosts_per_m = _like_for_like(book, model, work, at)
    spend, tokens = _volume(inputs, price_per_m)
    figures = Figures(
        api_spend=spend,
        tokens=tokens,
        price_per_m=price_per_m,
        nodes=inputs.nodes,
        node_tok_s=node_tok_s if model.need_bytes <= node.budget_bytes else 0.0,
        node_price=node_price,
        watts=watts,
        electricity_per_kwh=electricity,
        hosts_per_m=hosts_per_m,
        duty=duty,
        months=int(book.usual("months")),
        **{name: book.usual(name) for name in _USUAL if name not in ("duty", "months", "cached")},
    )
    return Settled(
        inputs=inputs,
        assumptions=tuple(book.assumed),
        figures=figures,
        model=model,
        work=work,
        node=node,
        same_as=same_as,
        currency=book.currency,
        usd_rate=book.rate,
    )


def check(inputs: Inputs) -> None:
    """Raises Refused for impossible figures, naming each."""
    fields = {name: getattr(inputs, name) for name in inputs.__struct_fields__}
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
    if not all(map(math.isfinite, numbers.values())):
        raise Refused("economics: every figure must be a finite number")
    found = [
        f"{name}: must be from {least:g} to {most:,.16g}"
        for name, (least, most) in _RANGES.items()
        if not least <= numbers.get(name, least) <= most
    ]
    others = {name: value for name, value in numbers.items() if name not in _RANGES}
    found += [f"{name}: must not be below zero" for name, value in others.items() if value < 0]
    found += [f"{name}: must be at most {MOST:g}" for name, value in others.items() if value > MOST]
    if not re.fullmatch(r"[A-Z]{3}", inputs.currency or DOLLARS):
        found.append("currency: must be three letters like EUR")
    elif (inputs.currency or DOLLARS) == DOLLARS and inputs.usd_rate not in (None, 1):
        found.append("usd_rate: is for another currency than USD")
    if found:
        raise Refused("economics: " + "; ".join(one.replace("_", "-") for one in found))


def _work(book: _Book) -> Work:
    mix = book.inputs.mix
    if mix is None:
        mix = "3:1"
        book.assume("mix", mix, "a choice: the mix that published blended API prices are often for")
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?):(\d{1,9}(?:\.\d+)?)", mix)
    prompt, answer = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not prompt + answer:
        raise Refused(f"economics: mix {mix!r}; give prompt tokens to answer tokens, like 3:1")
    return Work(prompt=prompt / (prompt + answer), answer=answer / (prompt + answer), cached=book.usual("cached"))


def _model(book: _Book) -> Model:
    """The model that takes over the work."""
    if (name := book.inputs.model_class) is None:
        name = "8B"
        book.assume("model_class", name, "a choice; a larger one is slower and may not fit")
    found = capacity.model(name)
    bits = book.number("bits", found.bits, "4-bit quantisation in groups of 64 with a scale and a bias")
    kv = found.kv_kib_per_tok
    if not found.example or book.inputs.kv_kib_per_tok is not None:
        kv = book.number("kv_kib_per_tok", kv, "that of the nearest class in size")
    return msgspec.structs.replace(found, bits=bits, kv_kib_per_tok=kv)


def _counts(work: Work) -> dict[str, int]:
    """The work as API prices take it."""
    prompt = round(_REQUEST_TOK * work.prompt)
    counts = {"prompt_tok": prompt, "cached_tok": round(prompt * work.cached), "completion_tok": _REQUEST_TOK - prompt}
    return {"requests": _REQUESTS, **{name: _REQUESTS * tok for name, tok in counts.items()}}


def _per_m(cost: Decimal) -> float:
    return float(cost) / (_REQUESTS * _REQUEST_TOK) * MILLION


def _listed(book: _Book, model: str, work: Work, at: datetime) -> float:
    """The list price of an API model."""
    provider, _, name = model.partition("/")
    cost = api_prices.price(provider, name, **_counts(work), at=at) if name else None
    if cost is None:
        raise Refused(
            f"economics: {api_prices.SOURCE} has no price for api-model {model!r}; write it like {FRONTIER}, or give "
            "price-per-m"
        )
    if book.rate is None:
        book.missing.append(f"--price-per-m in {book.currency}")
    return book.converted(_per_m(cost))


def _given(book: _Book, work: Work, at: datetime) -> float | None:
    """The price that was given, in one of three ways; None if none was."""
    inputs = book.inputs
    split = (inputs.input_per_m, inputs.cached_per_m, inputs.output_per_m)
    ways = (inputs.price_per_m is not None, any(one is not None for one in split), inputs.api_model is not None)
    if sum(ways) > 1:
        raise Refused("economics: give one of price-per-m, input-per-m with output-per-m, or api-model")
    if inputs.api_model is not None:
        return _listed(book, inputs.api_model, work, at)
    if not ways[1]:
        return inputs.price_per_m
    if inputs.input_per_m is None or inputs.output_per_m is None:
        raise Refused("economics: input-per-m and output-per-m are needed together")
    cached = inputs.input_per_m
    if work.cached or inputs.cached_per_m is not None:
        cached = book.number("cached_per_m", inputs.input_per_m, "input-per-m: as if the API gave no discount")
    fresh = inputs.input_per_m * (1 - work.cached) + cached * work.cached
    return work.prompt * fresh + work.answer * inputs.output_per_m


def _price(book: _Book, work: Work, at: datetime) -> float:
    """The blended price of a million tokens: what spend and tokens imply, what was given, or a frontier model's."""
    inputs, given = book.inputs, _given(book, work, at)
    if inputs.api_spend is not None and inputs.tokens:
        implied = inputs.api_spend / inputs.tokens * MILLION
        if given is not None and not book.missing and abs(given - implied) > _CONTRADICTION * max(given, implied):
            raise Refused(
                f"economics: {inputs.tokens:,.0f} tokens for {inputs.api_spend:,.2f} {book.currency} are "
                f"{implied:.4g} for a million, the price given is {given:.4g}: leave one of the three out"
            )
        return implied
    if given is not None:
        return given
    found = _listed(book, FRONTIER, work, at)
    book.assume("price_per_m", found, f"{FRONTIER} at this mix, {api_prices.SOURCE}")
    return found


def _volume(inputs: Inputs, price_per_m: float) -> tuple[float, float]:
    """Spend and tokens per month: each as given, or by the price from the other."""
    spend, tokens = inputs.api_spend, inputs.tokens
    if spend is None and tokens is None:
        raise Refused("economics: give api-spend or tokens per month")
    if tokens is None:
        if spend and price_per_m < LEAST_PRICE:
            raise Refused("economics: a spend at a price of zero for a million tokens: give price-per-m or tokens")
        tokens = spend / price_per_m * MILLION if spend else 0.0
    if 0 < price_per_m < LEAST_PRICE:
        raise Refused(f"economics: {price_per_m:.3g} for a million tokens is not a price; the least is {LEAST_PRICE:g}")
    if spend is None:
        spend = tokens * price_per_m / MILLION
    if spend and inputs.tokens == 0:
        raise Refused("economics: a spend for no tokens: leave api-spend or tokens out")
    return spend, tokens


def _node(book: _Book, busy: float) -> tuple[Node, float, float]:
    """The node, its price and its mean watts at this busy share."""
    inputs = book.inputs
    if inputs.chip is None:
        book.assume("chip", NODE_CHIP, "a choice")
    if inputs.chip is None and inputs.memory is None:
        book.assume("memory", NODE_MEMORY_GB, "a choice, in GB")
        price = book.dollars("node_price", NODE_PRICE_USD, "US list price of that mini (1,999 USD), rounded")
        watts = book.number("watts", NODE_W, "mean of the 40 to 80 W that such a mini draws while it serves")
        return Node(chip=NODE_CHIP, memory_gb=NODE_MEMORY_GB), price, watts
    name, memory_gb = inputs.chip or NODE_CHIP, inputs.memory or 0.0
    if None not in (inputs.node_price, inputs.watts, inputs.node_tok_s, inputs.memory):
        return Node(chip=name, memory_gb=memory_gb), inputs.node_price or 0.0, inputs.watts or 0.0
    usd, drawn, told = capacity.bought(name, memory_gb, busy)
    if usd is None and inputs.node_price is None:
        raise Refused(f"economics: {told[0]}; give --node-price in {book.currency}")
    if drawn is None and inputs.watts is None:
        raise Refused(f"economics: {told[1]}; give --watts")
    price = book.dollars("node_price", usd or 0.0, told[0])
    watts = book.number("watts", round(drawn or 0.0, 1), f"{told[1]}; mean at {busy:.0%} busy")
    return Node(chip=name, memory_gb=memory_gb), price, watts


def _like_for_like(book: _Book, model: Model, work: Work, at: datetime) -> tuple[str, float | None]:
    """The open model whose price at API hosts is compared, and the median of theirs; "" where nothing is."""
    asked = book.inputs.same_as
    name = model.example if asked is None else asked
    if name == NOT_COMPARED or (asked is None and (not name or book.rate is None)):
        return "", None
    if book.rate is None:
        raise Refused("economics: prices of API hosts are in USD: give usd-rate, or same-as none")
    found = api_prices.hosts(name, **_counts(work), at=at)
    if asked is None:
        book.assume("same_as", name, "an open model of that class; name the one that you would run, or none")
    elif not found:
        raise Refused(f"economics: {api_prices.SOURCE} has no price for any host of same-as {name!r}; or give none")
    costs = [host.cost for host in found]
    return (name, book.converted(_per_m(statistics.median_low(costs)))) if costs else ("", None)
