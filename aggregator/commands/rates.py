"""What the rack's own tokens cost, for budgets of money: written for its nodes with each week's report."""

from decimal import Decimal

from aggregator import publish
from aggregator.allocation import rounded
from aggregator.config import Cost, decimal
from aggregator.cost import ModelCost
from aggregator.judgements import Judged
from shared import keys, rates
from shared.errors import RackError, Refused
from shared.logs import get_logger
from shared.rates import MOST_BYTES, MOST_USD, ModelRate, Rates
from shared.store import ObjectStore, find

log = get_logger("aggregator.rates")


def of_week(judged: Judged, cost: Cost) -> Rates | None:
    """The rates of a week; None where nothing has a price in US dollars.

    They are those of the loaded cost, idle time included: tokens of the week times its rates are the costs of the usage
    report. Idle time is divided between prompt and answer tokens as the time of work is.
    """
    usd = Decimal(1) if cost.currency == "USD" else decimal(cost.usd_rate) if cost.usd_rate is not None else None
    if usd is None:
        return None
    found = {model.model: rate for model in judged.cost.models if (rate := _rate(model, usd)) is not None}
    return (
        Rates(
            rack=judged.rack,
            period=judged.period,
            so_far=bool(judged.so_far),
            currency=cost.currency,
            usd_rate=float(usd),
            covered=judged.covered,
            models={name: rate for name, rate in found.items() if keys.is_name(name)},
        )
        if found
        else None
    )


def _rate(model: ModelCost, usd: Decimal) -> ModelRate | None:
    """One served name; a kind of token of which it had none has the price of all kinds."""
    if model.loaded is None or not model.direct or model.loaded_per_m is None:
        return None
    with_idle = model.loaded / model.direct
    prompt, answer = (
        model.loaded_per_m if price is None else price * with_idle
        for price in (model.uncached_per_m, model.output_per_m)
    )
    if max(prompt, answer) / usd > MOST_USD:
        return None
    return ModelRate(usd_per_mtok_in=rounded(prompt / usd), usd_per_mtok_out=rounded(answer / usd), tokens=model.tokens)


def replaces(new: Rates, old: Rates | None) -> bool:
    """Whether rates take the place of those that are there: never a week that is not over that of one which is, nor an
    earlier week that of a later one."""
    if old is None or old.rack != new.rack:
        return True
    if new.so_far != old.so_far:
        return not new.so_far
    return new.period >= old.period


def renew(store: ObjectStore, judged: Judged, cost: Cost) -> str:
    """Write a week's rates where they replace what is there; returns the key, or "". Reports are published all the same
    where the bucket refuses this object."""
    if (made := of_week(judged, cost)) is None:
        log.info("rates_unknown", period=judged.period, reason="no cost in US dollars")
        return ""
    try:
        stored = find(store, keys.RATES, MOST_BYTES)
        body = rates.encode(made)
        if (stored is not None and stored.body == body) or not replaces(made, _parsed(stored.body if stored else b"")):
            return ""
        publish.replace(store, keys.RATES, body, stored.etag if stored else None)
    except RackError as error:
        log.warning("rates_not_published", reason=error.message)
        return ""
    return keys.RATES


def _parsed(body: bytes) -> Rates | None:
    try:
        return rates.parse(body) if body else None
    except Refused:
        return None
