"""mlxrack-agent models: the models that this node serves, and its model store on disk."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.config import STORED, AgentConfig, Model
from agent.files.hub_listing import parse_name
from agent.files.model_pull import BucketSource, FolderSource, in_bucket, push
from agent.files.modelstore import Installed, ModelStore
from agent.operator import obtain, recommended
from agent.operator.admin_client import AdminClient
from agent.operator.obtain import Access, Progress, access_of, fetched, publish
from agent.operator.statusview import models_text, size, table
from shared import chips
from shared.errors import RackError, Refused, Retryable
from shared.keys import check_name

BUCKET = "bucket:"
NAME = "model name (choose one with --name)"
RECOMMEND = "List models that fit a Mac's memory, with the tokens per second to expect."
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Verb = Callable[[argparse.Namespace, AgentConfig, Path], int]


def add(models: argparse.ArgumentParser, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the verbs under ``models``; without a verb it lists."""
    models.set_defaults(run=lambda args: _list(args, *load(args)))
    # only a pull looks for models elsewhere
    models.set_defaults(token="", offline=True)
    verbs = models.add_subparsers(metavar="VERB")

    def verb(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        common(added)
        added.set_defaults(run=lambda args: run(args, *load(args)))
        return added

    verb("list", "List the models that this node serves, those in its store and those in the bucket.", _list)
    fetch = verb("pull", "Install a model into this node's store: verified, resumable, atomic.", _pull)
    fetch.add_argument("source", help="org/model on the Hugging Face hub, bucket:NAME[@VERSION], or a model folder")
    fetch.add_argument("--name", default="", help="name in the store (default: that of the source)")
    fetch.add_argument("--publish", action="store_true", help="then upload it to the bucket, as the operator may")
    obtain.add_options(fetch)
    put = verb("push", "Upload a model folder to the bucket, for all nodes to pull.", _push)
    put.add_argument("folder", type=Path, help="a model folder, or a Hugging Face cache folder")
    put.add_argument("name", help="name in the bucket")
    put.add_argument("--again", action="store_true", help="upload files again that are already in the bucket")
    for name in ("rm", "remove"):
        out = verb(name, "Delete a version from this node's store.", _remove)
        out.add_argument("model", help="NAME@VERSION, or NAME when there is only one version")
    advice = verbs.add_parser("recommend", help=RECOMMEND, description=RECOMMEND)
    advice.add_argument("--memory", type=float, default=0.0, metavar="GB", help="memory (default: this machine's)")
    advice.add_argument("--chip", default="", help='chip, like "M4 Pro" (default: this machine\'s)')
    advice.add_argument("--bandwidth", type=float, default=0.0, metavar="GB/S", help="its memory bandwidth, if unknown")
    advice.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    advice.add_argument(
        "--markdown", action="store_true", help="print the table of all memory sizes for docs/models.md"
    )
    advice.set_defaults(run=_recommend, config=None)


def _list(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    access = access_of(config, state, os.environ, args)
    stored, partials, shared = access.store.installed(), access.store.partials(), _in_bucket(access)
    try:
        served = AdminClient(config, state).status()["models"]
    except Retryable as error:
        served = []
        access.say(f"(agent not running: {error.message})")
    loaded = {m["path"] for m in served if m["version"]}
    resident = {one: str(access.store.place(one.name, one.version)) in loaded for one in stored}
    if args.json:
        tree = [{**msgspec.to_builtins(one), "loaded": resident[one]} for one in stored]
        print(json.dumps({"served": served, "stored": tree, "bucket": msgspec.to_builtins(shared)}, indent=2))
        return 0
    if served:
        print(models_text(served) + "\n")
    head = ("MODEL", "VERSION", "SIZE", "REVISION", "LICENCE", "WHERE", "PATH FOR agent.toml")
    rows = [
        (*_cells(one), "loaded" if resident[one] else "here", f"{STORED}{one.name}@{one.version}") for one in stored
    ]
    rows += [(*_cells(one), "incomplete", "pull it again") for one in partials]
    rows += [(*_cells(one), "bucket", f"pull {BUCKET}{one.name}@{one.version}") for one in shared]
    print("\n".join([*([] if stored else ["the model store is empty"]), *([table(head, rows)] if rows else [])]))
    return 0


def _cells(one: Installed) -> tuple[str, str, str, str, str]:
    """Name, version, size, revision on the hub and licence."""
    origin = one.origin
    revision = f"{origin.repo}@{origin.revision[:12]}" if origin else "-"
    return one.name, one.version, size(one.size), revision, (origin.licence if origin else "") or "-"


def _in_bucket(access: Access) -> list[Installed]:
    """The models in the bucket; none, with a line that says so, where it cannot be listed."""
    if access.bucket is None:
        return []
    try:
        return in_bucket(access.bucket())
    except RackError as error:
        access.say(f"(bucket: {error.message})")
        return []


def _pull(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    access = access_of(config, state, os.environ, args)
    installed = _pulled(args, access)
    if args.publish:
        publish(installed, access)
    elif access.bucket is not None and installed.origin is not None and not args.source.startswith(BUCKET):
        access.say("other nodes pull it from the hub, too, unless an operator publishes it: add --publish")
    return _done(args, installed, f'in the store; to serve it: path = "{STORED}{installed.name}@{installed.version}"')


def _pulled(args: argparse.Namespace, access: Access) -> Installed:
    if args.source.startswith(BUCKET):
        asked, _, version = args.source.removeprefix(BUCKET).partition("@")
        source = BucketSource(access.rack_bucket("pull"), check_name(asked, "model"), version)
        return fetched(source, access, check_name(args.name or asked, NAME))
    folder = Path(args.source).expanduser()
    if not folder.exists() and (hub := parse_name(args.source)) is not None:
        asked_for = hub._replace(revision=args.revision or hub.revision)
        return obtain.obtain(asked_for, access, name=args.name)
    access.say(f"hashing {folder} ...")
    name = check_name(args.name or folder.resolve().name, NAME)
    return fetched(FolderSource(access.store, folder), access, name)


def _push(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    name, access = check_name(args.name, "model name"), access_of(config, state, os.environ, args)
    bucket = access.rack_bucket("push")
    folder, progress = args.folder.expanduser(), Progress(f"push {name}", args.json)
    pushed = push(folder, access.store, bucket, name, again=args.again, progress=progress)
    return _done(args, pushed, f"in the bucket; nodes get it with `mlxrack-agent models pull {BUCKET}{name}`")


def _recommend(args: argparse.Namespace) -> int:
    if args.markdown:
        print(recommended.markdown())
        return 0
    from agent.telemetry.sensors.host import hardware

    here = hardware() if not args.memory or not args.chip else None
    memory_gb = args.memory or (here.memory_bytes / (1 << 30) if here else 0)
    if not memory_gb:
        raise Refused("models recommend: this machine does not tell its memory; give it by --memory (GB)")
    brand = args.chip or (here.chip if here and not args.memory else "")
    model = here.model if here and not args.memory and not args.chip else ""
    told = chips.identify(model, brand, int(memory_gb * chips.GIB))
    given = chips.Chip(name=brand or "given", bandwidth_gb_s=args.bandwidth, tflops=0) if args.bandwidth > 0 else None
    chip = given or told.chip
    found = recommended.for_memory(memory_gb, chip)
    if args.json:
        machine = {"memory_gb": memory_gb, "chip": told.chip.name if told.chip else None, "remarks": told.remarks}
        print(json.dumps({**machine, "models": msgspec.to_builtins(found)}, indent=2))
        return 0
    speed = f"{chip.bandwidth(memory_gb):g} GB/s" if chip else "unknown to this program: no tokens/s"
    print(f"{memory_gb:.0f} GB, chip {brand or 'not given'} ({speed}); calculated, not measured")
    for remark in told.remarks if brand and told.chip else ():
        print(f"note: {remark}")
    if chip is None:
        print(f"note: {chips.unknown(brand, model)}; --bandwidth gives its GB/s")
    print(table(recommended.HEAD, recommended.rows_of(found)) if found else "no model of the table fits")
    return 0


def _remove(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    store = access_of(config, state, os.environ, args).store
    name, _, version = args.model.partition("@")
    held = [one for one in (*store.installed(name), *store.partials()) if one.name == name]
    if not version and len(held) != 1:
        names = ", ".join(one.version for one in held)
        what = f"{len(held)} versions in the store: {names}; name one" if held else "it is not in the store"
        raise Refused(f"remove {name}: {what}", code="not_found")
    version = version or held[0].version
    _refuse_while_served(config, state, store, store.place(name, version))
    freed = sum(one.size for one in held if one.version == version)
    store.remove(name, version)
    gone = {"removed": name, "version": version, "freed_bytes": freed}
    print(json.dumps(gone) if args.json else f"removed {name}@{version}, {size(freed)} freed")
    return 0


def _refuse_while_served(config: AgentConfig, state: Path, store: ModelStore, place: Path) -> None:
    what = f"remove {place.parent.name}@{place.name}"
    if names := [model.name for model in config.models if _is_at(store, model, place)]:
        raise Refused(f"{what}: [[models]] {names[0]} is configured with it; remove that table first")
    client = AdminClient(config, state)
    try:
        served, orders = client.status()["models"], client.orders()["orders"]
    except Retryable as error:
        if error.code == "not_running":
            return
        raise
    if users := [m["model"] for m in served if str(place) == m["path"]]:
        raise Refused(f"{what}: it serves {users[0]}; unload that model first")
    swaps = [(one["model"], one["orders"]["swap"]) for one in orders if one["orders"]["swap"]]
    if users := [model for model, swap in swaps if _is_at(store, Model(name="_", path=swap["table"]["path"]), place)]:
        raise Refused(f"{what}: {users[0]} was swapped to it; end that with `mlxrack-agent orders clear {users[0]}`")


def _is_at(store: ModelStore, model: Model, place: Path) -> bool:
    with contextlib.suppress(Refused):
        return bool(model.path) and store.resolve(model) == place
    return False


def _done(args: argparse.Namespace, installed: Installed, where: str) -> int:
    if args.json:
        print(msgspec.json.encode(installed).decode())
    else:
        print(f"{installed.name} {installed.version}, {size(installed.size)}: {where}")
    return 0
