"""One hot swap as a state machine: facts in, effects out; the pool performs them and feeds back what happened.

Hot: the new loader starts beside the old one, answers probes, takes over in one assignment, and the old one drains.
Cold: there is no room for both, so the node leaves rotation for this model, drains and stops the old loader first, and
peers carry the load. Whatever goes wrong before the flip leaves the old model serving (cold: starts it again).
"""

from typing import Literal

import msgspec

Phase = Literal["starting", "warming", "draining", "restoring", "finished"]


class SwapState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a swap stands. ``flipped`` says which loader serves."""

    swap_id: str
    cold: bool
    phase: Phase
    flipped: bool = False
    outcome: str = ""
    reason: str = ""


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    swap_id: str


class StandbyReady(_Event, frozen=True, kw_only=True):
    """The new loader has its model in memory."""


class StandbyFailed(_Event, frozen=True, kw_only=True):
    """The new loader did not start, ended, or answered a probe wrongly or too late."""

    reason: str


class ProbesPassed(_Event, frozen=True, kw_only=True):
    """The new loader answered every probe within its budget."""


class Drained(_Event, frozen=True, kw_only=True):
    """The old loader has no request left, or its deadline passed."""


class Restored(_Event, frozen=True, kw_only=True):
    """After a failed cold swap the old model serves again (or, with a reason, does not)."""

    reason: str = ""


Event = StandbyReady | StandbyFailed | ProbesPassed | Drained | Restored
Effect = Literal[
    "leave_rotation",
    "start_standby",
    "warm_standby",
    "flip",
    "drain_active",
    "drain_old",
    "stop_active",
    "stop_old",
    "stop_standby",
    "restore_active",
    "finish",
]


def begin(swap_id: str, *, cold: bool) -> tuple[SwapState, tuple[Effect, ...]]:
    """The first state and what to do in it."""
    if cold:
        return SwapState(swap_id=swap_id, cold=True, phase="draining"), ("leave_rotation", "drain_active")
    return SwapState(swap_id=swap_id, cold=False, phase="starting"), ("start_standby",)


def step(state: SwapState, event: Event) -> tuple[SwapState, tuple[Effect, ...]]:
    """The next state and what to do. An event of another swap, or one that comes too late, changes nothing.

    1. StandbyFailed before the flip: the standby stops; hot, the swap has failed; cold, the old model is restored.
    2. StandbyReady while starting: warm it.
    3. ProbesPassed while warming: flip; hot, the old loader drains; cold, it is gone already.
    4. Drained: hot after the flip, stop the old loader and finish; cold before it, stop it and start the standby.
    5. Restored after a failed cold swap: finish.
    """
    if event.swap_id != state.swap_id or state.phase == "finished":
        return state, ()
    if isinstance(event, StandbyFailed) and state.phase in ("starting", "warming"):
        failed = msgspec.structs.replace(state, outcome="failed", reason=event.reason)
        if state.cold:
            return msgspec.structs.replace(failed, phase="restoring"), ("stop_standby", "restore_active")
        return msgspec.structs.replace(failed, phase="finished"), ("stop_standby", "finish")
    if isinstance(event, StandbyReady) and state.phase == "starting":
        return msgspec.structs.replace(state, phase="warming"), ("warm_standby",)
    if isinstance(event, ProbesPassed) and state.phase == "warming":
        flipped = msgspec.structs.replace(state, flipped=True, outcome="flipped")
        if state.cold:
            return msgspec.structs.replace(flipped, phase="finished"), ("flip", "finish")
        return msgspec.structs.replace(flipped, phase="draining"), ("flip", "drain_old")
    if isinstance(event, Drained) and state.phase == "draining":
        if state.flipped:
            return msgspec.structs.replace(state, phase="finished"), ("stop_old", "finish")
        return msgspec.structs.replace(state, phase="starting"), ("stop_active", "start_standby")
    if isinstance(event, Restored) and state.phase == "restoring":
        reason = f"{state.reason}; {event.reason}" if event.reason else state.reason
        return msgspec.structs.replace(state, phase="finished", reason=reason), ("finish",)
    return state, ()
