"""Published reports: which there are, what they say, and their files. Nothing is written to the bucket.

A key is only believed as far as it can be parsed; a file's name is made from its parts, so none leads out of a folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from aggregator.commands import weekly
from aggregator.commands.ended import NothingToPublish
from aggregator.judgements import Judged
from aggregator.report import markdown
from shared import keys
from shared.desired import Moment
from shared.errors import Refused
from shared.keys import ReportKey
from shared.store import ObjectStore, each

CADENCES = ("weekly", "monthly")
ORDER = ("scorecard", "uptime", "cost", "usage", "placement", "evictions")
"""How the pages of a week are shown: verdicts first."""
OPENED = ("html", "pdf")
CONNECTIONS = 8
OPENER_S = 20.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A published report. ``files`` are its formats with their newest revisions, which differ: a format that did not
    change is not written again. ``stored_ms`` is when the store got the last of them, 0 if it does not say."""

    cadence: str
    period: str
    name: str
    files: dict[str, int]
    stored_ms: int

    @property
    def revision(self) -> int:
        """The newest."""
        return max(self.files.values())

    def key(self, extension: str) -> str:
        """The key of one of its files."""
        return keys.report_key(self.cadence, self.period, self.name, self.files[extension], extension)

    def file(self, extension: str) -> str:
        """The name of one of its files on a disk."""
        return ReportKey(self.cadence, self.period, self.name, self.files[extension], extension).file


class Period(msgspec.Struct, frozen=True, kw_only=True):
    """All reports of a period. ``so_far_until_ms`` is there if they were made before it was over."""

    cadence: str
    period: str
    reports: tuple[Report, ...]
    so_far_until_ms: int | None = None


def periods(store: ObjectStore, cadence: str = "") -> list[Period]:
    """Every period with reports, oldest first."""
    found: dict[tuple[str, str], dict[str, list[tuple[ReportKey, int]]]] = {}
    for listed in each(store, f"report/v1/{cadence}/" if cadence else "report/v1/"):
        try:
            key = keys.parse_report_key(listed.key)
        except Refused:
            continue  # a foreign object is no report
        found.setdefault((key.cadence, key.period), {}).setdefault(key.name, []).append((key, listed.stored_ms))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda at: _period(store, at[0], at[1], found[at]), sorted(found)))


def chosen(store: ObjectStore, cadence: str, period: str = "") -> Period:
    """The period asked for, or else the newest one that has reports. Raises NothingToPublish."""
    if period and not keys.is_period(cadence, period):
        like = "2026-W47, or 2026-11-01--2026-11-10" if cadence == "weekly" else "2026-11"
        raise Refused(f"{cadence} period {period[:40]!r}: give it as {like}")
    there = periods(store, cadence)
    fitting = [one for one in there if one.period == period] if period else there
    if not fitting:
        of = f"of {period} " if period else ""
        named = f"; there are {', '.join(one.period for one in there[-6:])}" if there else ""
        raise NothingToPublish(f"no {cadence} report {of}was published{named}; make one: mlxrack-aggregator {cadence}")
    return fitting[-1]


def text_of(store: ObjectStore, period: Period, name: str = "") -> str:
    """What the reports of a period say, as Markdown. Raises Refused if they cannot be read."""
    if period.cadence == "monthly":
        return _month(store, period)
    wished = [r for r in period.reports if "md" in r.files and name in ("", r.name)]
    wished.sort(key=lambda r: (ORDER.index(r.name) if r.name in ORDER else len(ORDER), r.name))
    if not wished:
        raise Refused(f"no report {name!r} in {period.period}; there are {', '.join(r.name for r in period.reports)}")
    return "\n".join(_text(store, r.key("md")) for r in wished)


def figures_of(store: ObjectStore, period: Period, name: str = "") -> dict[str, Any]:
    """The JSON of the reports of a period, by name. Raises Refused."""
    found = {}
    for report in period.reports:
        if "json" in report.files and name in ("", report.name):
            try:
                found[report.name] = msgspec.json.decode(_body(store, report.key("json")))
            except (msgspec.DecodeError, RecursionError):
                raise Refused(f"{report.key('json')}: cannot be parsed; publish it again") from None
    return found


def write(
    store: ObjectStore, period: Period, folder: Path, name: str = "", extensions: Sequence[str] = ()
) -> list[Path]:
    """Write the files of a period into a folder: fetched first, then placed. ``name`` and ``extensions`` select.
    Raises Refused."""
    wished = [
        (report, extension)
        for report in period.reports
        if name in ("", report.name)
        for extension in report.files
        if not extensions or extension in extensions
    ]
    if not wished:
        what = f" {name!r}" if name else ""
        raise Refused(f"no file of a report{what} in {period.period}; there are {_names(period)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mlxrack-fetch-", dir=folder) as made:
            for report, extension in wished:
                path = Path(made, report.file(extension))
                path.write_bytes(_body(store, report.key(extension)))
            return [_placed(path, folder) for path in sorted(Path(made).iterdir())]
    except OSError as error:
        raise Refused(f"write into {folder}: {error.strerror or type(error).__name__}") from None


def show_with_system(paths: Iterable[Path]) -> None:
    """Open pages and PDFs with the system's programs. Raises Refused where there is none."""
    wished = "open" if sys.platform == "darwin" else "xdg-open"
    if (opener := shutil.which(wished)) is None:
        raise Refused(f"--open: this machine has no {wished}; use --out DIR and open the files there")
    for path in paths:
        try:
            done = subprocess.run([opener, str(path.absolute())], timeout=OPENER_S, capture_output=True, check=False)
        except subprocess.TimeoutExpired:
            continue  # a viewer that stays in the foreground
        if done.returncode:
            raise Refused(f"--open: {wished} failed for {path} (status {done.returncode}); it can be opened by hand")


def _placed(path: Path, folder: Path) -> Path:
    os.chmod(path, 0o644)
    target = folder / path.name
    os.replace(path, target)  # replaces a link rather than what it leads to
    return target


def _period(store: ObjectStore, cadence: str, period: str, found: dict[str, list[tuple[ReportKey, int]]]) -> Period:
    reports = [_report(cadence, period, name, files) for name, files in sorted(found.items())]
    return Period(cadence=cadence, period=period, reports=tuple(reports), so_far_until_ms=_so_far(store, reports))


def _report(cadence: str, period: str, name: str, files: Sequence[tuple[ReportKey, int]]) -> Report:
    newest: dict[str, int] = {}
    for key, _ in files:
        newest[key.extension] = max(key.revision, newest.get(key.extension, 0))
    stored_ms = max(ms for _, ms in files)
    return Report(cadence=cadence, period=period, name=name, files=dict(sorted(newest.items())), stored_ms=stored_ms)


class _SoFar(msgspec.Struct):
    so_far_until_ms: Moment | None = None


def _so_far(store: ObjectStore, reports: Sequence[Report]) -> int | None:
    """How far the reports of a period go; None if it was over. One of them is asked: they are made together."""
    for name in ("report", "uptime"):
        for report in reports:
            if report.name == name and "json" in report.files:
                try:
                    return msgspec.json.decode(_body(store, report.key("json")), type=_SoFar).so_far_until_ms
                except (msgspec.DecodeError, RecursionError, Refused):
                    return None
    return None


def _month(store: ObjectStore, period: Period) -> str:
    """The executive report in words: its headline and recommendations, then the same pages as of a week."""
    found = next((r for r in period.reports if r.name == "report" and "json" in r.files), None)
    if found is None:
        raise Refused(f"{period.period}: the figures of the report are missing in the bucket; publish it again")
    try:
        judged = msgspec.json.decode(_body(store, found.key("json")), type=Judged)
    except (msgspec.DecodeError, RecursionError):
        raise Refused(f"{found.key('json')}: another version wrote it: publish it again, or see the PDF") from None
    pages = [page for _, page in weekly.artifacts(judged, judged.before_period or "the month before").values()]
    heading = f"# Rack {judged.rack}, {judged.period}{f', {judged.so_far}' if judged.so_far else ''}"
    advice = [f"- {one.text} ({one.because})" for one in judged.recommendations]
    first = [heading, "", judged.headline, "", *(["## Recommendations", "", *advice, ""] if advice else [])]
    return "\n".join([*first, *(markdown.render(page).decode() for page in pages)])


def _names(period: Period) -> str:
    return ", ".join(f"{r.name} ({', '.join(r.files)})" for r in period.reports)


def _text(store: ObjectStore, key: str) -> str:
    return _body(store, key).decode(errors="replace")


def _body(store: ObjectStore, key: str) -> bytes:
    return store.get(key, keys.MOST_REPORT_BYTES).body
