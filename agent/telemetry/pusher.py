"""Uploads the spool to the store: oldest first, one writer per node, deleted only after the store has confirmed.

Nothing is discarded: an outage or refused credentials are a state, shown in `status`, and the batches wait. A backlog
is sent at a bounded rate, so that the end of a day's outage does not slow down running requests.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from agent.telemetry.claims import Claims
from agent.telemetry.spool import Spool, Waiting
from shared import keys
from shared.backoff import full_jitter_s
from shared.batch import Batch, digest, seal, unseal
from shared.errors import Halt, NotFound, PreconditionFailed, RackError, Refused, Retryable
from shared.ids import NodeId
from shared.logs import get_logger
from shared.records import Event
from shared.store import ObjectStore

SEGMENT_BATCHES = 60
SEGMENT_BYTES = 256 << 10
PACE_S = 1.0
"""Delay between two segments: 60 one-minute windows per second. Anything faster slows down running requests."""
MOST_RETRY_AFTER_S = 3600.0

log = get_logger("agent.telemetry.pusher")


class PushState(msgspec.Struct, kw_only=True):
    """State of the push for display. ``state`` is idle, ok, waiting (will retry) or refused (needs an operator);
    ``since_ms`` is when the failures began (UTC), whatever their ``reason`` now, None while there are none."""

    state: str = "idle"
    reason: str = ""
    since_ms: int | None = None
    waiting_batches: int = 0
    sent_batches: int = 0
    failures: int = 0


class Pusher:
    """Pushes batches; blocking, call it from one thread at a time. ``open_store`` is called on first use, so that
    secrets are resolved then and an unreachable store does not keep the agent from starting."""

    def __init__(
        self,
        spool: Spool,
        open_store: Callable[[], ObjectStore],
        *,
        clock: Callable[[], float] = time.monotonic,
        random_01: Callable[[], float] = random.random,
        pace_s: float = PACE_S,
    ) -> None:
        self._spool, self._open_store = spool, open_store
        self._store: ObjectStore | None = None
        self.claims = Claims(spool.identity, spool.claim)
        self._last_skew_ms: int | None = None
        self._clock, self._random_01, self._pace_s = clock, random_01, pace_s
        self._stopping = threading.Event()
        self._not_before_s = 0.0
        self._urgent = 0
        self._unreadable = ""
        self.state = PushState()

    def drain(self, *, force: bool = False) -> int:
        """Push waiting batches; returns how many were confirmed. Failures are reported in `state`, never raised. After
        a failure the push backs off (full jitter, 1 s to 5 min) unless ``force``."""
        if self._stopping.is_set() or (not force and self._clock() < self._not_before_s):
            return 0
        sent = 0
        try:
            sent = self._drain()
        except RackError as error:
            self._failed(error)
        except OSError as error:
            self._failed(Retryable(f"spool: {error.strerror or type(error).__name__}", code="disk"))
        else:
            self.state.failures = 0
            self._drained(sent)
        self.state.waiting_batches = len(self._spool.waiting())
        return sent

    def _drained(self, sent: int) -> None:
        """Nothing failed. A batch that cannot be read is shown until a later one was sent: it says nothing of itself
        to the aggregator."""
        unreadable, self._spool.unreadable = self._spool.unreadable, ""
        self._unreadable = unreadable or ("" if sent else self._unreadable)
        if self._unreadable:
            self.state.since_ms = self.state.since_ms or time.time_ns() // 1_000_000
            self.state.state, self.state.reason = "refused", self._unreadable
        else:
            self.state.state, self.state.reason, self.state.since_ms = "ok", "", None

    def urgent(self, events: Sequence[Event], batch_of: Callable[[int, tuple[Event, ...]], Batch]) -> None:
        """Push a copy of events now, for alerts; they are also sent in order, so a failure here loses nothing."""
        incarnation = self._spool.identity.incarnation
        if incarnation is None or self._clock() < self._not_before_s or self.state.state == "refused":
            return
        batch = batch_of(self._spool.next_seq(), tuple(events))
        self._urgent += 1
        raw = keys.RawKey(NodeId(batch.node), incarnation, batch.epoch, batch.seq, batch.seq)
        try:
            self._opened().put_if_absent(keys.urgent_key(raw, self._urgent), seal([_stamped(batch, incarnation)]))
        except RackError as error:
            log.info("urgent_copy_failed", code=error.code)
            if isinstance(error, Retryable):
                self._failed(error)

    def clock_was_set(self) -> None:
        """Discard the measured clock skew; the next answer of the store, even an error, measures it again."""
        self._last_skew_ms = None
        store = self._store  # another thread may reset it at any moment
        if store is not None:
            store.forget_clock()

    def stop(self) -> None:
        """Finish the upload in progress; the rest waits for the next run."""
        self._stopping.set()

    @property
    def clock_skew_ms(self) -> int | None:
        """This machine's clock minus the store's, as last measured; None when the store reports no time, or has not
        since this clock was set."""
        store = self._store  # another thread may reset it at any moment
        return store.clock_skew_ms if store is not None else self._last_skew_ms

    def _drain(self) -> int:
        store = self._opened()
        self.claims.hold(store)
        incarnation = self._spool.identity.incarnation or 0
        sent = 0
        for number, group in enumerate(_groups(self._spool.waiting())):
            if number and self._stopping.wait(self._pace_s):
                break
            pairs = [(one, batch) for one in group if (batch := self._spool.read(one)) is not None]
            if pairs:
                self._send(store, incarnation, [batch for _, batch in pairs], [one for one, _ in pairs])
                sent += len(pairs)
        return sent

    def _send(self, store: ObjectStore, incarnation: int, batches: list[Batch], files: list[Waiting]) -> None:
        first, last = batches[0], batches[-1]
        key = keys.batch_key(keys.RawKey(NodeId(first.node), incarnation, first.epoch, first.seq, last.seq))
        body = seal([_stamped(batch, incarnation) for batch in batches])
        try:
            store.put_if_absent(key, body)
        except PreconditionFailed:
            self._same_or_halt(store, key, body)
        except NotFound as error:
            raise Retryable(f"push {key}: bucket or folder of the store not found ({error.message})") from None
        except Refused as error:
            # this segment will always be refused (shared/store_s3.py); it must not block the rest
            for one in files:
                self._spool.set_aside(one)
            log.error("segment_refused", key=key, code=error.code, batches=len(batches))
            return
        self._spool.delete(files)
        self.state.failures = 0  # the store accepts data: a later failure in a long backlog restarts the back-off
        self.state.sent_batches += len(batches)

    @staticmethod
    def _same_or_halt(store: ObjectStore, key: str, body: bytes) -> None:
        """The key exists: from this agent, when a response was lost, or from another agent with the same name."""
        stored = store.get(key, keys.MOST_SEGMENT_BYTES).body
        if digest(stored) != digest(body) and _said(stored) != _said(body):
            why = "another agent writes under this node's name; each node must have its own node.id"
            raise Halt(f"push {key}: {why}", code="identity_clash")

    def _opened(self) -> ObjectStore:
        store = self._store  # another thread may reset it at any moment
        if store is None:
            self._store = store = self._open_store()
        return store

    def _failed(self, error: RackError) -> None:
        self.state.failures += 1
        self.state.state = "refused" if isinstance(error, Halt) else "waiting"
        if self.state.reason != error.message:
            log.warning("push_failed", state=self.state.state, code=error.code, reason=error.message)
        self.state.reason = error.message
        self.state.since_ms = self.state.since_ms or time.time_ns() // 1_000_000
        if isinstance(error, Halt):
            # credentials may have been corrected meanwhile; other errors do not justify an expensive new client
            self._last_skew_ms = self.clock_skew_ms
            self._store = None
            self.claims.forget()
        wait_s = full_jitter_s(self.state.failures - 1, self._random_01())
        asked_s = error.retry_after_s if isinstance(error, Retryable) and error.retry_after_s else 0.0
        # Retry-After is the minimum; jitter spreads nodes that all received the same value
        self._not_before_s = self._clock() + min(MOST_RETRY_AFTER_S, asked_s) + wait_s


def _said(segment: bytes) -> list[Batch] | None:
    """The segment's batches without fields that depend on packing and the clock; None for an invalid segment."""
    try:
        each = unseal(segment)
        return [msgspec.structs.replace(one, mono_ms=0, dropped_batches=0, clock_skew_ms=None) for one in each]
    except Refused:
        return None


def _stamped(batch: Batch, incarnation: int) -> Batch:
    return msgspec.structs.replace(batch, incarnation=incarnation)


def _groups(waiting: list[Waiting]) -> list[list[Waiting]]:
    """Runs of consecutive batches of one epoch, each at most one segment long."""
    groups: list[list[Waiting]] = []
    for one in waiting:
        last = groups[-1] if groups else []
        follows = last and (last[-1].epoch, last[-1].seq + 1) == (one.epoch, one.seq)
        if follows and len(last) < SEGMENT_BATCHES and sum(w.size for w in last) + one.size <= SEGMENT_BYTES:
            last.append(one)
        else:
            groups.append([one])
    return groups
