"""Cost export for FinOps tools: columns as defined by the FOCUS specification (1.2, with the allocation columns of
1.3), one row per day, node and model, and one for idle time. Pure."""

import csv
import io
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal

from aggregator.calendar import Span
from aggregator.cost import CostReport

COLUMNS = (
    "BillingAccountId",
    "BillingCurrency",
    "BillingPeriodStart",
    "BillingPeriodEnd",
    "ChargePeriodStart",
    "ChargePeriodEnd",
    "ChargeCategory",
    "ChargeDescription",
    "ServiceCategory",
    "ServiceName",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "SkuId",
    "ConsumedQuantity",
    "ConsumedUnit",
    "BilledCost",
    "EffectiveCost",
    "AllocatedMethodId",
    "AllocatedResourceId",
    "Tags",
)
METHOD = "busy-seconds"


def export(rack: str, span: Span, days: Iterable[tuple[Span, CostReport]]) -> bytes:
    """The CSV of a span from its daily reports. Costs are amortised: BilledCost is 0, EffectiveCost holds them."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for day, report in days:
        tokens = {m.model: m.tokens for m in report.models}
        busy = {m.model: m.busy_s for m in report.models}
        for row in report.rows:
            whole = busy.get(row.model, 0.0)
            part = Decimal(str(row.busy_s)) / Decimal(str(whole)) if whole else Decimal(0)
            quantity = round(tokens.get(row.model, 0) * part) if row.kind == "model" else Decimal(str(row.busy_s))
            writer.writerow(
                {
                    "BillingAccountId": rack,
                    "BillingCurrency": report.currency,
                    "BillingPeriodStart": _iso(span.since_ms),
                    "BillingPeriodEnd": _iso(span.until_ms),
                    "ChargePeriodStart": _iso(day.since_ms),
                    "ChargePeriodEnd": _iso(day.until_ms),
                    "ChargeCategory": "Usage",
                    "ChargeDescription": f"{row.model or row.kind} on {row.node}",
                    "ServiceCategory": "AI and Machine Learning",
                    "ServiceName": "LLM inference",
                    "ProviderName": "on premises",
                    "PublisherName": "mlxrack",
                    "ResourceId": row.node,
                    "ResourceName": row.node,
                    "SkuId": row.model if row.kind == "model" else row.kind,
                    "ConsumedQuantity": quantity,
                    "ConsumedUnit": "Tokens" if row.kind == "model" else "Seconds",
                    "BilledCost": "0",
                    "EffectiveCost": row.cost,
                    "AllocatedMethodId": METHOD,
                    "AllocatedResourceId": row.node,
                    "Tags": "{}",
                }
            )
    return out.getvalue().encode()


def _iso(t_ms: int) -> str:
    return datetime.fromtimestamp(t_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
