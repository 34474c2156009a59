"""A line chart as SVG, with an axis in round numbers and a mark: readable without colour, named for screen readers."""

import math

from markupsafe import Markup

from aggregator.report.page import Curve
from aggregator.report.wording import figure

_WIDTH, _HEIGHT, _FOOT, _TOP = 640.0, 200.0, 22.0, 26.0
_LETTER = 6.2
"""Width of a character of the axis."""
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea")


def svg(curve: Curve) -> Markup:
    """The chart, "" without values. Its axis has zero in any case."""
    values = [v for _, line in curve.lines for v in line]
    if not values:
        return Markup("")
    marks = ticks(min(*values, 0.0), max(*values, 0.0))
    low, high = marks[0], marks[-1]
    left = max(len(figure(v)) for v in marks) * _LETTER + 10
    points = max(len(line) for _, line in curve.lines)

    def x(n: int) -> float:
        return left + (_WIDTH - left - 8) * n / max(1, points - 1)

    def y(value: float) -> float:
        return _TOP + _HEIGHT * (1 - (value - low) / (high - low))

    parts = [Markup("<title>{}</title>").format(described(curve))]
    for value in marks:
        kind = "axis zero" if value == 0 else "axis"
        parts.append(_line(left, y(value), _WIDTH, y(value), kind))
        parts.append(_text(left - 6, y(value) + 4, figure(value), "end"))
    foot = _TOP + _HEIGHT + 16
    parts += [_text(x(n), foot, curve.labels[n], _side(x(n)) if n else "start") for n in _named(curve.labels)]
    for number, (_, line) in enumerate(curve.lines):
        drawn = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(line))
        style = Markup('fill="none" stroke="{}" stroke-width="2"').format(COLOURS[number % len(COLOURS)])
        parts.append(Markup('<polyline points="{}" {}/>').format(drawn, style))
    if curve.mark is not None:
        parts.append(_line(x(curve.mark), _TOP, x(curve.mark), _TOP + _HEIGHT, "mark"))
        parts.append(_text(x(curve.mark), _TOP - 10, curve.mark_text, _side(x(curve.mark))))
    box = Markup('viewBox="0 0 {:.0f} {:.0f}"').format(_WIDTH, _TOP + _HEIGHT + _FOOT)
    return Markup('<svg xmlns="http://www.w3.org/2000/svg" {} role="img" aria-label="{}">{}</svg>').format(
        box, described(curve), Markup("").join(parts)
    )


def described(curve: Curve) -> str:
    """The chart in a sentence: each line's first and last value, and the mark."""
    unit = f" {curve.unit}" if curve.unit else ""
    lines = [
        f"{name}: {figure(line[0])}{unit} to {figure(line[-1])}{unit}" for name, line in curve.lines if len(line) > 0
    ]
    span = f", {curve.labels[0]} to {curve.labels[-1]}" if curve.labels else ""
    return "; ".join([f"{curve.title}{span}", *lines, *([curve.mark_text] if curve.mark_text else [])])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, four to seven of them; zero is one."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _named(labels: tuple[str, ...]) -> list[int]:
    """The points that have room for their label."""
    count = len(labels)
    step = next((s for s in (1, 2, 3, 6, 12, 24, 60) if (count - 1) / s <= 4), max(1, count - 1))
    return list(range(0, count, step))


def _side(x: float) -> str:
    """Where a text at x begins, so that it stays inside."""
    return "end" if x > _WIDTH - 80 else "start" if x < 120 else "middle"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
