"""Human-readable figures; None is "no data"."""

from decimal import Decimal

from aggregator import heat
from aggregator.calendar import duration
from aggregator.cost import amount

NO_DATA = "no data"


def count(value: int | None) -> str:
    """1,234"""
    return NO_DATA if value is None else f"{value:,}"


def figure(value: float) -> str:
    """A number on a chart: 1,422,110 from a thousand on, 12.34 below."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


def share(value: float | None, digits: int = 1) -> str:
    """12.3 %"""
    return NO_DATA if value is None else f"{value * 100:.{digits}f} %"


def saved(value: float | None) -> str:
    """A saving as a share, for a table: 12.3 %, or costs 188 x."""
    if value is None or value >= -1:
        return share(value)
    return f"costs {1 - value:,.{0 if value < -9 else 1}f} x"


def ms(value_us: float | None) -> str:
    """Microseconds as 12 ms or 1.25 s."""
    if value_us is None:
        return NO_DATA
    return f"{value_us / 1e6:.2f} s" if value_us >= 1e6 else f"{value_us / 1e3:.0f} ms"


def gb(value: int | None) -> str:
    """Bytes as 1.2 GB."""
    return NO_DATA if value is None else f"{value / 1e9:.1f} GB"


def celsius(value_mc: int | None) -> str:
    """Thousandths of a degree as 61.5 °C, with enough digits beside the limit."""
    return heat.celsius(value_mc)


def money(value: Decimal | None, currency: str) -> str:
    """12.34 USD, with four digits below a tenth and six below a thousandth."""
    return NO_DATA if value is None else amount(value, currency)


def span(value_s: float | None) -> str:
    """Seconds as 12 s, 5.0 min or 2.5 h."""
    return NO_DATA if value_s is None else duration(value_s)
