"""Cost export for FinOps tools: the Cost and Usage dataset of FOCUS 1.3, one row per day, node and model, and one each
for idle, silent and unattributed time. The rows of the period are divided between its days, so they add up to its
total. Pure."""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import msgspec

from aggregator.allocation import Row, divided
from aggregator.calendar import Span
from aggregator.cost import CostReport

COLUMNS = (
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodStart"),
    *("BillingPeriodEnd", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency"),
    *("ChargePeriodStart", "ChargePeriodEnd", "ConsumedQuantity", "ConsumedUnit", "ContractedCost", "EffectiveCost"),
    *("HostProviderName", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit", "ProviderName"),
    *("PublisherName", "ResourceId", "ResourceName", "ResourceType", "ServiceCategory", "ServiceName"),
    *("ServiceProviderName", "ServiceSubcategory", "SkuId", "Tags"),
    *("AllocatedMethodId", "AllocatedResourceId", "AllocatedResourceName", "AllocatedTags"),
)
"""Mandatory ones, those of allocation, usage and resources, and two that 1.3 keeps for readers of 1.2 (ProviderName,
PublisherName)."""
SO_FAR = "x_SoFarUntil"
METHOD = "busy-seconds"
"""docs/figures.md, Cost, says how it allocates."""
_OWNER = "on premises"
_FORMULA = tuple("=+-@|%＝＋－＠")
Days = Sequence[tuple[Span, Sequence[Row]]]


def export(rack: str, span: Span, report: CostReport, days: Days, so_far_until_ms: int | None = None) -> bytes:
    """The CSV of a span from its report and the rows of its days. Costs are amortised: BilledCost is 0, the others hold
    them. A span that is not over has a custom column that says how far it goes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    custom = {SO_FAR: iso(so_far_until_ms)} if so_far_until_ms else {}
    writer.writerow((*COLUMNS, *custom))
    for day, row in by_day(report.rows, days):
        cells = _cells(rack, report.currency, span, day, row) | custom
        writer.writerow(inert(cells[name]) for name in (*COLUMNS, *custom))
    return out.getvalue().encode()


def by_day(rows: Sequence[Row], days: Days) -> list[tuple[Span, Row]]:
    """The rows of a span divided between its days, by the seconds of the same rows in the days' own reports. One that
    has none there (its tokens and its work lie in different days) belongs to the first day. Amounts and tokens add up
    to those of the span."""
    of_days: dict[tuple[str, str, str], dict[int, Row]] = {}
    for number, (_, found) in enumerate(days):
        for row in found:
            of_days.setdefault(_key(row), {})[number] = row
    made = [(number, part) for row in rows for number, part in _divided(row, of_days.get(_key(row), {}))]
    return [(days[number][0], part) for number, part in sorted(made, key=lambda one: one[0])]


def _key(row: Row) -> tuple[str, str, str]:
    return row.node, row.model, row.kind


def _divided(row: Row, on: Mapping[int, Row]) -> list[tuple[int, Row]]:
    """A row's parts by the number of the day; ``on`` are the same rows of the days' own reports."""
    costs = divided(row.cost, {number: Fraction(str(one.busy_s + one.quiet_s)) for number, one in on.items()})
    if not costs:
        return [(min(on, default=0), row)]
    tokens = {number: on[number].tokens for number in costs}
    # what was answered on a day without work of its own
    tokens[max(costs)] += row.tokens - sum(tokens.values())
    return [
        (number, msgspec.structs.replace(on[number], cost=cost, tokens=tokens[number]))
        for number, cost in costs.items()
    ]


def _cells(rack: str, currency: str, span: Span, day: Span, row: Row) -> dict[str, object]:
    """A row by column; None is a null, an empty cell."""
    is_model = row.kind == "model"
    quantity = row.tokens if is_model else Decimal(str(row.busy_s + row.quiet_s))
    return {
        **dict.fromkeys(("BillingAccountId", "BillingAccountName"), rack),
        **dict.fromkeys(("HostProviderName", "InvoiceIssuerName", "ServiceProviderName", "ProviderName"), _OWNER),
        **dict.fromkeys(("EffectiveCost", "ContractedCost", "ListCost"), row.cost),
        **dict.fromkeys(("ConsumedQuantity", "PricingQuantity"), quantity),
        **dict.fromkeys(("ConsumedUnit", "PricingUnit"), "Tokens" if is_model else "Seconds"),
        **dict.fromkeys(("ResourceId", "ResourceName"), row.node),
        **dict.fromkeys(("AllocatedResourceId", "AllocatedResourceName"), row.model if is_model else None),
        "BilledCost": 0,
        "BillingCurrency": currency,
        "BillingPeriodStart": iso(span.since_ms),
        "BillingPeriodEnd": iso(span.until_ms),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{row.model or row.kind} on {row.node}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": iso(day.since_ms),
        "ChargePeriodEnd": iso(day.until_ms),
        "PublisherName": "mlxrack",
        "ResourceType": "Node",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        "ServiceName": "LLM inference",
        "SkuId": row.model if is_model else row.kind,
        "Tags": "{}",
        "AllocatedMethodId": METHOD,
        "AllocatedTags": "{}" if is_model else None,
    }


def inert(value: object) -> object:
    """A text that spreadsheets take for a formula, as the text that it is; numbers are left."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value


def iso(t_ms: int) -> str:
    """A moment as FOCUS writes it."""
    return datetime.fromtimestamp(t_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
