"""Reconciles a node to its desired state: actions in an order that keeps every model served. Pure.

What an operator ordered on this node wins until the next generation; it is reported as drift and left alone.
"""

from collections.abc import Collection, Sequence

import msgspec

from agent.views import Actual
from shared.desired import Assignment


class Bring(msgspec.Struct, frozen=True, kw_only=True):
    """Load the model in this version: pull it if it is not on disk, swap if another version serves."""

    assignment: Assignment
    swap: bool


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """Pin or unpin a model."""

    model: str
    pinned: bool


class Unload(msgspec.Struct, frozen=True, kw_only=True):
    """Unload a model that is not assigned here."""

    model: str


Action = Bring | Pin | Unload


def plan(
    actual: Sequence[Actual], desired: Sequence[Assignment], overridden: Collection[str] = ()
) -> tuple[Action, ...]:
    """What to do, in order: models are loaded before others are unloaded, so that nothing is missing meanwhile.

    1. A model that is being changed, or that an operator ordered here, is left alone.
    2. A model that was evicted (for another, or because it was unused) is loaded again on demand; only a pinned one is
       reloaded right away.
    """
    bring: list[Action] = []
    pins: list[Action] = []
    for one in desired:
        now = _named(actual, one.model)
        if _overridden(one.model, now, overridden) or (now is not None and now.changing):
            continue
        if not _is_there(one, now):
            bring.append(Bring(assignment=one, swap=now is not None and bool(now.version)))
        elif now is not None and now.pinned != one.pinned:
            pins.append(Pin(model=one.model, pinned=one.pinned))
    leave = [Unload(model=one.model) for one in actual if _must_leave(one, desired, overridden)]
    return (*bring, *pins, *leave)


def drift(actual: Sequence[Actual], desired: Sequence[Assignment], overridden: Collection[str] = ()) -> tuple[str, ...]:
    """How the node differs from its desired state, a sentence for each model."""
    found = []
    for one in desired:
        now = _named(actual, one.model)
        if not _is_there(one, now):
            here = _overridden(one.model, now, overridden)
            why = "ordered on this node" if here else "being changed" if now and now.changing else ""
            serves = f"serves {now.version}" if now and now.version else "is not resident"
            found.append(f"{one.model} {serves} instead of {one.version}" + (f" ({why})" if why else ""))
    for extra in actual:
        if extra.version and not any(one.model in extra.names for one in desired):
            why = " (ordered on this node)" if set(extra.names) & set(overridden) else ""
            found.append(f"{extra.model} is resident but not assigned{why}")
    return tuple(found)


def _named(actual: Sequence[Actual], name: str) -> Actual | None:
    return next((one for one in actual if name in one.names), None)


def _overridden(name: str, now: Actual | None, overridden: Collection[str]) -> bool:
    return bool(set(now.names if now else (name,)) & set(overridden))


def _is_there(one: Assignment, now: Actual | None) -> bool:
    if now is None:
        return False
    return now.version == one.version or (not now.version and now.offers == one.version and not one.pinned)


def _must_leave(one: Actual, desired: Sequence[Assignment], overridden: Collection[str]) -> bool:
    assigned = any(want.model in one.names for want in desired)
    return bool(one.version) and not assigned and not one.changing and not set(one.names) & set(overridden)
