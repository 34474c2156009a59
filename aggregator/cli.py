"""mlxrack-aggregator: rollups, reports and alerts from the bucket, to be run by cron.

Silent on success. The only place that reads the environment and the command line. Exit codes are os.EX_*:
0 success, 64 usage error, 75 try later (another run holds the lease, the store is unavailable), 77 the store rejected
the credentials, 78 invalid configuration, 1 any other error.
"""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from aggregator import config as aggregator_config
from aggregator.config import AggregatorConfig
from aggregator.economics import Inputs
from aggregator.report.page import Page
from shared import __version__, logs
from shared import config as shared_config
from shared.bucket import Store, check_store
from shared.commandline import Parser
from shared.errors import AccessDenied, RackError, Refused, Retryable
from shared.secrets import resolve
from shared.store import ObjectStore
from shared.store_open import open_store

CONFIG_NAME, CONFIG_VARIABLE = "aggregator.toml", "MLXRACK_AGGREGATOR_CONFIG"
_INPUTS = {
    "api_spend": "current API spend per month",
    "nodes": "number of nodes to buy",
    "node_price": "price of one node",
    "setup": "other one-time costs: switch, rack, labour",
    "watts": "mean power of one node in watts",
    "electricity_per_kwh": "price per kWh",
    "other_per_month": "other costs per node and month",
    "people_per_month": "cost of operating staff per month",
    "kept": "share of the API workload that moves to the rack",
    "growth": "monthly growth of the API spend, for example 0.02",
    "residual": "residual value of a node as a share of its price",
    "months": "horizon in months",
}


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file passed to `sync --to`."""

    store: Store


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    # a run that is terminated releases its lease on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logs.configure(args.log, level="info" if args.verbose else "warning")
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        return 130
    except RackError as error:
        print(f"mlxrack-aggregator: {error.message}", file=sys.stderr)
        return exit_status(error)
    except OSError as error:
        print(f"mlxrack-aggregator: {_said(error)}", file=sys.stderr)
        return os.EX_TEMPFAIL if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1
    return status


def _said(error: OSError) -> str:
    """An error of this machine in a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        from aggregator import parquet

        return parquet.full_disk()
    return f"{error.filename or 'this machine'}: {error.strerror or type(error).__name__}"


def exit_status(error: RackError) -> int:
    """The os.EX_* exit status for an error."""
    if isinstance(error, shared_config.ConfigError) or error.code == "no_secret":
        return os.EX_CONFIG
    if isinstance(error, AccessDenied):
        return os.EX_NOPERM
    return os.EX_TEMPFAIL if isinstance(error, Retryable) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlxrack-aggregator", description="Turn telemetry of the nodes into rollups, reports and alerts."
    )
    parser.add_argument("--version", action="version", version=f"mlxrack {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def local(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        added.set_defaults(run=run, log=None, verbose=False)
        return added

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = local(name, text, run)
        default = f"aggregator.toml (default: {shared_config.places(CONFIG_NAME, CONFIG_VARIABLE)})"
        added.add_argument("--config", type=Path, default=None, help=default)
        added.add_argument("--verbose", "-v", action="store_true", help="print progress and the result")
        added.add_argument("--log", type=Path, default=None, help="write the log to this file instead of stderr")
        return added

    roll = verb("rollup", "Add new telemetry to the minute, hour and day tables.", _rollup)
    roll.add_argument("--again", action="store_true", help="re-read every segment in the bucket (after an upgrade)")
    week = verb("weekly", "Publish the weekly reports: placement, cost, evictions, uptime, scorecard.", _weekly)
    week.add_argument("--week", default=None, help="ISO week, for example 2026-W47 (default: the last complete week)")
    week.add_argument("--since", default=None, metavar="DAY", help="instead of a week: first day, like 2026-11-01")
    week.add_argument("--until", default=None, metavar="DAY", help="last day, inclusive")
    month = verb("monthly", "Publish the monthly executive report.", _monthly)
    month.add_argument("--month", default=None, help="for example 2026-11 (default: the last complete month)")
    verb("alert", "Send alerts that fired or were resolved since the last run.", _alert)
    accept = verb("apply", "Publish an accepted placement as the desired state for the agents.", _apply)
    accept.add_argument("--week", default=None, help="week of the placement (default: the last complete week)")
    accept.add_argument("--steps", default=None, help="only these steps, for example 1,2")
    accept.add_argument("--dry-run", action="store_true", help="show what would be published")
    copy = verb("sync", "Copy the bucket into another store, incrementally.", _sync)
    copy.add_argument("--to", type=Path, required=True, help="TOML file with the target [store]")
    copy.add_argument("--without-raw", action="store_true", help="skip raw segments")
    old = verb("prune", "Delete raw segments and minute tables older than [retention].", _prune)
    old.add_argument("--dry-run", action="store_true", help="show what would be deleted")
    first = local("plan", "Propose a placement before there is any telemetry.", _plan)
    first.add_argument("--intake", type=Path, required=True, help="TOML file with the expected models and workloads")
    first.add_argument("--inventory", type=Path, required=True, help="TOML file with the nodes")
    first.add_argument("--html", type=Path, default=None, help="also write the page to this file")
    buy = local("economics", "Compute the break-even month of buying nodes from the current API spend.", _economics)
    for field in msgspec.structs.fields(Inputs):
        flag, text = f"--{field.name.replace('_', '-')}", _INPUTS[field.name]
        if field.required:
            buy.add_argument(flag, type=field.type, required=True, help=text)
        else:
            buy.add_argument(flag, type=field.type, default=field.default, help=f"{text} (default: {field.default:g})")
    buy.add_argument("--currency", default="USD")
    buy.add_argument("--html", type=Path, default=None, help="also write the page with the curve to this file")
    verb("check-config", "Validate the configuration and print all problems.", _check_config)
    return parser


def _config(args: argparse.Namespace) -> AggregatorConfig:
    found = shared_config.located(CONFIG_NAME, args.config, os.environ.get(CONFIG_VARIABLE))
    path = found or Path(CONFIG_NAME)
    return shared_config.load(path, AggregatorConfig, aggregator_config.check)


def _opened(args: argparse.Namespace) -> tuple[AggregatorConfig, ObjectStore]:
    config = _config(args)
    return config, open_store(config.store, os.environ)


def _rollup(args: argparse.Namespace) -> int:
    from aggregator import lease
    from aggregator.commands import rollup

    config, store = _opened(args)
    with lease.held(store, "rollup"):
        manifest = rollup.run(config, store, os.environ, _progress(args), again=args.again)
    done = {
        "manifest": manifest.number,
        "batches": manifest.batches,
        "segments": manifest.segments,
        "quarantined_total": manifest.quarantined_total,
        "quarantined": [msgspec.to_builtins(q) for q in manifest.quarantined],
    }
    _say(args, done, f"manifest {manifest.number}: {manifest.batches} batches in total")
    return 0


def _weekly(args: argparse.Namespace) -> int:
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
    store = open_store(config.store, os.environ)
    with lease.held(store, "rollup"):
        rollup.run(config, store, os.environ, _progress(args))
        published = weekly.publish_span(config, store, span, earlier)
    _say(args, {"week": span.name, "published": published}, "\n".join(published))
    return 0


def _monthly(args: argparse.Namespace) -> int:
    from aggregator import lease
    from aggregator.calendar import last_month
    from aggregator.commands import monthly, rollup

    config = _config(args)
    name = args.month or last_month(datetime.now(UTC), config.timezone)
    store = open_store(config.store, os.environ)
    with lease.held(store, "rollup"):
        rollup.run(config, store, os.environ, _progress(args))
        published = monthly.run(config, store, name)
    _say(args, {"month": name, "published": published}, "\n".join(published))
    return 0


def _alert(args: argparse.Namespace) -> int:
    from aggregator import lease, notify
    from aggregator.commands import alert

    config, store = _opened(args)
    references = {"alerts": config.discord.alerts, "thermal": config.discord.thermal}
    urls = {name: resolve(reference, os.environ) for name, reference in references.items() if reference}
    with lease.held(store, "alert"):
        sent = alert.run(config, store, notify.Discord(urls))
    told = [{"code": n.rule.code, "subject": n.firing.subject, "resolved": n.resolved} for n in sent]
    _say(args, {"sent": told}, f"{len(told)} notices sent")
    return 0


def _apply(args: argparse.Namespace) -> int:
    from aggregator.calendar import last_week
    from aggregator.commands import apply

    config, store = _opened(args)
    report = apply.proposal(store, args.week or last_week(datetime.now(UTC), config.timezone))
    steps = _numbers(args.steps) if args.steps is not None else None
    moves, state = apply.run(config, store, report, steps, args.dry_run)
    done = "would be published" if args.dry_run else "published"
    if args.json:
        print(json.dumps({"published": not args.dry_run, "desired": msgspec.to_builtins(state)}))
        return 0
    for move in moves:
        print(f"{move.step:3}. {move.action} {move.model} on {move.node}: {move.reason}")
    print(f"generation {state.generation} {done}: {len(moves)} of {len(report.moves)} steps of {report.period}")
    return 0


def _numbers(text: str) -> set[int]:
    try:
        return {int(part) for part in text.split(",")}
    except ValueError:
        raise Refused(f"--steps {text!r}: expected comma-separated step numbers like 1,2") from None


def _sync(args: argparse.Namespace) -> int:
    from aggregator.commands import sync

    config = _config(args)
    target = shared_config.load(args.to, Target, lambda one: check_store(one.store))
    source, there = open_store(config.store, os.environ), open_store(target.store, os.environ)
    done = sync.run(source, there, raw=not args.without_raw, told=_progress(args))
    _say(args, msgspec.to_builtins(done), f"{done.written:,} objects, {done.bytes / 1e6:.1f} MB copied")
    for key in done.clashes:
        print(f"mlxrack-aggregator: sync {key}: source and target differ; neither was changed", file=sys.stderr)
    return 1 if done.clashes else 0


def _prune(args: argparse.Namespace) -> int:
    from aggregator import lease
    from aggregator.commands import prune

    config, store = _opened(args)
    with lease.held(store, "rollup"):
        done = prune.run(config, store, datetime.now(UTC), args.dry_run)
    would = "would be deleted" if args.dry_run else "deleted"
    text = f"{done.raw:,} raw segments, {done.urgent:,} urgent copies and {done.minute:,} minute tables {would}"
    if args.dry_run and not args.json:
        print(text)
    else:
        _say(args, msgspec.to_builtins(done), text)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from aggregator.commands import plan
    from aggregator.report.pages import placement

    report = plan.run(args.intake, args.inventory)
    _show(args, report, placement.page(report, "to be"))
    return 1 if report.short else 0


def _economics(args: argparse.Namespace) -> int:
    from aggregator import economics
    from aggregator.report.pages import economics as economics_page

    inputs = Inputs(**{field.name: getattr(args, field.name) for field in msgspec.structs.fields(Inputs)})
    report = economics.judge(inputs)
    _show(args, report, economics_page.page(report, args.currency))
    return 0


def _show(args: argparse.Namespace, report: msgspec.Struct, page: Page) -> None:
    """Print a result, and write it as HTML if requested."""
    from aggregator.report import html, markdown

    if args.html is not None:
        try:
            args.html.write_bytes(html.render(page))
        except OSError as error:
            raise Refused(f"write {args.html}: {error.strerror}") from None
    print(msgspec.json.encode(report).decode() if args.json else markdown.render(page).decode())


def _check_config(args: argparse.Namespace) -> int:
    config = _config(args)
    print(f"configuration valid: rack {config.rack}, {len(config.nodes)} nodes configured, time zone {config.timezone}")
    return 0


def _progress(args: argparse.Namespace) -> Callable[[str], None]:
    """A progress printer: active on a terminal or with --verbose, never with --json."""
    if args.json or not (args.verbose or sys.stderr.isatty()):
        return lambda _: None
    return lambda text: print(text, file=sys.stderr, flush=True)


def _say(args: argparse.Namespace, done: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps(done))
    elif args.verbose:
        print(text)
