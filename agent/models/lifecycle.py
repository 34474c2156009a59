"""The life cycle of one model as a state machine: an event in, next state and effects out. Pure: time is an argument.

    cold --Load--> loading --Started--> ready --Evict, Idle--> draining --Retired--> cold
                     |  ^                 |
          StartFailed|  |due              |Exited
                     v  |                 v
         cold, failed  backing_off <------+---> failed (too many crashes)

``Lifecycles`` performs the effects and feeds back what happened; nothing else changes a ``Life``. One operation at a
time holds the ``claim`` on a model: a load, an eviction, a swap, or the reservation of a name that a swap takes over. A
swap replaces the loader (``Flipped``) while it holds the claim; if the active loader crashes meanwhile, it is
restarted beside the standby, and whichever is ready first serves. Stale, foreign and duplicate events change nothing.
"""

from typing import Literal

import msgspec
from msgspec.structs import replace

CRASHES_BEFORE_GIVING_UP = 5
CRASH_SPAN_S = 120.0
MAX_BACKOFF_S = 8.0
AGAIN_S = 1.0
"""A load that failed for lack of memory is retried after this time."""

Phase = Literal["cold", "loading", "ready", "backing_off", "draining", "failed"]
Claim = Literal["", "load", "evict", "swap", "reserved"]
Fault = Literal["no_room", "died", "unusable", "cancelled"]
Signal = Literal["due", "wanted", "adopt", "stop", "claim", "reserve", "release", "leave_rotation", "withdraw"]
"""Events without data, in this order: the time of a "wake" has come; a request waits for the model; a model that is not
resident got other files; the agent stops. Of a swap: it claims the model; it reserves a name that it will take over; it
has ended, successfully or not; if cold, it leaves new requests to peers; if cold, it stops the active loader."""


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A version that was evicted at ``at_s`` (monotonic), and why."""

    at_s: float
    version: str
    reason: str


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a model. Loaders are numbered by ``serial``; 0 is none.

    ``loader`` serves, ``attempt`` is being started, ``leaving`` drains (``evicted_for`` another model); the outcome of
    ``abandoned`` starts is pending and no longer needed. ``retries``: a loader that dies while it starts is restarted,
    since no caller waits for the outcome. ``closed_for`` names the model for which this one accepts no new requests.
    Nothing is started before ``not_before_s``. ``standby_bytes`` is planned for a swap's standby.
    """

    phase: Phase = "cold"
    reason: str = ""
    claim: Claim = ""
    serial: int = 0
    loader: int = 0
    attempt: int = 0
    leaving: int = 0
    evicted_for: str = ""
    abandoned: frozenset[int] = frozenset()
    retries: bool = False
    in_rotation: bool = True
    version: str = ""
    not_before_s: float = 0.0
    crashes: tuple[float, ...] = ()
    restarts: int = 0
    last_exit: str = ""
    closed_for: str = ""
    closed_since_s: float = 0.0
    open_until_s: float = 0.0
    departed: Departure | None = None
    standby_bytes: int = 0
    stopped: bool = False

    @property
    def state(self) -> str:
        """The phase as batches and the status name it."""
        return "starting" if self.phase in ("loading", "backing_off") else self.phase

    @property
    def coming(self) -> bool:
        """Whether a loader is being started, or will be without another request."""
        return self.phase in ("loading", "backing_off")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Load it into memory."""

    retries: bool = False


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A start succeeded: the loader has the version in memory and is warmed up."""

    attempt: int
    version: str


class StartFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A start failed: no memory, the loader died, the model is unusable, or the start was cancelled."""

    attempt: int
    fault: Fault
    reason: str


class Exited(msgspec.Struct, frozen=True, kw_only=True):
    """A loader exited unexpectedly."""

    loader: int
    cause: str


class Evict(msgspec.Struct, frozen=True, kw_only=True):
    """Evict it: by order, for another model, or under memory pressure."""

    reason: str
    for_model: str = ""


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """Unused for ``idle_s``; with ``keep_alive_s`` below zero it stays resident."""

    idle_s: float
    keep_alive_s: float


class Retired(msgspec.Struct, frozen=True, kw_only=True):
    """An evicted loader has drained and ended."""

    loader: int


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that a swap's standby, or its draining predecessor, needs beside the active loader."""

    standby_bytes: int


class Flipped(msgspec.Struct, frozen=True, kw_only=True):
    """A swap's loader takes over: the standby, or the old version restored after a failed cold swap."""

    version: str


class Close(msgspec.Struct, frozen=True, kw_only=True):
    """Accept no new requests, so that ``for_model`` can load; "" reopens. A closed model that is still ``in_use`` after
    ``limit_s`` is reopened for as long, or one endless answer would block every waiting request."""

    for_model: str
    in_use: bool
    limit_s: float


Event = Signal | Load | Started | StartFailed | Exited | Evict | Idle | Retired | Planned | Flipped | Close


Effect = Literal["start", "serve", "kill", "retire", "wake", "crashed", "gave_up", "missed", "toggled"]
"""Start ``attempt`` (answer with Started or StartFailed); the loader just started serves; it is not needed, kill it;
drain and end ``leaving`` (answer with Retired); send "due" at ``not_before_s``; count the crash of the active loader;
restarts have stopped until an order; a request waits for what ``departed``; the model was closed or reopened. The names
are fields of the state after the step, or before it for what the step has cleared."""
Step = tuple[Life, tuple[Effect, ...]]


def step(life: Life, event: Event, now_s: float) -> Step:
    """The next state and what to do.

    1. Load starts a model that is not resident and not claimed; "due" does so after a back-off, in a hot swap, too.
    2. Started: the loader serves; one of an abandoned start is killed. StartFailed: back to cold, back-off, or failed.
    3. Exited: back-off, and failed after too many crashes; a loader that a cold swap ends anyway is not restarted.
    4. Evict and Idle drain a model that is ready and not claimed; Retired: its memory is free.
    5. A swap claims, plans, flips and releases; the release restarts a loader that is missing.
    6. Close, "wanted" and "adopt" change no loader. "stop" ends everything.
    """
    if life.stopped:
        return _after_stop(life, event)
    match event:
        case Load():
            free = not life.claim and life.phase in ("cold", "failed", "backing_off")
            return _start(replace(life, claim="load", retries=event.retries)) if free else (life, ())
        case "due":
            return _due(life, now_s)
        case Started():
            return _started(life, event)
        case StartFailed():
            return _start_failed(life, event, now_s)
        case Exited():
            return _exited(life, event, now_s)
        case Evict():
            return _evict(life, event.reason, event.for_model)
        case Idle():
            over = 0 <= event.keep_alive_s <= event.idle_s
            return _evict(life, "idle", "") if over else (life, ())
        case Retired():
            return _retired(life, event, now_s)
        case "claim" | "reserve" | "release" | "leave_rotation" | "withdraw" | Planned() | Flipped():
            return _swapped(life, event, now_s)
        case Close():
            return _closed(life, event, now_s)
        case "wanted":
            return (replace(life, departed=None), ("missed",)) if life.departed else (life, ())
        case "adopt":
            failed = life.phase == "failed" and not life.claim
            return (replace(life, phase="cold", reason="") if failed else life), ()
        case "stop":
            return Life(serial=life.serial, abandoned=_abandoned(life), restarts=life.restarts, stopped=True), ()


def _after_stop(life: Life, event: Event) -> Step:
    if isinstance(event, Started | StartFailed) and event.attempt in life.abandoned:
        return _forgotten(life, event)
    return life, ()


def _forgotten(life: Life, event: Started | StartFailed) -> Step:
    """The outcome of an abandoned start: a loader that did start is killed."""
    rest = replace(life, abandoned=life.abandoned - {event.attempt})
    return rest, ("kill",) if isinstance(event, Started) else ()


def _start(life: Life) -> Step:
    serial = life.serial + 1
    begun = replace(life, phase="loading", reason="", serial=serial, attempt=serial)
    return begun, ("start",)


def _due(life: Life, now_s: float) -> Step:
    if life.phase != "backing_off" or now_s < life.not_before_s:
        return life, ()
    if not life.claim:
        return _start(replace(life, claim="load", retries=True))
    return _start(life) if life.claim == "swap" and life.in_rotation else (life, ())


def _started(life: Life, event: Started) -> Step:
    if event.attempt in life.abandoned:
        return _forgotten(life, event)
    if not life.attempt or event.attempt != life.attempt:
        return life, ()
    claim = "" if life.claim == "load" else life.claim
    return _serves(replace(life, claim=claim, attempt=0), event.attempt, event.version)


def _serves(life: Life, loader: int, version: str) -> Step:
    served = replace(
        life,
        phase="ready",
        reason="",
        loader=loader,
        in_rotation=True,
        closed_for="",
        departed=None,
        version=version,
        crashes=life.crashes if version == life.version else (),  # other files, a new count
    )
    return served, ("serve",)


def _start_failed(life: Life, event: StartFailed, now_s: float) -> Step:
    if event.attempt in life.abandoned:
        return _forgotten(life, event)
    if not life.attempt or event.attempt != life.attempt:
        return life, ()
    ended = replace(life, attempt=0, reason=event.reason)
    if life.claim == "swap":
        return _backed_off(replace(ended, crashes=_recent(life, now_s)), now_s)
    ended = replace(ended, claim="")
    recent = _recent(life, now_s)
    if event.fault == "died" and (life.retries or len(recent) > 1):  # an order does not end a back-off
        return _backed_off(replace(ended, crashes=recent), now_s)
    if event.fault == "no_room":
        return replace(ended, phase="cold", not_before_s=now_s + AGAIN_S), ()
    return replace(ended, phase="cold" if event.fault == "cancelled" else "failed"), ()


def _exited(life: Life, event: Exited, now_s: float) -> Step:
    if not life.loader or event.loader != life.loader:
        return life, ()
    exited = replace(
        life,
        loader=0,
        restarts=life.restarts + 1,
        last_exit=event.cause,
        crashes=_recent(life, now_s),
        reason=f"the loader exited ({event.cause}); restarting",
    )
    if not life.in_rotation:
        return exited, ("crashed",)
    after, effects = _backed_off(exited, now_s)
    return after, ("crashed", *effects)


def _recent(life: Life, now_s: float) -> tuple[float, ...]:
    """Crashes that count, including the one that has just happened."""
    return (*(at for at in life.crashes if at >= now_s - CRASH_SPAN_S), now_s)


def _backed_off(life: Life, now_s: float) -> Step:
    """Restart delays of 0, 0.5, 1.5, 3.5 s, and so on."""
    count = len(life.crashes)
    if count >= CRASHES_BEFORE_GIVING_UP:
        why = life.last_exit or life.reason
        reason = f"the loader exited {count} times in {CRASH_SPAN_S:.0f} s ({why}); restarts stopped"
        return replace(life, phase="failed", reason=reason), ("gave_up",)
    at_s = now_s + min(MAX_BACKOFF_S, 0.5 * 2.0 ** (count - 1) - 0.5)
    return replace(life, phase="backing_off", not_before_s=at_s), ("wake",)


def _evict(life: Life, reason: str, for_model: str) -> Step:
    if life.claim or life.phase != "ready":
        return life, ()
    drained = replace(
        life, phase="draining", claim="evict", loader=0, leaving=life.loader, reason=reason, evicted_for=for_model
    )
    return drained, ("retire",)


def _retired(life: Life, event: Retired, now_s: float) -> Step:
    if life.claim != "evict" or event.loader != life.leaving:
        return life, ()
    departed = Departure(at_s=now_s, version=life.version, reason=life.reason)
    return replace(life, phase="cold", claim="", leaving=0, reason="", closed_for="", departed=departed), ()


def _swapped(life: Life, event: Signal | Planned | Flipped, now_s: float) -> Step:
    if event in ("claim", "reserve"):
        fits = not life.claim and (life.phase == "ready" if event == "claim" else not life.loader)
        return (replace(life, claim="swap" if event == "claim" else "reserved") if fits else life), ()
    if event == "release":
        return _released(life, now_s) if life.claim in ("swap", "reserved") else (life, ())
    if life.claim != "swap":
        return life, ()
    if isinstance(event, Planned):
        return replace(life, standby_bytes=event.standby_bytes), ()
    if isinstance(event, Flipped):
        serial = life.serial + 1
        flipped = replace(life, serial=serial, attempt=0, abandoned=_abandoned(life))
        return _serves(flipped, serial, event.version)
    if event == "withdraw":
        return replace(life, loader=0), ()
    return replace(life, in_rotation=False, phase="draining", reason="out of rotation for a cold swap"), ()


def _abandoned(life: Life) -> frozenset[int]:
    """Starts whose outcome is no longer needed, including the one in progress."""
    return life.abandoned | ({life.attempt} if life.attempt else set())


def _released(life: Life, now_s: float) -> Step:
    free = replace(life, claim="", in_rotation=True, standby_bytes=0)
    if life.attempt:
        return replace(free, claim="load", retries=True), ()
    if life.loader:
        return replace(free, phase="ready"), ()
    if life.phase in ("backing_off", "draining"):
        at_s = max(now_s, life.not_before_s)
        return replace(free, phase="backing_off", not_before_s=at_s), ("wake",)
    return free, ()


def _closed(life: Life, event: Close, now_s: float) -> Step:
    for_model, open_until_s = event.for_model, life.open_until_s
    if life.closed_for and for_model and event.in_use and now_s - life.closed_since_s > event.limit_s:
        for_model, open_until_s = "", now_s + event.limit_s
    after = replace(life, closed_for=for_model, open_until_s=open_until_s)
    if bool(life.closed_for) == bool(for_model):
        return after, ()
    return replace(after, closed_since_s=now_s), ("toggled",)
