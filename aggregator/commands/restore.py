"""Bring a bucket back from a copy that `sync` made.

The manifest is written last, and a marker says from the first object to the last that the bucket is not whole: no other
verb works on it until the restore is finished. After an interruption the next run continues.
"""

import contextlib
import itertools
import time
from collections.abc import Mapping

import msgspec

from aggregator import lease
from aggregator.commands import sync
from aggregator.commands.sync import MARKER, Copied, Memory, Told
from shared import bucket_rack, desired, keys
from shared.batch import unseal
from shared.desired import Moment
from shared.errors import RackError, Refused, Retryable
from shared.store import ObjectStore, each, find

FEW = 20
"""Segments that are looked at for the name of their rack."""


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """A restore into this bucket: unfinished while ``finished_ms`` is 0. ``seen`` is what it has replaced so far."""

    rack: str
    began_ms: Moment
    finished_ms: Moment = 0
    seen: dict[str, str] = {}


class Restored(Copied, kw_only=True):
    """``as_of_ms`` is when the copy was made, 0 if it does not say; ``missing_models`` are versions of the desired
    state that are not in the bucket."""

    as_of_ms: int = 0
    missing_models: list[str] = []  # noqa: RUF012  # msgspec copies it


def check_whole(store: ObjectStore) -> None:
    """Raises Retryable while a restore into this bucket is unfinished."""
    marker = _marker(store)
    if marker is not None and not marker.finished_ms:
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(marker.began_ms / 1000))
        why = "`mlxrack-aggregator restore` once more finishes it"
        raise Retryable(f"this bucket is being restored since {since} and is not whole yet; {why}", code="restoring")


def run(
    source: ObjectStore,
    target: ObjectStore,
    rack: str,
    *,
    models: bool = False,
    force: bool = False,
    dry_run: bool = False,
    told: Told = lambda _: None,
) -> Restored:
    """Copy everything back. Raises Refused where that would mix two racks or two histories; ``force`` allows a bucket
    that holds something already and a copy of another rack or without an end."""
    copy = sync.copy_of(source)
    if not force:
        _check_source(source, copy, rack)
    marker = _marker(target)
    begun = marker if marker is not None and not marker.finished_ms else None
    if begun is None:
        _check_target(source, target, rack, force=force)
    elif begun.rack != rack and not force:
        raise Refused(f"restore: a restore of rack {begun.rack} was interrupted in this bucket; finish that one first")
    done = Restored(clashes=[], missing_models=[], as_of_ms=copy.finished_ms if copy is not None else 0)
    prefixes = sync.wanted(models=models)
    if dry_run:
        _count(source, prefixes, done)
        return done
    began = begun or Marker(rack=rack, began_ms=_now_ms())
    with lease.held(target, "rollup"):
        _write(target, began)
        memory = Memory(dict(began.seen), lambda seen: _write(target, _with(began, seen)))
        made = sync.copied(source, target, prefixes, memory, held_back=True, told=told)
    done.written, done.bytes, done.present, done.clashes = made.written, made.bytes, made.present, made.clashes
    if not done.clashes:
        done.missing_models = _missing_models(target)
        _write(target, msgspec.structs.replace(began, finished_ms=_now_ms(), seen={}))
    return done


def _check_source(source: ObjectStore, copy: sync.Copy | None, rack: str) -> None:
    found = {copy.rack} if copy is not None else _racks(source)
    if copy is None and not any(source.list_after(prefix, limit=1) for prefix in keys.PREFIXES):
        raise Refused("restore: there is no copy in that store; is [store] of the file that of `sync --to`?")
    if copy is not None and not copy.finished_ms:
        raise Refused("restore: no sync into that copy ever finished, so it is not whole; --force takes what there is")
    if found and found != {rack}:
        theirs = ", ".join(sorted(found))
        raise Refused(f"restore: that is a copy of rack {theirs}, this aggregator's is {rack}; --force takes it anyway")


def _check_target(source: ObjectStore, target: ObjectStore, rack: str, *, force: bool) -> None:
    if not force:
        if others := sorted(_racks(target) - {rack}):
            raise Refused(f"restore: the bucket belongs to rack {', '.join(others)}, not to {rack}; see [store]")
        if (held := _held(target)) is not None:
            why = "--force restores beside what is there, if that is what nodes of this rack uploaded since"
            raise Refused(f"restore: the bucket is not empty (it has objects under {held}); {why}")
    for listed in each(target, "manifest/"):
        theirs = find(source, listed.key, keys.MOST_MANIFEST_BYTES)
        if theirs is None or theirs.body != target.get(listed.key, keys.MOST_MANIFEST_BYTES).body:
            why = "delete manifest/, minute/, hour/ and day/ in it first: raw segments are rolled up again afterwards"
            raise Refused(f"restore: the bucket has commits of its own, made since the copy; {why}")


def _held(store: ObjectStore) -> str | None:
    """Where the first object is that a restore would meet. Leases and the state of alerts are no data."""
    for listed in each(store, ""):
        first, *rest = listed.key.split("/")
        if first != "state" and not (rest or [first])[-1].startswith("."):
            return f"{first}/" if rest else "its root"
    return None


def _racks(store: ObjectStore) -> set[str]:
    """The racks that the bucket and the first segments name."""
    found = {bucket_rack.told(store)} - {""}
    for listed in itertools.islice(each(store, keys.RAW_PREFIX), FEW):
        if not keys.is_claim(listed.key):
            with contextlib.suppress(RackError):
                found |= {one.rack for one in unseal(store.get(listed.key, keys.MOST_SEGMENT_BYTES).body)}
    return found


def _count(source: ObjectStore, prefixes: list[str], done: Restored) -> None:
    for prefix in prefixes:
        for listed in each(source, prefix):
            if not listed.key.startswith(sync.OWN):
                done.written += 1
                done.bytes += listed.size


def _missing_models(store: ObjectStore) -> list[str]:
    stored = find(store, keys.DESIRED, keys.MOST_DESIRED_BYTES)
    with contextlib.suppress(RackError):
        nodes = desired.parse(stored.body).nodes if stored is not None else {}
        there = {listed.key for listed in each(store, keys.MODEL_PREFIX)}
        wanted = {(one.source, one.version) for given in nodes.values() for one in given}
        return sorted(f"{name}@{v}" for name, v in wanted if keys.model_manifest_key(name, v) not in there)
    return []


def _marker(store: ObjectStore) -> Marker | None:
    stored = find(store, MARKER, keys.MOST_STATE_BYTES)
    try:
        return msgspec.json.decode(stored.body, type=Marker) if stored is not None else None
    except (msgspec.DecodeError, RecursionError):
        raise Refused(f"{MARKER}: cannot be parsed; delete it if this bucket is whole") from None


def _with(marker: Marker, seen: Mapping[str, str]) -> Marker:
    return msgspec.structs.replace(marker, seen=dict(seen))


def _write(store: ObjectStore, marker: Marker) -> None:
    store.put(MARKER, msgspec.json.encode(marker, order="sorted"))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
