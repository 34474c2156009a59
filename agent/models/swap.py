"""One swap as a state machine: events in, effects out; SwapRun performs them and feeds back what happened.

Hot: the new loader starts beside the old one, answers probes, takes over in one assignment, and the old one drains.
Cold: there is no room for both, so the node leaves rotation for this model, drains and stops the old loader first, and
peers serve meanwhile. If anything fails before the flip, the old model keeps serving (cold: is restarted).
After the flip the new loader is active like any other: if it exits, it is restarted.
"""

from typing import Literal

import msgspec

Phase = Literal["starting", "warming", "flipping", "draining", "stopping", "restoring", "finished"]


What = Literal["standby_ready", "standby_failed", "probes_passed", "flipped", "drained", "stopped", "restored"]


class SwapState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a swap. ``flipped`` says which loader serves."""

    swap_id: str
    cold: bool
    phase: Phase
    flipped: bool = False
    outcome: str = ""
    reason: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """The standby has its model in memory; it failed to start, exited, or failed a probe (``reason``); it passed every
    probe; it is the active loader; the old one has no request left, or their deadlines have passed; a process has
    ended and freed memory; after a failed cold swap the old model serves again (or, with a ``reason``, does not)."""

    swap_id: str
    what: What
    reason: str = ""


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
    """The next state and what to do. Late events, and those of another swap, change nothing.

    1. StandbyFailed before the flip: the standby stops; hot, the swap has failed; cold, the old model is restored.
    2. StandbyReady while starting: warm it. ProbesPassed while warming: flip.
    3. Flipped: hot, the old loader drains; cold, it has already ended and the swap has succeeded.
    4. Drained: hot after the flip, stop the old loader; cold before it, stop it and then start the standby.
    5. Stopped: hot, the old loader's memory is free and the swap has succeeded; cold, the standby starts.
    6. Restored after a failed cold swap: finish.
    """
    if event.swap_id != state.swap_id or state.phase == "finished":
        return state, ()
    if event.what == "standby_failed" and state.phase in ("starting", "warming", "flipping"):
        failed = msgspec.structs.replace(state, outcome="failed", reason=event.reason)
        if state.cold:
            return msgspec.structs.replace(failed, phase="restoring"), ("stop_standby", "restore_active")
        return msgspec.structs.replace(failed, phase="finished"), ("stop_standby", "finish")
    if event.what == "standby_ready" and state.phase == "starting":
        return msgspec.structs.replace(state, phase="warming"), ("warm_standby",)
    if event.what == "probes_passed" and state.phase == "warming":
        return msgspec.structs.replace(state, phase="flipping"), ("flip",)
    if event.what == "flipped" and state.phase == "flipping":
        flipped = msgspec.structs.replace(state, flipped=True, outcome="flipped")
        if state.cold:
            return msgspec.structs.replace(flipped, phase="finished"), ("finish",)
        return msgspec.structs.replace(flipped, phase="draining"), ("drain_old",)
    if event.what == "drained" and state.phase == "draining":
        return msgspec.structs.replace(state, phase="stopping"), ("stop_old" if state.flipped else "stop_active",)
    if event.what == "stopped" and state.phase == "stopping":
        if state.flipped:
            return msgspec.structs.replace(state, phase="finished"), ("finish",)
        return msgspec.structs.replace(state, phase="starting"), ("start_standby",)
    if event.what == "restored" and state.phase == "restoring":
        reason = f"{state.reason}; {event.reason}" if event.reason else state.reason
        return msgspec.structs.replace(state, phase="finished", reason=reason), ("finish",)
    return state, ()
