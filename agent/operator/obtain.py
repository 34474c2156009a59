"""A model of the hub for this node: from its own store, else from the rack's bucket, else from the hub. Blocking."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from agent.config import AgentConfig
from agent.files.hub import Hub
from agent.files.hub_listing import Asked, Listing, is_commit, local_name
from agent.files.model_pull import Source, find_in_bucket, pull, push
from agent.files.modelstore import Installed, ModelStore, model_folder
from agent.operator.statusview import size
from shared.bucket import REFERENCE_HINT, is_reference
from shared.catalog import ModelFile
from shared.errors import AccessDenied, Halt, RackError, Refused
from shared.keys import check_name
from shared.secrets import resolve
from shared.store import ObjectStore
from shared.store_open import open_store

OWN_BUCKET = "bucket"
"""Folder in the state folder for the telemetry of a node without a [store]; no other node sees it."""
Say = Callable[[str], None]
Before = Callable[[Listing, bytes], None]
"""Called with a model's files and its config.json before they are downloaded; it may refuse."""


class Access(NamedTuple):
    """What a node may fetch models with. ``token`` is a reference to the hub's token; ``bucket`` is None without a
    configured [store]; ``say`` takes lines for whoever waits; ``state`` is the node's state folder."""

    store: ModelStore
    bucket: Callable[[], ObjectStore] | None
    environ: Mapping[str, str]
    say: Say
    token: str = ""
    offline: bool = False
    disk_bytes: int = 0
    silent: bool = False
    state: Path | None = None

    def rack_bucket(self, what: str) -> ObjectStore:
        """The bucket of the rack. Raises Refused where none is configured."""
        if self.bucket is None:
            raise Refused(f"{what}: no [store] is configured; it names the bucket that the rack's nodes share")
        return self.bucket()

    def hub(self) -> Hub:
        """The hub. Raises Refused when this node has to stay offline, Halt when the token cannot be resolved."""
        if self.token and not is_reference(self.token):
            raise Refused(f"--token: {REFERENCE_HINT}")
        token = resolve(self.token, self.environ) if self.token and not self.offline else ""
        return Hub(self.environ, token=token, offline=self.offline)


def access_of(config: AgentConfig, state: Path, environ: Mapping[str, str], args: argparse.Namespace) -> Access:
    """What the configuration and the command line allow."""
    own = config.store.path == str(state / OWN_BUCKET)
    return Access(
        store=ModelStore(state / "models.json", model_folder(config, state)),
        bucket=None if own else lambda: open_store(config.store, environ),
        environ=environ,
        say=lambda line: None if args.json else print(line, file=sys.stderr, flush=True),
        token=args.token,
        offline=args.offline,
        disk_bytes=config.model_store.disk_bytes,
        silent=args.json,
        state=state,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that may ask the hub."""
    parser.add_argument("--revision", default="", help="commit, branch or tag (default: what is here, else main)")
    parser.add_argument("--token", default="", help="reference to the hub's token, like env:NAME (default: $HF_TOKEN)")
    parser.add_argument("--offline", action="store_true", help="never ask the hub (so does HF_HUB_OFFLINE=1)")


def obtain(
    asked: Asked,
    access: Access,
    *,
    name: str = "",
    before: Callable[[Listing, bytes], None] = lambda listing, config: None,
) -> Installed:
    """Install a model of the hub under ``name``, unless it is here. Without a revision any that this node or the bucket
    has will do. Raises RackError."""
    comparable = not asked.revision or is_commit(asked.revision)
    if comparable and (found := _nearby(asked, access, name)) is not None:
        return found
    listing = (hub := access.hub()).listing(asked)
    origin = listing.origin
    if (found := _nearby(Asked(origin.repo, origin.revision), access, name)) is not None:
        return found
    licence = f"licence {origin.licence}" if origin.licence else "no licence stated"
    access.say(
        f"{origin.repo} at {origin.revision[:12]}: {size(listing.size)}, {licence} ({hub.address}/{origin.repo})"
    )
    name = check_name(name, "model name") if name else local_name(origin.repo)
    source = hub.source(listing, access.store.fragments(name))
    before(listing, source.config)
    return fetched(source, access, name)


def fetched(source: Source, access: Access, name: str) -> Installed:
    """Pull from a source with progress on the terminal."""
    progress = Progress(f"pull {name}", access.silent)
    if access.state is not None:  # the store may be in it, and unlike the store it is private
        access.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return pull(source, access.store, name, disk_bytes=access.disk_bytes, progress=progress, begins=progress.begins)


def publish(installed: Installed, access: Access) -> None:
    """Upload an installed version to the bucket, for all nodes. Raises RackError; the credential has to be one that may
    write ``models/``, which a node's may not."""
    bucket = access.rack_bucket("publish")
    place, progress = access.store.place(installed.name, installed.version), Progress("publish", access.silent)
    try:
        push(place, access.store, bucket, installed.name, progress=progress)
    except AccessDenied as error:
        remedy = "models/ is the operator's: publish with a configuration whose [store] has the operator's credential"
        raise Halt(f"publish {installed.name}: {error.message}; {remedy}", code=error.code) from None


def _nearby(asked: Asked, access: Access, name: str) -> Installed | None:
    """The model in the store or from the bucket, if it is in one of them."""
    if held := access.store.from_hub(asked, name):
        newest = held[-1]
        revision = newest.origin.revision[:12] if newest.origin else ""
        access.say(f"{asked.repo}: {newest.name}@{newest.version} is here already (revision {revision})")
        return newest
    if access.bucket is None:
        return None
    try:
        source = find_in_bucket(access.bucket(), name or local_name(asked.repo), asked)
    except Refused:
        raise
    except RackError as error:
        access.say(f"the bucket cannot be asked ({error.message}); asking the hub")
        return None
    if source is None:
        return None
    access.say(f"{asked.repo}: from the bucket")
    return fetched(source, access, name or local_name(asked.repo))


class Progress:
    """Of a pull or a push, on a terminal only: one line that is rewritten, with the file and the total."""

    def __init__(self, what: str, silent: bool = False) -> None:
        self._what, self._live = what, sys.stderr.isatty() and not silent
        self._began, self._said, self._file, self._before, self._done = time.monotonic(), -1, "", 0, 0
        self._file_bytes = 0

    def begins(self, file: ModelFile) -> None:
        """The next file."""
        self._file, self._file_bytes, self._before = file.name, file.size, self._done

    def __call__(self, done: int, total: int) -> None:
        """Bytes of all files together."""
        self._done, percent = done, 100 * done // total if total else 100
        if not self._live or percent == self._said:
            return
        self._said = percent
        speed = done / max(1e-3, time.monotonic() - self._began)
        of_file = f" ({self._file}: {100 * (done - self._before) // self._file_bytes} %)" if self._file_bytes else ""
        line = f"{self._what}: {percent} %, {size(done)} of {size(total)}, {size(int(speed))}/s{of_file}"
        print(f"\r{line:<100}", end="\n" if percent == 100 else "", file=sys.stderr, flush=True)
