"""The verbs that copy a bucket: sync, restore."""

import argparse
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from aggregator.commands import restore, sync
from aggregator.commands.cli_reports import Verb
from aggregator.commands.ended import Ended, command
from aggregator.config import AggregatorConfig
from shared import config as shared_config
from shared.bucket import Store, check_store, place
from shared.errors import Refused
from shared.store import ObjectStore
from shared.store_open import open_store

Configured = Callable[[argparse.Namespace], AggregatorConfig]
Progress = Callable[[argparse.Namespace], Callable[[str], None]]


class Other(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file passed to `sync --to` and `restore --from`."""

    store: Store


def add(verb: Verb, configured: Configured, progress: Progress, environ: Mapping[str, str]) -> None:
    """Add the verbs to a parser."""
    copy = verb(
        "sync",
        "Copy the bucket into another store, incrementally: a backup that `restore` brings back.",
        lambda args: _sync(args, configured(args), progress(args), environ),
    )
    copy.add_argument("--to", type=Path, required=True, help="TOML file with the target [store]")
    copy.add_argument("--without-raw", action="store_true", help="skip raw segments")
    copy.add_argument("--models", action="store_true", help="also models/: everything that was pushed")
    back = verb(
        "restore",
        "Bring an empty bucket back from a copy that `sync` made; run again after an interruption.",
        lambda args: _restore(args, configured(args), progress(args), environ),
    )
    back.add_argument("--from", dest="copy", type=Path, required=True, help="TOML file with the [store] of the copy")
    back.add_argument("--models", action="store_true", help="also models/, if the copy has it")
    back.add_argument("--dry-run", action="store_true", help="show what would be restored")
    allowed = "go on although the bucket is not empty, or the copy is another rack's or not whole"
    back.add_argument("--force", action="store_true", help=allowed)


def _stores(config: AggregatorConfig, file: Path, environ: Mapping[str, str]) -> tuple[ObjectStore, ObjectStore, str]:
    """This rack's bucket, the other store, and where that is. Raises Refused if the two are one."""
    other = shared_config.load(file, Other, lambda one: check_store(one.store)).store
    if _identity(other) == _identity(config.store):
        raise Refused(f"{file}: its [store] is the bucket of aggregator.toml itself; a copy needs another place")
    return open_store(config.store, environ), open_store(other, environ), place(other)


def _identity(store: Store) -> tuple[str, ...]:
    if store.kind == "directory":
        return (str(Path(store.path).expanduser().resolve()),)
    return (store.endpoint.rstrip("/"), store.bucket, store.prefix)


def _sync(
    args: argparse.Namespace, config: AggregatorConfig, told: Callable[[str], None], environ: Mapping[str, str]
) -> Ended:
    here, there, where = _stores(config, args.to, environ)
    restore.check_whole(here)
    done = sync.run(here, there, config.rack, raw=not args.without_raw, models=args.models, told=told)
    left_out = "" if args.models or not here.list_after("models/", limit=1) else "; models/ left out (--models)"
    bring = command(f"restore --from {args.to}", args.config)
    return Ended(
        line=f"sync: {_size(done)} copied from {place(config.store)} to {where}{left_out}; back again: {bring}",
        data=done,
        problems=tuple(f"sync {key}: source and target differ; neither was changed" for key in done.clashes),
        status=1 if done.clashes else 0,
    )


def _restore(
    args: argparse.Namespace, config: AggregatorConfig, told: Callable[[str], None], environ: Mapping[str, str]
) -> Ended:
    here, there, where = _stores(config, args.copy, environ)
    done = restore.run(there, here, config.rack, models=args.models, force=args.force, dry_run=args.dry_run, told=told)
    as_of = f" as of {datetime.fromtimestamp(done.as_of_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC" if done.as_of_ms else ""
    what = "would be restored" if args.dry_run else "restored"
    line = f"restore: {_size(done)} {what} from {where}{as_of} to {place(config.store)}"
    if done.clashes:
        line += "; it is not finished: see above"
    elif not args.dry_run:
        line += f"; next: {command('rollup', args.config)}"
    problems = [f"restore {key}: the bucket holds another one, which was kept" for key in done.clashes]
    if done.clashes:
        problems.append("restore: no manifest was written, so the bucket is not whole; remove these and run it again")
    if done.missing_models:
        named = ", ".join(done.missing_models)
        what = f"restore: the desired state names versions that are not in the bucket: {named}"
        problems.append(f"{what}; nodes that have them serve them, others need mlxrack-agent models push")
    return Ended(
        line="" if args.dry_run else line,
        shown=line if args.dry_run else "",
        data=done,
        problems=tuple(problems),
        status=1 if done.clashes else 0,
    )


def _size(done: sync.Copied) -> str:
    return f"{done.written:,} objects, {done.bytes / 1e6:.1f} MB"
