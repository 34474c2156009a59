"""Publish an accepted placement as the rack's desired state. Agents follow it at their next poll."""

import time
from collections.abc import Collection

import msgspec

from aggregator import acceptance, load, publish
from aggregator.config import AggregatorConfig
from aggregator.placement import Move, PlacementReport
from shared import desired, keys
from shared.errors import Refused
from shared.store import ObjectStore, each, find


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
) -> tuple[tuple[Move, ...], desired.DesiredState]:
    """The moves and the resulting desired state, published unless ``dry_run``. Raises Refused when it is impossible,
    Retryable when another writer was first."""
    stored = find(store, keys.DESIRED, keys.MOST_DESIRED_BYTES)
    before = desired.parse(stored.body, whole=True) if stored is not None else None
    chosen = acceptance.accepted(report, steps)
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

    if before is not None and before.rack not in ("", config.rack):
        why = f"the desired state in the bucket is that of rack {before.rack!r}, aggregator.toml says {config.rack!r}"
        raise Refused(f"apply: {why}: correct rack or [store] there", code="wrong_rack")
    state = acceptance.desired(report, chosen, before, source_of, time.time_ns() // 1_000_000)
    state = msgspec.structs.replace(state, rack=config.rack)
    if not dry_run:
        publish.replace(store, keys.DESIRED, desired.encode(state), stored.etag if stored else None)
    return chosen, state


def _versions(store: ObjectStore) -> list[tuple[str, str]]:
    found = []
    for listed in each(store, keys.MODEL_PREFIX):
        try:
            found.append(keys.parse_model_manifest_key(listed.key))
        except Refused:
            continue
    return found
