"""Render a page as one self-contained HTML file: no scripts, no network, light or dark by the reader's setting."""

import jinja2
from markupsafe import Markup

from aggregator.report.page import CODE, Curve, Page, spaced

_WIDTH, _HEIGHT = 640, 160
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea")


def render(page: Page) -> bytes:
    """The page as UTF-8. All text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aggregator.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        keep_trailing_newline=True,
    )
    environment.globals["svg"] = svg
    environment.filters["coded"] = coded
    return environment.get_template("page.html.j2").render(page=page).encode()


def coded(text: str) -> Markup:
    """A text, escaped, with what stands between backticks as code; other backticks are quotation marks."""
    parts = (
        Markup("<code>{}</code>").format(part[1:-1]) if n % 2 else spaced(part).replace("`", "'")
        for n, part in enumerate(CODE.split(text))
    )
    return Markup("").join(parts)


def svg(curve: Curve) -> Markup:
    """A line chart as SVG; the axis is at zero also if there are negative values."""
    values = [v for _, line in curve.lines for v in line]
    if not values:
        return Markup("")
    low, high = min(*values, 0.0), max(*values, 0.0)
    span = (high - low) or 1.0

    def place(n: int, value: float, count: int) -> str:
        x = _WIDTH * n / max(1, count - 1)
        return f"{x:.1f},{_HEIGHT - (value - low) / span * _HEIGHT:.1f}"

    parts = []
    zero = _HEIGHT - (0 - low) / span * _HEIGHT
    parts.append(f'<line x1="0" y1="{zero:.1f}" x2="{_WIDTH}" y2="{zero:.1f}" class="axis"/>')
    for number, (_, line) in enumerate(curve.lines):
        points = " ".join(place(n, value, len(line)) for n, value in enumerate(line))
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    inner = "".join(parts)
    box = Markup(f'viewBox="0 -4 {_WIDTH} {_HEIGHT + 8}" role="img" preserveAspectRatio="none"')
    begin = Markup('<svg xmlns="http://www.w3.org/2000/svg" {} aria-label="{}"><title>{}</title>')
    return begin.format(box, _said(curve), _said(curve)) + Markup(f"{inner}</svg>")


def _said(curve: Curve) -> str:
    """A chart in words, for those who do not see it."""
    ends = f" from {curve.labels[0]} to {curve.labels[-1]}" if curve.labels else ""
    lines = "; ".join(f"{name}: {line[0]:,.6g} to {line[-1]:,.6g} {curve.unit}" for name, line in curve.lines if line)
    return f"{curve.title}{ends}. {lines}".replace("`", "'")
