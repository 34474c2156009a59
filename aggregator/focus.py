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
    *("BillingAccountId", "BillingCurrency", "BillingPeriodStart", "BillingPeriodEnd"),
    *("ChargePeriodStart", "ChargePeriodEnd", "ChargeCategory", "ChargeDescription"),
    *("ServiceCategory", "ServiceName", "ProviderName", "PublisherName", "ResourceId", "ResourceName", "SkuId"),
    *("ConsumedQuantity", "ConsumedUnit", "BilledCost", "EffectiveCost"),
    *("AllocatedMethodId", "AllocatedResourceId", "Tags"),
)
SO_FAR = "x_SoFarUntil"
METHOD = "busy-seconds"
_FORMULA = tuple("=+-@|%＝＋－＠")


def export(rack: str, span: Span, days: Iterable[tuple[Span, CostReport]], so_far_until_ms: int | None = None) -> bytes:
    """The CSV of a span from its daily reports. Costs are amortised: BilledCost is 0, EffectiveCost holds them. A span
    that is not over has a custom column that says how far it goes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    custom = ((SO_FAR, _iso(so_far_until_ms)),) if so_far_until_ms else ()
    writer.writerow((*COLUMNS, *(name for name, _ in custom)))
    for day, report in days:
        tokens = {m.model: m.tokens for m in report.models}
        busy = {m.model: m.busy_s for m in report.models}
        for row in report.rows:
            whole = busy.get(row.model, 0.0)
            part = Decimal(str(row.busy_s)) / Decimal(str(whole)) if whole else Decimal(0)
            quantity = round(tokens.get(row.model, 0) * part) if row.kind == "model" else Decimal(str(row.busy_s))
            is_model = row.kind == "model"
            writer.writerow(
                _inert(value)
                for value in (
                    *(rack, report.currency, *map(_iso, (span.since_ms, span.until_ms, day.since_ms, day.until_ms))),
                    *("Usage", f"{row.model or row.kind} on {row.node}"),
                    *("AI and Machine Learning", "LLM inference", "on premises", "mlxrack"),
                    *(row.node, row.node, row.model if is_model else row.kind),
                    *(quantity, "Tokens" if is_model else "Seconds", "0", row.cost),
                    *(METHOD, row.node, "{}", *(value for _, value in custom)),
                )
            )
    return out.getvalue().encode()


def _inert(value: object) -> object:
    """A text that spreadsheets take for a formula, as the text that it is; numbers are left."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value


def _iso(t_ms: int) -> str:
    return datetime.fromtimestamp(t_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
