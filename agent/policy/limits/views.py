"""Limits as clients and operators see them: headers, JSON, sentences. Pure."""

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from math import ceil
from typing import Any

from agent.policy.limits.book import Now, Short
from agent.policy.limits.ledger import Ledger
from agent.policy.limits.limit import NANO, Limit

_WORDS = {"prompt_tok": "prompt tokens", "completion_tok": "completion tokens", "usd": "US dollars"}
_HEADERS = {"requests": "requests", "tokens": "tokens"}


def amount(limit: Limit, count: int) -> int | str:
    """An amount for display: US dollars as text, like "0.25"."""
    return f"{(Decimal(count) / NANO).normalize():f}" if limit.name.unit == "usd" else count


def moment(wall_s: float) -> str:
    """A time in UTC, to the second."""
    return f"{datetime.fromtimestamp(wall_s, UTC):%Y-%m-%dT%H:%M:%SZ}"


def resets_in(ledger: Ledger, now: Now) -> float:
    """Seconds until nothing that is used now counts any more."""
    if not ledger.is_window:
        return ledger.period.end_s - now.wall_s
    used = ledger.use.amount(now.mono_s)
    return (ledger.use.free_in(used, now.mono_s) or 0.0) if used > 0 else 0.0


def usage(ledgers: Iterable[Ledger], now: Now) -> list[dict[str, Any]]:
    """What GET /v1/usage shows of each limit."""
    return [_usage(ledger, now) for ledger in ledgers]


def _usage(ledger: Ledger, now: Now) -> dict[str, Any]:
    limit, used = ledger.limit, max(0, ledger.used(now.mono_s))
    return {
        "name": limit.name.short,
        "period": limit.name.span,
        "unit": limit.name.unit,
        "limit": amount(limit, limit.most),
        "used": amount(limit, used),
        "left": amount(limit, max(0, limit.most - used)),
        "starts_at": None if ledger.is_window else moment(ledger.period.start_s),
        "resets_at": moment(now.wall_s + resets_in(ledger, now)),
    }


def operators(ledger: Ledger, now: Now) -> dict[str, Any]:
    """What ``mlxrack-agent limits`` shows of each limit; ``spare`` is what this node could give away or use."""
    limit = ledger.limit
    wanting = sorted(node for node, one in ledger.wanted.items() if one.want)
    return {
        "owner": limit.name.owner,
        **_usage(ledger, now),
        "used_here": amount(limit, max(0, ledger.use.amount(now.mono_s))),
        "part": amount(limit, max(0, ledger.part(now.mono_s))),
        "spare": amount(limit, max(0, ledger.spare(now.mono_s))),
        "wants": amount(limit, ledger.want),
        "wanted_by": wanting,
        "waits": not ledger.open,
    }


def headers(ledgers: Iterable[Ledger], now: Now) -> dict[str, str]:
    """OpenAI's headers for the limits per minute."""
    found = {}
    for ledger in ledgers:
        if ledger.is_window:
            what = _HEADERS[ledger.name.unit]
            left = max(0, ledger.limit.most - max(0, ledger.used(now.mono_s)))
            found[f"x-ratelimit-limit-{what}"] = str(ledger.limit.most)
            found[f"x-ratelimit-remaining-{what}"] = str(left)
            found[f"x-ratelimit-reset-{what}"] = duration(resets_in(ledger, now))
    return found


def duration(seconds: float) -> str:
    """As OpenAI's headers write it: 20ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, rest = divmod(ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def sentence(short: Short) -> str:
    """Why a request is refused, for its client."""
    limit, (owner, span, unit) = short.limit, short.limit.name
    kind, _, name = owner.partition(":")
    whose = "this API key's" if kind == "key" else f"the rack's {name}"
    said = f"{whose} limit of {amount(limit, limit.most)} {_WORDS.get(unit, unit)} per {span}"
    again = f"try again in {max(1, ceil(short.retry_after_s))} s"
    if short.moves:
        elsewhere = "what is left is held by other nodes of the rack and moves here within seconds, if they are up"
        return f"{said}: {elsewhere}; {again}"
    return f"{said} is used up; {again if span == 'minute' else 'it begins anew when the period ends (UTC)'}"
