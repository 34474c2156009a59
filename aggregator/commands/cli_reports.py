"""The verbs that read reports: list, show, fetch."""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregator.commands.ended import Ended, command
from aggregator.config import AggregatorConfig
from aggregator.phrases import counted
from shared.bucket import place
from shared.errors import Refused
from shared.store import ObjectStore

if TYPE_CHECKING:
    from aggregator.commands.reading import Period

Opened = Callable[[argparse.Namespace], tuple[AggregatorConfig, ObjectStore]]
Verb = Callable[[str, str, Callable[[argparse.Namespace], Ended]], argparse.ArgumentParser]


def add(verb: Verb, opened: Opened) -> None:
    """Add the verbs to a parser."""
    verb("list", "List the published reports: periods, revisions, since when.", lambda args: _list(args, opened))
    show = verb("show", "Show the newest reports, or those of one period.", lambda args: _show(args, opened))
    _select(show)
    show.add_argument("--report", default="", metavar="NAME", help="only this one, for example cost")
    show.add_argument("--open", action="store_true", help="open the pages or the PDF with the system's viewer instead")
    show.add_argument("--out", type=Path, default=None, metavar="DIR", help="write the files into this folder instead")
    get = verb("fetch", "Write the files of the newest or given reports to a folder.", lambda a: _fetch(a, opened))
    _select(get)
    get.add_argument("--report", default="", metavar="NAME", help="only this one, for example cost")
    get.add_argument("--format", default="", metavar="EXT", help="only this format: json, md, html, csv, pdf")
    get.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder (default: the current one)")


def _select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cadence", nargs="?", choices=("weekly", "monthly"), help="weekly (default) or monthly")
    parser.add_argument("--week", default=None, help="for example 2026-W47, or a range as listed (default: the newest)")
    parser.add_argument("--month", default=None, help="for example 2026-11 (default: the newest)")


def _list(args: argparse.Namespace, opened: Opened) -> Ended:
    from aggregator.commands import reading

    config, store = opened(args)
    found = reading.periods(store)
    where = place(config.store)
    if not found:
        text = f"no report has been published in {where}; make one: {command('weekly', args.config)}"
        return Ended(shown=text, data={"periods": []})
    rows: list[tuple[str, ...]] = [("PERIOD", "CADENCE", "REPORTS", "REVISION", "STORED", "")]
    rows += [_row(one, config.timezone) for one in found]
    sizes = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{size}}" for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    line = f"{len(found)} periods in report/v1/ of {where}; read one: {command('show', args.config)}"
    return Ended(shown="\n".join(lines), line=line, data={"periods": [_plain(one) for one in found]})


def _row(one: "Period", zone: str) -> tuple[str, ...]:
    from aggregator.judgements import so_far

    stored_ms = max(r.stored_ms for r in one.reports)
    when = f"{datetime.fromtimestamp(stored_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC" if stored_ms else ""
    names, revision = " ".join(r.name for r in one.reports), max(r.revision for r in one.reports)
    return one.period, one.cadence, names, str(revision), when, so_far(one.so_far_until_ms, zone)


def _plain(one: "Period") -> dict[str, Any]:
    reports = [
        {"name": r.name, "revision": r.revision, "files": [r.key(e) for e in r.files], "stored_ms": r.stored_ms or None}
        for r in one.reports
    ]
    partial = {"so_far_until_ms": one.so_far_until_ms} if one.so_far_until_ms else {}
    return {"cadence": one.cadence, "period": one.period, "reports": reports, **partial}


def _chosen(args: argparse.Namespace, store: ObjectStore) -> "Period":
    from aggregator.commands import reading

    cadence = args.cadence or ("monthly" if args.month and not args.week else "weekly")
    period, other = (args.week, args.month) if cadence == "weekly" else (args.month, args.week)
    if other:
        raise Refused(f"{cadence} reports: give the period as --{'week' if cadence == 'weekly' else 'month'}")
    return reading.chosen(store, cadence, period or "")


def _show(args: argparse.Namespace, opened: Opened) -> Ended:
    from aggregator.commands import reading
    from aggregator.report import terminal

    config, store = opened(args)
    period = _chosen(args, store)
    if args.open or args.out is not None:
        return _written(args, store, period, args.out, ())
    where = f"{period.cadence} {_name(period, config.timezone)} of rack {config.rack}, from {place(config.store)}"
    if args.json:
        return Ended(shown=where, data={**_plain(period), "figures": reading.figures_of(store, period, args.report)})
    width = shutil.get_terminal_size((100, 24)).columns
    text = terminal.render(reading.text_of(store, period, args.report), width)
    return Ended(shown=f"{text}\n({where})", data=None)


def _fetch(args: argparse.Namespace, opened: Opened) -> Ended:
    _, store = opened(args)
    return _written(args, store, _chosen(args, store), args.out, (args.format,) if args.format else ())


def _written(
    args: argparse.Namespace, store: ObjectStore, period: "Period", folder: Path | None, extensions: Sequence[str]
) -> Ended:
    from aggregator.commands import reading

    if folder is None:  # for a viewer, which reads it after this program has ended
        folder = Path(tempfile.mkdtemp(prefix="mlxrack-reports-"))
        extensions = reading.OPENED
    paths = reading.write(store, period, folder, args.report, extensions)
    if getattr(args, "open", False):
        reading.show_with_system([path for path in paths if path.suffix[1:] in reading.OPENED])
    files = counted(len(paths), "file")
    line = f"{files} of {period.cadence} {period.period} written to {folder}"
    data = {"cadence": period.cadence, "period": period.period, "files": [str(path) for path in paths]}
    return Ended(line=line, details=tuple(map(str, paths)), data=data)


def _name(period: "Period", zone: str) -> str:
    from aggregator.judgements import so_far

    partial = so_far(period.so_far_until_ms, zone)
    return f"{period.period}, {partial}" if partial else period.period
