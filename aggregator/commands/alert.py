"""Read new telemetry, including urgent copies, and send a notice once per change."""

import functools
import time
from collections.abc import Callable

import msgspec

from aggregator import alerts, load, notify, publish
from aggregator.alerts import AlertState, Notice
from aggregator.config import AggregatorConfig
from aggregator.raw.cleaning import text
from aggregator.window import facts_of, straightened
from shared import keys
from shared.desired import unknown_field
from shared.errors import RackError, Refused
from shared.logs import get_logger
from shared.store import ObjectStore, Stored, find

log = get_logger("aggregator.alert")


def run(config: AggregatorConfig, store: ObjectStore, discord: notify.Discord) -> list[Notice]:
    """One run; returns the notices sent. Raises the first failure after trying all others."""
    state, stored = _read(store)
    # taken before reading: a node must not appear silent because reading the others took long
    now_ms = time.time_ns() // 1_000_000
    if not state.cursors:
        state = msgspec.structs.replace(state, cursors=load.beginnings(store))
    passed = _passed(store)
    read_raw = load.fresh(store, config.rack, state.cursors, passed=passed)
    read_urgent = load.fresh(store, config.rack, state.cursors, keys.URGENT_PREFIX, passed=lambda _: True)
    for key, reason in {**read_urgent.unread, **read_raw.unread}.items():
        log.warning("unreadable", key=key, reason=reason, effect="this node's later segments wait for it")
    facts = [f for batch in (*read_urgent.batches, *read_raw.batches) for f in facts_of(straightened(batch))]
    state = alerts.observe(state, facts, now_ms, config.alerts)
    state = msgspec.structs.replace(state, cursors={**read_raw.cursors, **read_urgent.cursors})
    after, notices = alerts.evaluate(state, now_ms, config.alerts)
    sent, failed, failure = _tell(notices, discord)
    after = _without(after, failed)
    body = msgspec.json.format(msgspec.json.encode(after, order="sorted"), indent=1)
    if stored is None or body != stored.body:
        publish.replace(store, keys.ALERT_STATE, body, stored.etag if stored else None)
    if failure is not None:
        raise failure
    if read_raw.racks:
        others = " and ".join(repr(text(one)) for one in sorted(set(read_raw.racks.values())))
        why = (
            f"what is new is all of rack {others}, aggregator.toml says {config.rack!r}: correct rack or [store] there"
        )
        raise Refused(f"alert: {why}", code="wrong_rack")
    return sent


def _passed(store: ObjectStore) -> Callable[[str], bool]:
    """Whether a rollup has given up an object; asked only when there is an unreadable one."""

    @functools.cache
    def cursors() -> dict[str, str]:
        return load.newest_manifest(store).cursors

    return lambda key: any(key.startswith(folder) and key <= cursor for folder, cursor in cursors().items())


def _tell(notices: tuple[Notice, ...], discord: notify.Discord) -> tuple[list[Notice], list[Notice], RackError | None]:
    """Notices sent, notices not sent, and the first error."""
    sent: list[Notice] = []
    failed: list[Notice] = []
    failure: RackError | None = None
    for notice in notices:
        fields = {"code": notice.rule.code, "subject": notice.firing.subject, "resolved": notice.resolved}
        try:
            delivered = discord.post(notice)
        except RackError as error:
            failure = failure or error
            failed.append(notice)
            continue
        log.info("alert_sent" if delivered else "alert_without_channel", **fields)
        sent.append(notice)
    return sent, failed, failure


def _without(state: AlertState, failed: list[Notice]) -> AlertState:
    """A notice that could not be sent is not recorded as sent: the next run sees the same change again."""
    unsaid = [n.firing for n in failed if not n.resolved]
    kept = [f for f in state.firing if f not in unsaid]
    kept += [n.firing for n in failed if n.resolved]
    return msgspec.structs.replace(state, firing=tuple(sorted(kept, key=lambda f: (f.code, f.subject))))


def _read(store: ObjectStore) -> tuple[AlertState, Stored | None]:
    stored = find(store, keys.ALERT_STATE, keys.MOST_STATE_BYTES)
    if stored is None:
        return AlertState(), None
    try:
        state = msgspec.json.decode(stored.body, type=AlertState)
        if lost := unknown_field(msgspec.json.decode(stored.body), msgspec.to_builtins(state)):
            why = f"{lost} is not known to this version and would be lost; upgrade mlxrack on this machine"
            raise Refused(f"{keys.ALERT_STATE}: {why}", code="newer_schema")
        return state, stored
    except (msgspec.DecodeError, RecursionError):
        log.warning("alert_state_unreadable", key=keys.ALERT_STATE)
        return AlertState(), stored
