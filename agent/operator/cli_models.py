"""mlxrack-agent models: the models that this node serves, and its model store on disk."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.config import STORED, AgentConfig
from agent.files.model_pull import BucketSource, FolderSource, Source, pull, push
from agent.files.modelstore import Installed, ModelStore, model_folder
from agent.operator.admin_client import AdminClient
from agent.operator.statusview import models_text, size, table
from shared.errors import Refused, Retryable
from shared.keys import check_name
from shared.store_open import open_store

BUCKET = "bucket:"
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Verb = Callable[[argparse.Namespace, AgentConfig, Path], int]


def add(models: argparse.ArgumentParser, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the verbs under ``models``; without a verb it lists."""
    models.set_defaults(run=lambda args: _list(args, *load(args)))
    verbs = models.add_subparsers(metavar="VERB")

    def verb(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        common(added)
        added.set_defaults(run=lambda args: run(args, *load(args)))
        return added

    verb("list", "List the models that this node serves and those in its store.", _list)
    fetch = verb("pull", "Install a model into this node's store: verified, resumable, atomic.", _pull)
    fetch.add_argument(
        "source", help="a model folder, a Hugging Face cache folder, or bucket:NAME[@VERSION] for one in the bucket"
    )
    fetch.add_argument("--name", default="", help="name in the store (default: the folder's or the bucket's)")
    put = verb("push", "Upload a model folder to the bucket, for all nodes to pull.", _push)
    put.add_argument("folder", type=Path, help="a model folder, or a Hugging Face cache folder")
    put.add_argument("name", help="name in the bucket")
    put.add_argument("--again", action="store_true", help="upload files again that are already in the bucket")
    out = verb("remove", "Delete a version from this node's store.", _remove)
    out.add_argument("model", help="NAME@VERSION, or NAME when there is only one version")


def _list(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    stored, partials = _store(config, state).installed(), _store(config, state).partials()
    try:
        served = AdminClient(config, state).status()["models"]
    except Retryable as error:
        served = []
        print(f"(agent not running: {error.message})", file=sys.stderr)
    if args.json:
        print(json.dumps({"served": served, "stored": msgspec.to_builtins(stored)}, indent=2))
        return 0
    if served:
        print(models_text(served) + "\n")
    rows = [(one.name, one.version, size(one.size), f"{STORED}{one.name}@{one.version}") for one in stored]
    rows += [(one.name, one.version, size(one.size), "incomplete; pull it again") for one in partials]
    print(table(("STORED", "VERSION", "SIZE", "PATH FOR agent.toml"), rows) if rows else "the model store is empty")
    return 0


def _pull(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    store = _store(config, state)
    source: Source
    if args.source.startswith(BUCKET):
        asked, _, version = args.source.removeprefix(BUCKET).partition("@")
        source = BucketSource(open_store(config.store, os.environ), check_name(asked, "model"), version)
    else:
        folder = Path(args.source).expanduser()
        asked = folder.resolve().name
        if not args.json:
            print(f"hashing {folder} ...", file=sys.stderr, flush=True)
        source = FolderSource(store, folder)
    name = check_name(args.name or asked, "model name (choose one with --name)")
    progress = _Progress(f"pull {name}", args.json)
    installed = pull(source, store, name, disk_bytes=config.model_store.disk_bytes, progress=progress)
    return _done(args, installed, f'in the store; to serve it: path = "{STORED}{name}@{installed.version}"')


def _push(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    name = check_name(args.name, "model name")
    bucket = open_store(config.store, os.environ)
    folder, progress = args.folder.expanduser(), _Progress(f"push {name}", args.json)
    pushed = push(folder, _store(config, state), bucket, name, again=args.again, progress=progress)
    return _done(args, pushed, f"in the bucket; nodes get it with `mlxrack-agent models pull {BUCKET}{name}`")


def _remove(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    store = _store(config, state)
    name, _, version = args.model.partition("@")
    held = [one.version for one in (*store.installed(name), *store.partials()) if one.name == name]
    if not version and len(held) != 1:
        what = f"{len(held)} versions in the store: {', '.join(held)}; name one" if held else "it is not in the store"
        raise Refused(f"remove {name}: {what}", code="not_found")
    version = version or held[0]
    _refuse_while_served(config, state, store.place(name, version), version)
    store.remove(name, version)
    print(json.dumps({"removed": name, "version": version}) if args.json else f"removed {name}@{version}")
    return 0


def _refuse_while_served(config: AgentConfig, state: Path, place: Path, version: str) -> None:
    try:
        served = AdminClient(config, state).status()["models"]
    except Retryable as error:
        if error.code == "not_running":
            return
        raise
    if users := [m["model"] for m in served if str(place) == m["path"]]:
        raise Refused(f"remove {place.parent.name}@{version}: it serves {users[0]}; unload that model first")


def _store(config: AgentConfig, state: Path) -> ModelStore:
    return ModelStore(state / "models.json", model_folder(config, state))


def _done(args: argparse.Namespace, installed: Installed, where: str) -> int:
    if args.json:
        print(msgspec.json.encode(installed).decode())
    else:
        print(f"{installed.name} {installed.version}, {size(installed.size)}: {where}")
    return 0


class _Progress:
    """On a terminal one line that is rewritten; elsewhere a line for every 10 %."""

    def __init__(self, what: str, silent: bool) -> None:
        self._what, self._silent = what, silent
        self._began, self._said = time.monotonic(), -1
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        step = percent if self._live else percent // 10
        if self._silent or step == self._said:
            return
        self._said = step
        speed = done / max(1e-3, time.monotonic() - self._began)
        line = f"{self._what}: {percent} %, {size(done)} of {size(total)}, {size(int(speed))}/s"
        end = "\n" if percent == 100 or not self._live else ""
        print(f"\r{line:<70}" if self._live else line, end=end, file=sys.stderr, flush=True)
