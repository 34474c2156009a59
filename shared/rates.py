"""What a million tokens cost on the rack itself, by served name: the aggregator writes it with each week's report, and
nodes price budgets of money with it. Pure."""

from decimal import Decimal
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import Refused
from shared.keys import check_name

SCHEMA = 1
MOST_USD = Decimal(1_000_000)
"""Bound of a rate: far above any that is meant."""
MOST_BYTES = 1 << 20
"""Limit of what is read: some five thousand models."""


class ModelRate(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars per million tokens: prompt tokens that are computed, those from a prompt cache, and answer tokens.
    ``tokens`` is how many the rack had of it in the week."""

    usd_per_mtok_in: Decimal
    usd_per_mtok_cached: Decimal = Decimal(0)
    usd_per_mtok_out: Decimal
    tokens: Annotated[int, Meta(ge=0)] = 0


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """The stored object. ``period`` is the week that they come from, ``so_far`` whether it was not over, ``covered``
    the share of its node time that telemetry covers. Amounts are US dollars; ``currency`` is that of the report, and
    ``usd_rate`` a dollar's price in it. There is no time of writing: equal weeks give equal bytes."""

    schema: int = SCHEMA
    rack: str
    period: str
    so_far: bool = False
    currency: str = "USD"
    usd_rate: float | None = None
    covered: float | None = None
    models: dict[str, ModelRate] = {}


def parse(raw: bytes) -> Rates:
    """Parse and validate. Raises Refused; unknown fields of a newer aggregator are ignored."""
    try:
        rates = msgspec.json.decode(raw, type=Rates)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(f"rates: {error}", code="bad_rates") from None
    if rates.schema != SCHEMA:
        raise Refused(f"rates: schema {rates.schema}, this version reads {SCHEMA}", code="bad_rates")
    for name, rate in rates.models.items():
        check_name(name, "rates: model")
        for field in ("usd_per_mtok_in", "usd_per_mtok_cached", "usd_per_mtok_out"):
            amount: Decimal = getattr(rate, field)
            if not amount.is_finite() or not 0 <= amount <= MOST_USD:
                raise Refused(f"rates: {name}.{field}: must be from 0 to {MOST_USD} US dollars", code="bad_rates")
    return rates


def encode(rates: Rates) -> bytes:
    """The object as stored."""
    return msgspec.json.format(msgspec.json.encode(rates, order="deterministic"), indent=1)
