"""mlxrack-aggregator: rollups, reports and alerts from the bucket, to be run by cron.

Each run says in one line what it did, nothing with --quiet. The only place that reads the environment and the command
line. Exit codes are os.EX_*: 0 success, 64 usage error, 66 nothing to publish (no telemetry in the period, an empty
proposal, no such report), 69 a package is missing, 75 try later (another run holds the lease, the store is unavailable,
the bucket is being restored), 77 the store rejected the credentials, 78 invalid configuration, 1 any other error.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aggregator import config as aggregator_config
from aggregator.commands import cli_copies, cli_economics, cli_reports
from aggregator.commands.ended import Ended, NothingToPublish, command, say, tell
from aggregator.config import AggregatorConfig, Cost
from aggregator.report.page import Page
from shared import __version__, keys, logs
from shared import config as shared_config
from shared.bucket import place
from shared.commandline import Parser, reader_left
from shared.errors import AccessDenied, RackError, Refused, Retryable
from shared.manual import cli_help
from shared.missing import broken_import, guarded
from shared.secrets import resolve
from shared.store import ObjectStore
from shared.store_open import open_store

if TYPE_CHECKING:
    from aggregator.commands.weekly import Published

CONFIG_NAME, CONFIG_VARIABLE = "aggregator.toml", "MLXRACK_AGGREGATOR_CONFIG"
_CONFIGURED = ("no_secret", "bad_tls", "wrong_rack", "all_quarantined")
"""Codes of errors that a configuration, here or on the nodes, has to end."""


@guarded("mlxrack-aggregator", "aggregator")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    # a run that is terminated releases its lease on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logs.configure(args.log, level="info" if args.verbose else "warning")
    try:
        ended: Ended | int = args.run(args)
        if isinstance(ended, int):  # `help` has paged its text itself
            return ended
        return tell(ended, as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    except KeyboardInterrupt:
        return 130
    except RackError as error:
        if not _expected(args, error):
            say(f"mlxrack-aggregator: {error.message}", sys.stderr)
        return exit_status(error)
    except OSError as error:
        if broken_import(error) or reader_left(error):
            raise
        say(f"mlxrack-aggregator: {_said(error)}", sys.stderr)
        return os.EX_TEMPFAIL if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1


def _expected(args: argparse.Namespace, error: RackError) -> bool:
    """Whether cron need not hear of it: a new rack has no last week yet, and nobody asked for a certain one."""
    usual = isinstance(error, NothingToPublish) and error.usual
    return bool(usual and args.quiet and not any(getattr(args, n, None) for n in ("week", "since", "month")))


def _said(error: OSError) -> str:
    """An error of this machine in a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        from aggregator import parquet

        return parquet.full_disk()
    return f"{error.filename or 'this machine'}: {error.strerror or type(error).__name__}"


def exit_status(error: RackError) -> int:
    """The os.EX_* exit status for an error."""
    if isinstance(error, shared_config.ConfigError) or error.code in _CONFIGURED:
        return os.EX_CONFIG
    if isinstance(error, AccessDenied):
        return os.EX_NOPERM
    if isinstance(error, NothingToPublish):
        return os.EX_NOINPUT
    return os.EX_TEMPFAIL if isinstance(error, Retryable) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlxrack-aggregator", description="Turn telemetry of the nodes into rollups, reports and alerts."
    )
    parser.add_argument("--version", action="version", version=f"mlxrack {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def local(name: str, text: str, run: Callable[[argparse.Namespace], Ended]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        added.set_defaults(run=run, log=None, verbose=False, quiet=False)
        return added

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], Ended]) -> argparse.ArgumentParser:
        added = local(name, text, run)
        default = f"aggregator.toml (default: {shared_config.places(CONFIG_NAME, CONFIG_VARIABLE)})"
        added.add_argument("--config", type=Path, default=None, help=default)
        added.add_argument("--verbose", "-v", action="store_true", help="print progress and the result")
        added.add_argument("--quiet", "-q", action="store_true", help="print errors only, for cron")
        added.add_argument("--log", type=Path, default=None, help="write the log to this file instead of stderr")
        return added

    roll = verb("rollup", "Add new telemetry to the minute, hour and day tables.", _rollup)
    roll.add_argument("--again", action="store_true", help="re-read every segment in the bucket (after an upgrade)")
    week = verb("weekly", "Publish the weekly reports: placement, cost, usage, evictions, uptime, scorecard.", _weekly)
    week.add_argument("--week", default=None, help="ISO week, for example 2026-W47 (default: the last complete week)")
    week.add_argument("--since", default=None, metavar="DAY", help="instead of a week: first day, like 2026-11-01")
    week.add_argument("--until", default=None, metavar="DAY", help="last day, inclusive")
    month = verb("monthly", "Publish the monthly executive report.", _monthly)
    month.add_argument("--month", default=None, help="for example 2026-11 (default: the last complete month)")
    verb("alert", "Send alerts that fired or were resolved since the last run.", _alert)
    accept = verb("apply", "Publish an accepted placement as the desired state for the agents.", _apply)
    accept.add_argument("--week", default=None, help="week of the placement (default: the last complete week)")
    accept.add_argument("--steps", default=None, help="only these steps, for example 1,2")
    accept.add_argument("--undo", action="store_true", help="publish the state before the last apply once more")
    accept.add_argument("--dry-run", action="store_true", help="show what would be published")
    cli_reports.add(verb, _opened)
    cli_copies.add(verb, _config, _progress, os.environ)
    old = verb("prune", "Delete raw segments and minute tables older than [retention].", _prune)
    old.add_argument("--dry-run", action="store_true", help="show what would be deleted")
    first = local("plan", "Propose a placement before there is any telemetry.", _plan)
    first.add_argument("--intake", type=Path, required=True, help="TOML file with the expected models and workloads")
    first.add_argument("--inventory", type=Path, required=True, help="TOML file with the nodes")
    first.add_argument("--html", type=Path, default=None, help="also write the page to this file")
    cli_economics.add(local, _page, _cost)
    verb("check-config", "Validate the configuration and print all problems.", _check_config)
    cli_help.add(verbs, parser)
    return parser


def _config(args: argparse.Namespace) -> AggregatorConfig:
    found = shared_config.located(CONFIG_NAME, args.config, os.environ.get(CONFIG_VARIABLE))
    path = found or Path(CONFIG_NAME)
    return shared_config.load(path, AggregatorConfig, aggregator_config.check)


def _opened(args: argparse.Namespace) -> tuple[AggregatorConfig, ObjectStore]:
    config = _config(args)
    return config, _store(config)


def _store(config: AggregatorConfig) -> ObjectStore:
    """The rack's bucket. Raises Retryable while it is being restored: what is missing in it is not gone."""
    from aggregator.commands import restore

    store = open_store(config.store, os.environ)
    restore.check_whole(store)
    return store


def _rollup(args: argparse.Namespace) -> Ended:
    from aggregator import lease
    from aggregator.commands import rollup

    config, store = _opened(args)
    faults: list[RackError] = []
    with lease.held(store, "rollup"):
        manifest = rollup.run(config, store, os.environ, _progress(args), again=args.again, faults=faults)
    done = {
        "manifest": manifest.number,
        "batches": manifest.batches,
        "segments": manifest.segments,
        "quarantined_total": manifest.quarantined_total,
        "quarantined": [msgspec.to_builtins(q) for q in manifest.quarantined],
    }
    counted = f"{manifest.batches:,} batches of {len(manifest.days)} days are in the tables"
    commit = f"manifest {manifest.number} of {place(config.store)}" if manifest.number else place(config.store)
    bad = f"; {manifest.quarantined_total:,} objects in quarantine/" if manifest.quarantined_total else ""
    line = f"rollup: {counted} ({commit}){bad}; reports: {command('weekly', args.config)}"
    return _with_faults(Ended(line=line, data=done), faults)


def _weekly(args: argparse.Namespace) -> Ended:
    from aggregator import lease
    from aggregator.calendar import as_long_before, before, between, last_week, week
    from aggregator.commands import rollup, weekly

    config = _config(args)
    if (args.since is None) != (args.until is None) or (args.since and args.week):
        raise Refused("weekly: use --week, or --since and --until together")
    if args.since:
        span = between(args.since, args.until, config.timezone)
        earlier = as_long_before(span)
    else:
        span = week(args.week or last_week(datetime.now(UTC), config.timezone), config.timezone)
        earlier = before(span)
    store = _store(config)
    faults: list[RackError] = []
    with lease.held(store, "rollup"):
        rollup.run(config, store, os.environ, _progress(args), faults=faults)
        with _explained(faults):
            published = weekly.publish_span(config, store, span, earlier)
    return _with_faults(_published(args, config, "weekly", "week", span.name, published), faults)


def _monthly(args: argparse.Namespace) -> Ended:
    from aggregator import lease
    from aggregator.calendar import last_month
    from aggregator.commands import monthly, rollup

    config = _config(args)
    name = args.month or last_month(datetime.now(UTC), config.timezone)
    store = _store(config)
    faults: list[RackError] = []
    with lease.held(store, "rollup"):
        rollup.run(config, store, os.environ, _progress(args), faults=faults)
        with _explained(faults):
            published = monthly.run(config, store, name)
    return _with_faults(_published(args, config, "monthly", "month", name, published), faults)


@contextlib.contextmanager
def _explained(faults: Sequence[RackError]) -> Iterator[None]:
    """Where nothing can be published because of what is wrong with the telemetry, that is what is said."""
    try:
        yield
    except NothingToPublish:
        if faults:
            raise faults[0] from None
        raise


def _with_faults(ended: Ended, faults: Sequence[RackError]) -> Ended:
    """The end of what was done although a part of the telemetry is wrong."""
    if not faults:
        return ended
    problems = (*ended.problems, *(fault.message for fault in faults))
    return msgspec.structs.replace(ended, problems=problems, status=exit_status(faults[0]))


def _published(
    args: argparse.Namespace, config: AggregatorConfig, cadence: str, unit: str, name: str, published: "Published"
) -> Ended:
    """The end of a run that published reports."""
    found = [keys.parse_report_key(key) for key in published]
    names, revision = sorted({one.name for one in found}), max(one.revision for one in found)
    partial = f", {published.so_far}" if published.so_far else ""
    folder = published[0].rpartition("/")[0]
    look = command(f"show {cadence} --{unit} {found[0].period}", args.config)
    line = (
        f"{cadence} {found[0].period}{partial}: {', '.join(names)} (revision {revision}) in {folder}/ of "
        f"{place(config.store)}; read: {look}"
    )
    data = {unit: name, "published": published} | ({"so_far": published.so_far} if partial else {})
    return Ended(line=line, data=data, details=tuple(published))


def _alert(args: argparse.Namespace) -> Ended:
    from aggregator import lease, notify
    from aggregator.commands import alert

    config, store = _opened(args)
    references = {"alerts": config.discord.alerts, "thermal": config.discord.thermal}
    urls = {name: resolve(reference, os.environ) for name, reference in references.items() if reference}
    with lease.held(store, "alert"):
        sent = alert.run(config, store, notify.Discord(urls, rack=config.rack, docs_url=config.discord.docs_url))
    told = [{"code": n.rule.code, "subject": n.firing.subject, "resolved": n.resolved} for n in sent]
    each = [f"{'resolved' if n.resolved else 'fires'}: {n.rule.title}: {n.firing.text}" for n in sent]
    to = "to Discord" if urls else "nowhere: [discord] names no webhook"
    line = f"alert: {len(told)} notices sent {to}" if told else "alert: nothing fired and nothing was resolved"
    return Ended(
        line=f"{line}; state: {keys.ALERT_STATE} of {place(config.store)}", data={"sent": told}, details=tuple(each)
    )


def _apply(args: argparse.Namespace) -> Ended:
    from aggregator.calendar import last_week
    from aggregator.commands import apply
    from aggregator.judgements import so_far

    if args.undo and (args.week is not None or args.steps is not None):
        raise Refused("apply: --undo goes back from the current state; it takes neither --week nor --steps")
    config, store = _opened(args)
    done = "would be published" if args.dry_run else "published"
    where = f"in {keys.DESIRED} of {place(config.store)}; nodes follow at their next poll"
    if args.undo:
        undone, state = apply.undo(config, store, args.dry_run)
        shown: tuple[str, ...] = ()
        what = f"the state before generation {undone.generation} ({undone.note})"
    else:
        report = apply.proposal(store, args.week or last_week(datetime.now(UTC), config.timezone))
        steps = _numbers(args.steps) if args.steps is not None else None
        moves, state = apply.run(config, store, report, steps, args.dry_run)
        shown = tuple(f"{move.step:3}. {move.action} {move.model} on {move.node}: {move.reason}" for move in moves)
        partial = so_far(report.so_far_until_ms, config.timezone)
        what = f"{len(moves)} of {len(report.moves)} steps of {report.period}" + (f", {partial}" if partial else "")
        where += f"; back: {command('apply --undo', args.config)}"
    line = f"generation {state.generation} {done}: {what}" + ("" if args.dry_run else f", {where}")
    lines = "\n".join((*(shown if args.dry_run or not args.quiet else ()), *([line] if args.dry_run else [])))
    data = {"published": not args.dry_run, "desired": msgspec.to_builtins(state)}
    return Ended(line="" if args.dry_run else line, shown=lines, data=data)


def _numbers(text: str) -> set[int]:
    try:
        return {int(part) for part in text.split(",")}
    except ValueError:
        raise Refused(f"--steps {text!r}: expected comma-separated step numbers like 1,2") from None


def _prune(args: argparse.Namespace) -> Ended:
    from aggregator import lease
    from aggregator.commands import prune

    config, store = _opened(args)
    with lease.held(store, "rollup"):
        done = prune.run(config, store, datetime.now(UTC), args.dry_run)
    would = "would be deleted" if args.dry_run else "deleted"
    text = f"{done.raw:,} raw segments, {done.urgent:,} urgent copies and {done.minute:,} minute tables {would}"
    line = f"prune: {text} in {place(config.store)}, by [retention]; hours, days and reports stay"
    return Ended(line="" if args.dry_run else line, shown=text if args.dry_run else "", data=done)


def _plan(args: argparse.Namespace) -> Ended:
    from aggregator.commands import plan
    from aggregator.report.pages import placement

    report = plan.run(args.intake, args.inventory)
    return _page(args, report, placement.page(report, "to be", planned=True), 1 if report.short else 0)


def _cost() -> Cost | None:
    """[cost] of the configuration; None where there is none that can be read."""
    try:
        return _config(argparse.Namespace(config=None)).cost
    except RackError:
        return None


def _page(args: argparse.Namespace, report: msgspec.Struct, page: Page, status: int) -> Ended:
    """A result as a page, which is also written as HTML if requested."""
    from aggregator.report import html, markdown

    if args.html is not None:
        try:
            args.html.write_bytes(html.render(page))
        except OSError as error:
            raise Refused(f"write {args.html}: {error.strerror}") from None
    line = f"written: {args.html}" if args.html is not None else ""
    shown, data = markdown.render(page).decode(), msgspec.json.encode(report).decode()
    return Ended(shown=shown, line=line, data=data, status=status)


def _check_config(args: argparse.Namespace) -> Ended:
    config = _config(args)
    text = f"configuration valid: rack {config.rack}, {len(config.nodes)} nodes configured, time zone {config.timezone}"
    return Ended(shown=text, data={"rack": config.rack, "nodes": len(config.nodes), "timezone": config.timezone})


def _progress(args: argparse.Namespace) -> Callable[[str], None]:
    """A progress printer: active on a terminal or with --verbose, never with --json or --quiet."""
    if args.json or args.quiet or not (args.verbose or sys.stderr.isatty()):
        return lambda _: None
    return lambda text: say(text, sys.stderr)
