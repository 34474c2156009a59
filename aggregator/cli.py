"""mlxrack-aggregator: rollups, reports and alerts from the bucket, as cron wants them.

Quiet when all is well. The only place that reads the environment and the command line. Exit codes are os.EX_*:
0 done, 64 wrong usage, 75 try later (another run is at it, the store is away), 77 the store refuses our credentials,
78 the configuration cannot be used, 1 anything else.
"""

import argparse
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
from shared import __version__, logs
from shared import config as shared_config
from shared.bucket import open_store
from shared.commandline import Parser
from shared.errors import AccessDenied, RackError, Retryable
from shared.secrets import resolve

CONFIG_VARIABLE = "MLXRACK_AGGREGATOR_CONFIG"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(argv)
    # a run that is told to stop gives its lease back on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logs.configure(args.log, level="info" if args.verbose else "warning")
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        return 130
    except RackError as error:
        print(f"mlxrack-aggregator: {error.message}", file=sys.stderr)
        return exit_status(error)
    return status


def exit_status(error: RackError) -> int:
    """os.EX_* of an error."""
    if isinstance(error, shared_config.ConfigError) or error.code == "no_secret":
        return os.EX_CONFIG
    if isinstance(error, AccessDenied):
        return os.EX_NOPERM
    return os.EX_TEMPFAIL if isinstance(error, Retryable) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlxrack-aggregator", description="Turn what the nodes reported into rollups, reports and alerts."
    )
    parser.add_argument("--version", action="version", version=f"mlxrack {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        default = f"aggregator.toml (default: ${CONFIG_VARIABLE}, then ./aggregator.toml)"
        added.add_argument("--config", type=Path, default=None, help=default)
        added.add_argument("--json", action="store_true", help="print what was done as JSON")
        added.add_argument("--verbose", "-v", action="store_true", help="say what is done")
        added.add_argument("--log", type=Path, default=None, help="write the log to this file instead of stderr")
        added.set_defaults(run=run)
        return added

    verb("rollup", "Add new telemetry to the minute and hour tables.", _rollup)
    week = verb("weekly", "Publish placement, cost and evictions of a week.", _weekly)
    week.add_argument("--week", default=None, help="like 2026-W47 (default: the last one that is over)")
    month = verb("monthly", "Publish the executive report of a month.", _monthly)
    month.add_argument("--month", default=None, help="like 2026-11 (default: the last one that is over)")
    verb("alert", "Tell people what changed since the last run.", _alert)
    verb("check-config", "Read the configuration and say what is wrong with it.", _check_config)
    return parser


def _config(args: argparse.Namespace) -> AggregatorConfig:
    path: Path = args.config or Path(os.environ.get(CONFIG_VARIABLE, "aggregator.toml"))
    return shared_config.load(path, AggregatorConfig, aggregator_config.check)


def _rollup(args: argparse.Namespace) -> int:
    from aggregator import lease
    from aggregator.commands import rollup

    config = _config(args)
    store = open_store(config.store, os.environ)
    with lease.held(store, "rollup"):
        manifest = rollup.run(config, store, os.environ, _telling(args))
    done = {
        "manifest": manifest.number,
        "batches": manifest.batches,
        "segments": manifest.segments,
        "quarantined_total": manifest.quarantined_total,
        "quarantined": [msgspec.to_builtins(q) for q in manifest.quarantined],
    }
    _say(args, done, f"manifest {manifest.number}: {manifest.batches} batches in all")
    return 0


def _weekly(args: argparse.Namespace) -> int:
    from aggregator import lease
    from aggregator.commands import rollup, weekly
    from aggregator.window import last_week

    config = _config(args)
    name = args.week or last_week(datetime.now(UTC), config.timezone)
    store = open_store(config.store, os.environ)
    with lease.held(store, "rollup"):
        rollup.run(config, store, os.environ, _telling(args))
        published = weekly.run(config, store, name)
    _say(args, {"week": name, "published": published}, "\n".join(published))
    return 0


def _monthly(args: argparse.Namespace) -> int:
    from aggregator import lease
    from aggregator.commands import monthly, rollup
    from aggregator.window import last_month

    config = _config(args)
    name = args.month or last_month(datetime.now(UTC), config.timezone)
    store = open_store(config.store, os.environ)
    with lease.held(store, "rollup"):
        rollup.run(config, store, os.environ, _telling(args))
        published = monthly.run(config, store, name)
    _say(args, {"month": name, "published": published}, "\n".join(published))
    return 0


def _alert(args: argparse.Namespace) -> int:
    from aggregator import lease, notify
    from aggregator.commands import alert

    config = _config(args)
    store = open_store(config.store, os.environ)
    references = {"alerts": config.discord.alerts, "thermal": config.discord.thermal}
    urls = {name: resolve(reference, os.environ) for name, reference in references.items() if reference}
    with lease.held(store, "alert"):
        sent = alert.run(config, store, notify.Discord(urls))
    told = [{"code": n.rule.code, "subject": n.firing.subject, "resolved": n.resolved} for n in sent]
    _say(args, {"sent": told}, f"{len(told)} notices")
    return 0


def _check_config(args: argparse.Namespace) -> int:
    config = _config(args)
    print(f"fine; rack {config.rack}, {len(config.nodes)} nodes with prices, reports in {config.timezone}")
    return 0


def _telling(args: argparse.Namespace) -> Callable[[str], None]:
    """Progress for who watches: on a terminal, or when it is asked for."""
    if args.json or not (args.verbose or sys.stderr.isatty()):
        return lambda _: None
    return lambda text: print(text, file=sys.stderr, flush=True)


def _say(args: argparse.Namespace, done: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps(done))
    elif args.verbose:
        print(text)
