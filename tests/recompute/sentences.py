"""Every sentence of every report of the made racks in one file, to be read."""

import re
from collections.abc import Iterator
from pathlib import Path

from pypdf import PdfReader

from . import drive, focus
from .compare import newest
from .more_racks import ALL

_PAGES = ("cost", "usage", "uptime", "evictions", "scorecard", "placement")
_NUMBER = re.compile(r"\d[\d,.:]*")


def write(out: Path, racks: list[str], folder: Path) -> Path:
    """One section for each rack and document; what differs from a line before only in its numbers is left out."""
    path = out / "sentences.txt"
    with path.open("w", encoding="utf-8") as file:
        for name in racks:
            seen: set[str] = set()
            for title, text in documents(name, folder / slug(name)):
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                fresh = [line for line in lines if _NUMBER.sub("0", line) not in seen]
                seen |= {_NUMBER.sub("0", line) for line in lines}
                file.write(f"\n===== {name}: {title}\n" + "\n".join(fresh) + "\n")
    return path


def slug(name: str) -> str:
    """The folder of a rack."""
    return name.replace(" ", "-").replace(",", "")


def documents(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Title and text of each document of a rack."""
    made, reports = ALL[name], folder / "bucket" / "report" / "v1"
    for week in made.weeks:
        for page in _PAGES:
            if path := newest(reports / "weekly" / week, page, "md"):
                yield f"{week} {page}.md", path.read_text(encoding="utf-8")
        if path := newest(reports / "weekly" / week, "focus", "csv"):
            told = {one["ChargeDescription"] for one in focus.read(path)}
            yield f"{week} focus.csv", "\n".join(sorted(told))
    for month in made.months:
        if path := newest(reports / "monthly" / month, "report", "pdf"):
            yield f"{month} report.pdf", "\n".join(page.extract_text() for page in PdfReader(path).pages)
    if set(made.weeks) - set(made.nothing):
        yield "show", drive.show(folder / "aggregator.toml", made.now_ms)
