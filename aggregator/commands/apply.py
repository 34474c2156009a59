"""Publish an accepted placement as the rack's desired state, or the state before it again. Agents follow it at their
next poll."""

import time
from collections.abc import Collection

import msgspec

from aggregator import acceptance, load, publish
from aggregator.acceptance import Sources
from aggregator.commands.ended import NothingToPublish
from aggregator.config import AggregatorConfig
from aggregator.placement import Move, PlacementReport
from shared import desired, keys
from shared.batch import digest
from shared.desired import DesiredState
from shared.errors import Refused
from shared.store import ObjectStore, Stored, each, find


class Replaced(msgspec.Struct, frozen=True, kw_only=True):
    """What a published desired state replaced: the state to go back to, and the key of the record of what that one
    replaced ("" if it was the first). Kept under desired/, beside what it belongs to."""

    before: DesiredState
    earlier: str = ""


def proposal(store: ObjectStore, period: str) -> PlacementReport:
    """The latest placement published for a period. Raises Refused."""
    found = load.newest_report(store, "weekly", period, "placement", "json")
    if found is None:
        raise Refused(f"apply: no placement published for {period}; create one with: mlxrack-aggregator weekly")
    try:
        return msgspec.json.decode(found.body, type=PlacementReport)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(f"apply: the placement of {period} cannot be parsed ({error}); publish it again") from None


def run(
    config: AggregatorConfig, store: ObjectStore, report: PlacementReport, steps: Collection[int] | None, dry_run: bool
) -> tuple[tuple[Move, ...], DesiredState]:
    """The moves and the resulting desired state, published unless ``dry_run``. Raises NothingToPublish when it changes
    nothing, Refused when it is impossible, Retryable when another writer was first."""
    if not report.nodes:
        raise NothingToPublish(f"apply: no node was there at the end of {report.period}, so nothing is proposed for it")
    stored, before = _current(store)
    _check_rack(config, before)
    chosen = acceptance.accepted(report, steps)
    source_of = _sources(store)
    state = acceptance.desired(report, chosen, before, source_of, _now_ms())
    state = msgspec.structs.replace(state, rack=config.rack)
    if state.nodes == (before.nodes if before is not None else {}):
        raise NothingToPublish(_why_nothing(report, before))
    if not dry_run:
        nodes = acceptance.standing(report, chosen, before, source_of)
        was = msgspec.structs.replace(before or DesiredState(generation=1), nodes=nodes)
        _publish(store, state, stored, Replaced(before=was, earlier=_record(before, stored)))
    return chosen, state


def undo(config: AggregatorConfig, store: ObjectStore, dry_run: bool) -> tuple[DesiredState, DesiredState]:
    """What is undone, and the state before it as the next generation, published unless ``dry_run``. Raises Refused when
    the current one is not from `apply`, Retryable when another writer was first.

    Once more goes back once more: the new generation takes over the record of the state that it repeats.
    """
    stored, current = _current(store)
    if stored is None or current is None:
        raise Refused("apply --undo: there is no desired state, so nothing was applied")
    _check_rack(config, current)
    record = _read_record(store, _record(current, stored))
    if record is None:
        why = "it was published by hand or is where the first apply began; the states before each apply are under"
        raise Refused(f"apply --undo: generation {current.generation} is not from apply: {why} {keys.DESIRED_HISTORY}")
    note = f"undo of generation {current.generation} ({current.note})"[:500]
    state = msgspec.structs.replace(
        record.before,
        rack=config.rack,
        generation=current.generation + 1,
        written_ms=_now_ms(),
        note=note,
        peers=current.peers,
    )
    if not dry_run:
        _publish(store, state, stored, _read_record(store, record.earlier))
    return current, state


def _publish(store: ObjectStore, state: DesiredState, stored: Stored | None, replaced: Replaced | None) -> None:
    """Its record first: without the state it is of no effect, and no other state has the same key."""
    body = desired.encode(state)
    if replaced is not None:
        record = msgspec.json.format(msgspec.json.encode(replaced), indent=1)
        store.put(keys.history_key(state.generation, digest(body)), record)
    publish.replace(store, keys.DESIRED, body, stored.etag if stored else None)


def _current(store: ObjectStore) -> tuple[Stored | None, DesiredState | None]:
    stored = find(store, keys.DESIRED, keys.MOST_DESIRED_BYTES)
    return stored, desired.parse(stored.body, whole=True) if stored is not None else None


def _record(state: DesiredState | None, stored: Stored | None) -> str:
    return keys.history_key(state.generation, digest(stored.body)) if state is not None and stored is not None else ""


def _read_record(store: ObjectStore, key: str) -> Replaced | None:
    stored = find(store, key, keys.MOST_DESIRED_BYTES) if key.startswith(keys.DESIRED_HISTORY) else None
    try:
        found = msgspec.json.decode(stored.body, type=Replaced) if stored is not None else None
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(f"apply --undo: {key} cannot be parsed ({error})") from None
    if found is not None:
        desired.parse(desired.encode(found.before))  # raises for what no agent would follow
    return found


def _why_nothing(report: PlacementReport, before: DesiredState | None) -> str:
    if not (report.moves or report.settings):
        return f"apply: the placement of {report.period} has no steps, so there is nothing to publish"
    held = f"generation {before.generation} already holds" if before is not None else "no node follows a state for"
    return f"apply: {held} what the placement of {report.period} asks for"


def _sources(store: ObjectStore) -> Sources:
    """Finds versions in the bucket. A model of which it holds several, none asked for, is Refused."""
    versions = _versions(store)

    def source_of(model: str, version: str) -> str | None:
        fitting = [(name, found) for name, found in versions if not version or found == version]
        own = [one for one in fitting if one[0] == model]
        if not version and len(own) > 1:
            named = ", ".join(found for _, found in own)
            raise Refused(
                f"apply: the bucket holds several versions of {model} ({named}); assign one in desired.json first"
            )
        pick = own or (fitting if version else [])
        return f"{pick[0][0]}@{pick[0][1]}" if pick else None

    return source_of


def _check_rack(config: AggregatorConfig, before: DesiredState | None) -> None:
    """Raises Refused for the desired state of another rack."""
    if before is not None and before.rack not in ("", config.rack):
        why = f"the desired state in the bucket is that of rack {before.rack!r}, aggregator.toml says {config.rack!r}"
        raise Refused(f"apply: {why}: correct rack or [store] there", code="wrong_rack")


def _versions(store: ObjectStore) -> list[tuple[str, str]]:
    found = []
    for listed in each(store, keys.MODEL_PREFIX):
        try:
            found.append(keys.parse_model_manifest_key(listed.key))
        except Refused:
            continue
    return found


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
