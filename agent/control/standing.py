"""What an operator ordered on this node and still stands, and what is therefore served at a start. Pure.

A newer generation of the desired state wins over an order, and an order over what this node is otherwise told (its
``Base``: agent.toml, or the desired state that it follows). An order says how a configured model is served; that of one
which nothing configures any more waits until something does. Names that a swap took are served with it.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from agent.config import Model

Said = Literal["resident", "pinned"]
AGENT_TOML = "agent.toml"


class Switch(msgspec.Struct, frozen=True, kw_only=True):
    """load (``on``) or unload; pin (``on``) or unpin. ``at_ms`` is when, UTC; 0 where an older version did not note
    it."""

    on: bool
    at_ms: int = 0


class Swapped(msgspec.Struct, frozen=True, kw_only=True):
    """A swap: ``table`` is that of the files served since then, as [[models]] in agent.toml had it; ``names`` all those
    that they answer to, the model's own first."""

    table: dict[str, Any]
    version: str = ""
    names: tuple[str, ...]
    at_ms: int = 0

    @property
    def to(self) -> str:
        """The configured model whose files they are."""
        return str(self.table.get("name", ""))

    @property
    def path(self) -> str:
        """Where they are."""
        return str(self.table.get("path", ""))


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What stands of the orders for one model; what is None was not ordered."""

    swap: Swapped | None = None
    resident: Switch | None = None
    pinned: Switch | None = None


Orders = Mapping[str, Order]
"""By the model's own name: the first of those that it answers to."""


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """A model below all orders, and who says so."""

    model: Model
    says: str = AGENT_TOML


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A model at a start: ``model`` has the files and settings, and whether it is loaded and pinned. ``order`` is what
    is in force of the orders for it; ``lost`` why the files that were ordered are not served."""

    names: tuple[str, ...]
    model: Model
    base: Base
    order: Order = Order()
    lost: str = ""


# ---- giving and ending orders ----


def swapped(orders: Orders, name: str, swap: Swapped, bases: Sequence[Base]) -> Orders:
    """The orders after a successful swap of the model ``name``. Names that it took from other models are theirs no
    longer; a model that has lost its last name keeps only that it was unloaded, for when it gets its name back."""
    found: dict[str, Order] = {}
    for other, before in orders.items():
        held = before.swap.names if before.swap is not None else (other,)
        left = tuple(one for one in held if one not in swap.names)
        if other == name or left == held:
            found[other] = before
        elif left and before.swap is not None:
            found[left[0]] = replace(before, swap=replace(before.swap, names=left))
        elif _is_off(before.resident):
            found[other] = Order(resident=before.resident)
    before = found.pop(name, Order())
    resident = None if _is_off(before.resident) else before.resident
    return _settled({**found, name: replace(before, swap=swap, resident=resident)}, bases)


def switched(orders: Orders, name: str, what: Said, switch: Switch, bases: Sequence[Base]) -> Orders:
    """The orders after load and unload ("resident"), pin and unpin ("pinned"). What is pinned is loaded at a start,
    unless it is unloaded later."""
    before = orders.get(name, Order())
    resident = None if what == "pinned" and switch.on and _is_off(before.resident) else before.resident
    said = {"resident": resident, "pinned": before.pinned, what: switch}
    others = {one: order for one, order in orders.items() if one != name}
    return _settled({**others, name: replace(before, **said)}, bases)


def ended(orders: Orders, name: str, order: Order) -> Orders:
    """The orders without these of one model; what was ordered for it meanwhile stands."""
    now = orders.get(name, Order())
    left = Order(
        swap=None if now.swap == order.swap else now.swap,
        resident=None if now.resident == order.resident else now.resident,
        pinned=None if now.pinned == order.pinned else now.pinned,
    )
    others = {one: kept for one, kept in orders.items() if one != name}
    return others if left == Order() else {**others, name: left}


def _is_off(switch: Switch | None) -> bool:
    return switch is not None and not switch.on


def _settled(orders: Orders, bases: Sequence[Base]) -> Orders:
    """An order that restores what holds without it has ended."""
    known = {base.model.name: base.model for base in bases}
    left = {name: _differing(order, known[name]) if name in known else order for name, order in orders.items()}
    return {name: order for name, order in left.items() if order != Order()}


def _differing(order: Order, base: Model) -> Order:
    swap, resident, pinned = order.swap, order.resident, order.pinned
    if swap is not None and (swap.names, swap.to, swap.path) == ((base.name,), base.name, base.path):
        swap = None
    if pinned is not None and pinned.on == base.pinned:
        pinned = None
    loads = swap is not None or (pinned is not None and pinned.on)
    if resident is not None and resident.on == base.preload and (resident.on or not loads):
        resident = None
    return Order(swap=swap, resident=resident, pinned=pinned)


# ---- what they come to ----


def starts(bases: Sequence[Base], orders: Orders, lost: Mapping[str, str] = {}) -> tuple[Start, ...]:
    """What is served at a start. ``lost`` says of a model why the files that it was swapped to cannot be served; until
    they can, it serves what its base says."""
    known = {base.model.name: base for base in bases}
    standing = {name: order for name, order in orders.items() if name in known}
    swaps = {name: order.swap for name, order in standing.items() if order.swap and name not in lost}
    taken = {one for name, swap in swaps.items() for one in swap.names if one != name}
    found = []
    for name, base in known.items():
        if name in taken:
            continue
        order, swap = standing.get(name, Order()), swaps.get(name)
        names = (name, *(one for one in (swap.names if swap else ()) if one != name))
        files = base.model if swap is None else _files(swap, base.model, known)
        said = replace(files, preload=_preload(order, base.model), pinned=_pinned(order, base.model))
        found.append(Start(names=names, model=said, base=base, order=order, lost=lost.get(name, "")))
    return tuple(found)


def loaded_first(found: Sequence[Start]) -> tuple[str, ...]:
    """Models that were ordered into memory, the last first: where not all fit, it has displaced those before it."""
    ordered = [
        (max(times), start.names[0]) for start in found if start.model.preload and (times := _times(start.order))
    ]
    return tuple(name for _, name in sorted(ordered, key=lambda one: -one[0]))


def _times(order: Order) -> list[int]:
    """When it was ordered into memory."""
    found = [one.at_ms for one in (order.resident, order.pinned) if one is not None and one.on]
    return [*found, order.swap.at_ms] if order.swap is not None else found


def _files(swap: Swapped, own: Model, known: Mapping[str, Base]) -> Model:
    """The table of the files: as it is now if the same files are configured, else as it was when they were ordered.
    What has been written over them under the same path is served."""
    now = known[swap.to].model if swap.to in known else own
    if (now.name, now.path) == (swap.to, swap.path):
        return now
    whole: dict[str, Any] = msgspec.to_builtins(now)
    return msgspec.convert({**whole, **{key: value for key, value in swap.table.items() if key in whole}}, Model)


def _preload(order: Order, base: Model) -> bool:
    if order.resident is not None:
        return order.resident.on
    return base.preload or order.swap is not None or (order.pinned is not None and order.pinned.on)


def _pinned(order: Order, base: Model) -> bool:
    return base.pinned if order.pinned is None else order.pinned.on


def waiting(bases: Sequence[Base], orders: Orders) -> dict[str, str]:
    """Why an order is not in force now, by model."""
    known = {base.model.name for base in bases}
    own = {start.names[0] for start in starts(bases, orders)}
    gone = "it is not configured any more; the order waits until it is"
    other = "another model has taken over its name; the order waits until that is swapped back"
    return {name: other if name in known else gone for name in orders if name not in own}


def unreadable(order: Order) -> str:
    """What of an order that was read from a file this version cannot carry out; "" if nothing."""
    if order.swap is None:
        return ""
    fields = Model.__struct_fields__
    table = {"name": order.swap.to, **{key: value for key, value in order.swap.table.items() if key in fields}}
    try:
        msgspec.convert(table, Model)
    except msgspec.ValidationError as error:
        return str(error)
    return "" if order.swap.names else "a swap without names"


# ---- for display ----


def words(order: Order) -> str:
    """The orders with their times, like ``2026-11-26 10:12 UTC: swap to g``; the oldest first."""
    by_time: dict[str, list[str]] = {}
    for at_ms, what in sorted(_said(order)):
        by_time.setdefault(_time(at_ms), []).append(what)
    return "; ".join(f"{time}: {', '.join(what)}" for time, what in by_time.items())


def kinds(order: Order) -> str:
    """The orders without their times, like ``swap to g, pin``."""
    return ", ".join(what for _, what in sorted(_said(order)))


def _said(order: Order) -> list[tuple[int, str]]:
    found = []
    if order.swap is not None:
        to = order.swap.to if order.swap.to != order.swap.names[0] else order.swap.path
        found.append((order.swap.at_ms, f"swap to {to}"))
    if order.resident is not None:
        found.append((order.resident.at_ms, "load" if order.resident.on else "unload"))
    if order.pinned is not None:
        found.append((order.pinned.at_ms, "pin" if order.pinned.on else "unpin"))
    return found


def instead(order: Order, base: Base) -> str:
    """What would hold without the order."""
    model, found = base.model, []
    if order.swap is not None:
        found.append(model.name)
    if order.resident is not None:
        found.append("loaded at the start" if model.preload else "loaded on demand")
    if order.pinned is not None:
        found.append("pinned" if model.pinned else "not pinned")
    return f"{base.says} says {', '.join(found)}"


def origin(start: Start) -> str:
    """Where what is served comes from, in a sentence."""
    if start.order == Order():
        return start.base.says
    text = f"ordered {words(start.order)}; {instead(start.order, start.base)}"
    if start.lost:
        return f"{text}, which is served, because what was ordered cannot be: {start.lost}"
    return text


def _time(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC" if at_ms else "before an upgrade"


Change = Callable[[Orders], Orders]
"""What an order that was carried out makes of those that stand."""
