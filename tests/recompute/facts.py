"""One fact has one value, wherever it is shown: in JSON, Markdown, HTML, PDF and CSV."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pypdf import PdfReader

from . import focus
from .compare import load, newest

_NUMBER = r"(-?[\d,]+(?:\.\d+)?)"


class Place(NamedTuple):
    """Where a fact is shown: the document, and what stands around its number. ``times`` makes it the JSON's unit."""

    document: str
    pattern: str
    times: float = 1.0


WEEK: dict[str, tuple[str, tuple[Place, ...]]] = {
    "total": (
        "cost:cost/total",
        (Place("cost", rf"Rows add up to {_NUMBER}"), Place("cost", rf"\| Total \|\s*\|\s*\| {_NUMBER} \|")),
    ),
    "average": ("cost:cost/average_per_m", (Place("cost", rf"{_NUMBER} [A-Z]{{3}} per million tokens on average"),)),
    "uptime": (
        "uptime:rack/share",
        (
            Place("uptime", rf"[Tt]he rack was up {_NUMBER} % of the time", 0.01),
            Place("scorecard", rf"the rack was up {_NUMBER} % of the time", 0.01),
            Place("uptime", rf"\| the rack \|.*\| {_NUMBER} % \|", 0.01),
        ),
    ),
    "availability": (
        "uptime:request_share",
        (
            Place("uptime", rf"{_NUMBER} % of [\d,]+ requests were answered", 0.01),
            Place("scorecard", rf"{_NUMBER} % of requests \([\d,]+\) were answered", 0.01),
        ),
    ),
    "evictions": ("evictions:total", (Place("evictions", rf"{_NUMBER} evictions?\b"),)),
}
"""By name: where the JSON has it, and where it is shown."""
MONTH: dict[str, tuple[str, tuple[Place, ...]]] = {
    "total": (
        "report:cost/total",
        (Place("report", rf"cost {_NUMBER} [A-Z]{{3}} for"), Place("report", rf"Total cost of the nodes: {_NUMBER}")),
    ),
    "average": ("report:cost/average_per_m", (Place("report", rf"Weighted average: {_NUMBER} [A-Z]{{3}}"),)),
    "requests": (
        "report:volume/requests",
        (Place("report", rf"{_NUMBER} requests answered"), Place("report", rf"Answered requests {_NUMBER}")),
    ),
    "uptime": (
        "report:uptime/rack/share",
        (
            Place("report", rf"Uptime of the rack {_NUMBER} %", 0.01),
            Place("report", rf"the rack was up {_NUMBER} % of the time", 0.01),
            Place("report", rf"the rack {_NUMBER} % ", 0.01),
        ),
    ),
    "availability": (
        "report:uptime/request_share",
        (
            Place("report", rf"and answered {_NUMBER} % of the requests that", 0.01),
            Place("report", rf"Requests answered {_NUMBER} %", 0.01),
            Place("report", rf"{_NUMBER} % of requests \([\d,]+\) were answered", 0.01),
            Place("report", rf"{_NUMBER} % of [\d,]+ requests were answered", 0.01),
        ),
    ),
    "heat": (
        "report:figures/throttled",
        (
            Place("report", rf"Slowed by heat {_NUMBER} %", 0.01),
            Place("report", rf"{_NUMBER} % of the time in which models worked", 0.01),
        ),
    ),
    "evictions": ("report:evictions/total", (Place("report", rf"{_NUMBER} evictions?\b"),)),
    "peak": ("report:figures/peak_mc", (Place("report", rf"; peak {_NUMBER} °C", 1000.0),)),
}
"""The same of the monthly report; its text is that of the PDF."""


def texts(folder: Path, name: str) -> dict[str, str]:
    """A document as each of its formats shows it."""
    found = {}
    if path := newest(folder, name, "md"):
        found["md"] = path.read_text(encoding="utf-8")
    if path := newest(folder, name, "html"):
        found["html"] = _plain(path.read_text(encoding="utf-8"))
    if path := newest(folder, name, "pdf"):
        found["pdf"] = " ".join(" ".join(page.extract_text() for page in PdfReader(path).pages).split())
    return found


def _plain(page: str) -> str:
    """HTML as its reader sees it: cells between bars, like Markdown."""
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>", " ", page, flags=re.S)
    rows = re.sub(r"<tr[^>]*>\s*<t[hd][^>]*>", "\n| ", body)
    cells = re.sub(r"</t[hd]>\s*<t[hd][^>]*>", " | ", rows)
    text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"</t[hd]>\s*</tr>", " |\n", cells)))
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def contradictions(folder: Path, facts: dict[str, tuple[str, tuple[Place, ...]]]) -> Iterator[str]:
    """Every place that shows another value than the JSON, or than a place with as many digits."""
    shown: dict[str, dict[str, str]] = {}
    for name, (where, places) in facts.items():
        document, _, path = where.partition(":")
        value = _at(load(folder, document), path)
        told: dict[tuple[float, int], str] = {}
        for place in places:
            if place.document not in shown:
                shown[place.document] = texts(folder, place.document)
            for form, text in shown[place.document].items():
                for match in re.finditer(place.pattern, text):
                    first = told.setdefault((place.times, _digits(match[1])), match[1])
                    if not agrees(match[1], place.times, value) or match[1] != first:
                        yield f"{name}: {place.document}.{form} has {match[0]!r} ({first}), the JSON {value}"


def _digits(shown: str) -> int:
    """After the point."""
    return len(shown.partition(".")[2])


def agrees(shown: str, times: float, value: Any) -> bool:
    """Whether a rounded number (half up, half to even, or cut off) may be that value."""
    if value is None:
        return False
    unit = 10.0 ** -_digits(shown) * abs(times)
    return abs(float(shown.replace(",", "")) * times - float(value)) <= unit * 1.000001


def _at(document: Any, path: str) -> Any:
    for name in path.split("/"):
        document = (document or {}).get(name)
    return document


def focus_differs(folder: Path) -> Iterator[str]:
    """The CSV adds up to the total of the page."""
    csv, total = newest(folder, "focus", "csv"), _at(load(folder, "cost"), "cost/total")
    if csv and total is not None:
        added = sum(focus.sums(focus.read(csv)).values())
        if abs(float(added) - float(total)) > 1e-9:
            yield f"focus.csv adds up to {float(added)}, the page says {total}"


def of_week(folder: Path) -> list[str]:
    """What contradicts each other in a week's reports."""
    return [*contradictions(folder, WEEK), *focus_differs(folder)]


def of_month(folder: Path) -> list[str]:
    """What contradicts each other in a month's report."""
    return list(contradictions(folder, MONTH))
