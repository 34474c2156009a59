"""Why the price per million tokens changed against the period before: an exact decomposition, its largest term, and
the likely cause. Pure.

Both prices are examined, because they respond to different changes. A node costs the same whether it is busy or not, so
on a rack with idle time, more work for the same tokens moves only the direct price, and less traffic moves only the
loaded one. The loaded price is rate x utilisation x seconds per token, and the seconds are those of prefill and decode
(the direct price is the same without utilisation):

    $/M = rate x (loaded / direct) x (prompt share x uncached share x s per uncached token
                                      + answer share x s per answer token)

The logarithmic mean attributes a change of such a product to its factors without residual (LMDI; B. W. Ang, "The
LMDI approach to decomposition analysis", Energy Policy 33, 2005).
"""

import math

import msgspec

from aggregator import heat
from aggregator.config import Cost

_TINY = 1e-18
"""Replaces a factor of zero; the logarithmic mean approaches its limit there."""
HIT_FALL = 0.15
ANSWERS_GREW, CUT_ROSE = 1.4, 0.10
FEWER = 0.75
LEAST_REQUESTS = 20
"""Fewer requests of a week prove nothing about how many were cut off."""


class Factors(msgspec.Struct, frozen=True, kw_only=True):
    """A period of one model: cost and busy seconds over the tokens on priced nodes, and evidence. ``reported_share`` is
    the part of those nodes' owned time in which they reported."""

    tokens: int
    requests: int
    loaded: float
    direct: float
    prefill_s: float
    decode_s: float
    busy_s: float
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    cut_share: float
    throttled_share: float | None
    reported_share: float | None = None

    @property
    def per_m(self) -> float:
        """Loaded price of a million tokens."""
        return self.loaded / self.tokens * 1e6

    @property
    def direct_per_m(self) -> float:
        """Direct price of a million tokens."""
        return self.direct / self.tokens * 1e6

    @property
    def hit_share(self) -> float:
        """Share of prompt tokens found in the prompt cache."""
        return self.cached_tok / self.prompt_tok if self.prompt_tok else 0.0


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The change of the price per million tokens, in terms that add up to it: cost of a busy second, idle time on top,
    prompt cache misses, prefill time per uncached token, decode time per answer token, and the mix of prompt and
    answer tokens."""

    rate: float
    utilisation: float
    cache: float
    prefill: float
    decode: float
    mix: float

    @property
    def total(self) -> float:
        """The whole change."""
        return self.rate + self.utilisation + self.cache + self.prefill + self.decode + self.mix


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Against the period before: ``ratio`` of the loaded prices, ``direct_ratio`` of the direct ones, each change in
    terms. ``flagged`` is set if either ratio reaches the configured one at sufficient volume. ``cause`` is a
    machine-readable identifier, ``text`` a sentence with the evidence."""

    ratio: float
    direct_ratio: float
    terms: Terms
    direct_terms: Terms
    flagged: bool
    cause: str
    text: str


def judge(now: Factors | None, before: Factors | None, config: Cost, since: str = "the period before") -> Change | None:
    """The change, or None without a basis for comparison. A cause is given only for flagged changes. ``since`` names
    the period before."""
    if now is None or before is None or not before.loaded or not now.loaded:
        return None
    made = Change(
        ratio=now.per_m / before.per_m,
        direct_ratio=now.direct_per_m / before.direct_per_m if before.direct else 1.0,
        terms=decompose(now, before),
        direct_terms=decompose(_without_idle(now), _without_idle(before)),
        flagged=False,
        cause="",
        text="",
    )
    worst = max(made.ratio, made.direct_ratio)
    if worst < config.flag_ratio:
        return made
    if min(now.tokens, before.tokens) < config.flag_min_tok:
        few = (
            f"{worst:.1f} x that of {since}, but under {config.flag_min_tok:,} tokens in one of them: too few to judge"
        )
        return msgspec.structs.replace(made, cause="low_volume", text=few)
    loaded = made.ratio >= made.direct_ratio
    cause, why = _cause(now, before, made.terms if loaded else made.direct_terms, since)
    text = f"{'loaded' if loaded else 'direct'} price {worst:.1f} x that of {since}: {why}"
    return msgspec.structs.replace(made, flagged=True, cause=cause, text=text)


def _without_idle(f: Factors) -> Factors:
    return msgspec.structs.replace(f, loaded=f.direct)


def decompose(now: Factors, before: Factors) -> Terms:
    """The terms of ``now.per_m - before.per_m``."""
    parts = dict.fromkeys(Terms.__struct_fields__, 0.0)
    for new, old, names in (
        (_prefill(now), _prefill(before), ("mix", "cache", "prefill")),
        (_decode(now), _decode(before), ("mix", "decode")),
    ):
        both = ("rate", "utilisation", *names)
        ones, others = _product(now, new), _product(before, old)
        weight = _log_mean(math.prod(ones), math.prod(others))
        for name, one, other in zip(both, ones, others, strict=True):
            parts[name] += weight * math.log(one / other)
    return Terms(**parts)


def _product(f: Factors, own: tuple[float, ...]) -> tuple[float, ...]:
    rate = f.direct / f.busy_s if f.busy_s else _TINY
    return tuple(max(x, _TINY) for x in (rate * 1e6, f.loaded / f.direct if f.direct else _TINY, *own))


def _prefill(f: Factors) -> tuple[float, ...]:
    """Factors of prefill seconds per token: prompt share, uncached share of prompts, seconds per uncached token."""
    tokens, uncached = f.prompt_tok + f.completion_tok, f.prompt_tok - f.cached_tok
    shares = (f.prompt_tok / tokens, uncached / f.prompt_tok) if f.prompt_tok else (0.0, 0.0)
    return (*shares, f.prefill_s / uncached if uncached else 0.0)


def _decode(f: Factors) -> tuple[float, ...]:
    if not f.completion_tok:
        return (0.0, 0.0)
    return (f.completion_tok / (f.prompt_tok + f.completion_tok), f.decode_s / f.completion_tok)


def _log_mean(a: float, b: float) -> float:
    return a if math.isclose(a, b, rel_tol=1e-12) else (a - b) / (math.log(a) - math.log(b))


def _cause(now: Factors, before: Factors, terms: Terms, since: str) -> tuple[str, str]:
    """The likely cause with its evidence, from the largest term.

    1. Answers much longer and more of them cut off at max_tokens, at an unchanged prompt length: the prompt cache is
       suspect. This shows up as mix, because answer tokens are more expensive; where it does not, only an unchanged hit
       rate tells it from misses.
    2. The prompt cache hit rate dropped.
    3. Time per token rose on nodes that were throttled.
    4. Its nodes were silent for longer.
    5. Less traffic on the same nodes.
    6. Otherwise the largest term itself.
    """
    parts = msgspec.structs.asdict(terms)
    leading = max(parts, key=lambda name: parts[name])
    hits = f"the prompt cache hit rate is {now.hit_share:.0%} (before: {before.hit_share:.0%})"
    grown = _ratio(_per_request(now.completion_tok, now), _per_request(before.completion_tok, before))
    prompts = _ratio(_per_request(now.prompt_tok, now), _per_request(before.prompt_tok, before))
    held = now.hit_share >= before.hit_share - HIT_FALL / 2
    cut_rose = now.cut_share - before.cut_share
    enough = min(now.requests, before.requests) >= LEAST_REQUESTS
    if (
        enough
        and (held or leading == "mix")
        and grown >= ANSWERS_GREW
        and cut_rose >= CUT_ROSE
        and 0.7 <= prompts <= 1.4
    ):
        return "poisoned_kv", (
            f"answers grew {grown:.1f}-fold and {now.cut_share:.0%} of them hit their token limit (before: "
            f"{before.cut_share:.0%}) while {hits}; suspected poisoned prompt cache: clear it and compare"
        )
    if leading == "cache" and before.hit_share - now.hit_share >= HIT_FALL:
        return (
            "cache_miss",
            f"{hits}; likely misses of a hot prefix: check the model's node, its cache and its evictions",
        )
    hot, cool = now.throttled_share, before.throttled_share
    if leading in ("prefill", "decode") and hot is not None and cool is not None and hot - cool >= heat.ROSE_SHARE:
        return "throttling", (
            f"its nodes were throttled {hot:.0%} of the time (before: {cool:.0%}) "
            "and time per token rose: improve cooling, or move a model to another node"
        )
    here, there = now.reported_share, before.reported_share
    if leading == "utilisation" and here is not None and there is not None and here < FEWER * there:
        return "silence", f"its nodes reported for {here:.0%} of their time (before: {there:.0%}): see the incidents"
    if leading == "utilisation":
        volume = now.tokens / before.tokens
        fewer = f"{volume:.0%} of the tokens of {since}" if volume < FEWER else "more idle time on its nodes"
        return ("traffic_drop" if volume < FEWER else "utilisation"), f"{fewer}, at the same node cost"
    texts = {
        "mix": "a larger share of its tokens are answer tokens, which cost more",
        "rate": "its nodes cost more per busy second: check prices, power, or a change of nodes",
        "prefill": "prefill time per prompt token rose, and throttling does not explain it",
        "decode": "decode time per answer token rose, and throttling does not explain it",
        "cache": f"more prompt tokens had to be computed; {hits}",
    }
    return {"mix": "mix_shift"}.get(leading, leading), texts[leading]


def _per_request(tokens: int, f: Factors) -> float:
    return tokens / f.requests if f.requests else 0.0


def _ratio(one: float, other: float) -> float:
    return one / other if other else 1.0
