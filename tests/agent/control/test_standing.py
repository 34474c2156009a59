"""What stands of an operator's orders: a restart serves what was served, whatever was ordered in which order."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Model
from agent.control import standing
from agent.control.standing import (
    Base,
    Order,
    Orders,
    Start,
    Swapped,
    Switch,
    ended,
    starts,
    swapped,
    switched,
    waiting,
)


def base(name: str, *, preload: bool = True, pinned: bool = False, **more: Any) -> Base:
    return Base(model=Model(name=name, engine="fake", path=f"/{name}", preload=preload, pinned=pinned, **more))


F, G, H = base("f"), base("g", preload=False), base("h", preload=False)
BASES = (F, G, H)


def swap(to: str, *names: str, at_ms: int = 1, **more: Any) -> Swapped:
    table = msgspec.to_builtins(msgspec.structs.replace(base(to).model, **more))
    return Swapped(table=table, version=f"v-{to}", names=names, at_ms=at_ms)


def on(at_ms: int = 2) -> Switch:
    return Switch(on=True, at_ms=at_ms)


def off(at_ms: int = 2) -> Switch:
    return Switch(on=False, at_ms=at_ms)


F_G = swap("g", "f", "g")


def brief(found: Sequence[Start]) -> list[tuple[str, str, bool, bool]]:
    """Names, files, whether loaded at the start, whether pinned."""
    return [(" ".join(s.names), s.model.path, s.model.preload, s.model.pinned) for s in found]


def of(found: Sequence[Start], name: str) -> tuple[str, str, bool, bool]:
    return next(one for one in brief(found) if one[0].split()[0] == name)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order(), ("f", "/f", True, False)),
        (Order(swap=F_G), ("f g", "/g", True, False)),
        (Order(resident=off()), ("f", "/f", False, False)),
        (Order(pinned=on()), ("f", "/f", True, True)),
        (Order(swap=F_G, pinned=on()), ("f g", "/g", True, True)),
        (Order(swap=F_G, resident=off()), ("f g", "/g", False, False)),
        (Order(resident=off(), pinned=on()), ("f", "/f", False, True)),
        (Order(swap=swap("g", "f", "g", "h")), ("f g h", "/g", True, False)),
        (Order(swap=swap("gone", "f", "gone")), ("f gone", "/gone", True, False)),
        (Order(swap=swap("g", "f", "g", path="/elsewhere", rows=3)), ("f g", "/elsewhere", True, False)),
    ],
)
def test_what_is_served_at_a_start(order: Order, expected: tuple[str, str, bool, bool]) -> None:
    assert of(starts(BASES, {"f": order}), "f") == expected


def test_an_on_demand_model_that_was_loaded_pinned_or_swapped_is_loaded_at_a_start() -> None:
    for order in (Order(resident=on()), Order(pinned=on()), Order(swap=swap("h", "g", "h"))):
        assert of(starts(BASES, {"g": order}), "g")[2], order
    assert not of(starts(BASES, {"g": Order(pinned=off())}), "g")[2]


def test_settings_of_the_same_files_are_those_of_agent_toml_now_and_of_others_as_ordered() -> None:
    ordered = Order(swap=swap("g", "f", "g", rows=2))
    changed = base("g", rows=5)
    moved = Base(model=msgspec.structs.replace(changed.model, path="/new"))
    for bases, rows, path in (((F, changed), 5, "/g"), ((F, moved), 2, "/g"), ((F,), 2, "/g")):
        (found, *_) = starts(bases, {"f": ordered})
        assert (found.model.rows, found.model.path) == (rows, path)


def test_files_that_are_lost_leave_what_agent_toml_says_and_every_name_its_own() -> None:
    orders = {"f": Order(swap=F_G, pinned=on())}
    found = starts(BASES, orders, {"f": "no such folder: /g"})
    assert brief(found) == [("f", "/f", True, True), ("g", "/g", False, False), ("h", "/h", False, False)]
    text = standing.origin(found[0])
    assert "swap to g" in text
    assert "no such folder: /g" in text


def test_an_order_for_what_is_not_configured_any_more_waits() -> None:
    orders = {"f": Order(swap=F_G), "x": Order(pinned=on())}
    assert brief(starts((G, H), orders)) == [("g", "/g", False, False), ("h", "/h", False, False)]
    assert set(waiting((G, H), orders)) == {"f", "x"}
    assert all("not configured" in why for why in waiting((G, H), orders).values())


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (switched({}, "f", "resident", off(), BASES), {"f": Order(resident=off())}),
        (switched({"f": Order(resident=off())}, "f", "resident", on(), BASES), {}),
        (switched({}, "f", "resident", on(), BASES), {}),
        (switched({}, "g", "resident", on(), BASES), {"g": Order(resident=on())}),
        (switched({"g": Order(resident=on())}, "g", "resident", off(), BASES), {}),
        (switched({"g": Order(pinned=on())}, "g", "resident", off(), BASES), {"g": Order(pinned=on(), resident=off())}),
        (switched({}, "f", "pinned", off(), BASES), {}),
        (switched({"f": Order(swap=F_G)}, "f", "pinned", on(), BASES), {"f": Order(swap=F_G, pinned=on())}),
        (switched({}, "x", "pinned", off(), BASES), {"x": Order(pinned=off())}),
        (swapped({}, "f", F_G, BASES), {"f": Order(swap=F_G)}),
        (swapped({"f": Order(swap=F_G)}, "f", swap("f", "f"), BASES), {}),
        (swapped({"f": Order(resident=off())}, "f", F_G, BASES), {"f": Order(swap=F_G)}),
        (
            swapped({"g": Order(resident=off()), "f": Order(pinned=on())}, "f", F_G, (F, base("g"), H)),
            {"g": Order(resident=off()), "f": Order(swap=F_G, pinned=on())},
        ),
        (swapped({"g": Order(pinned=on())}, "f", F_G, BASES), {"f": Order(swap=F_G)}),
        (
            swapped({"h": Order(swap=swap("g", "h", "g"), pinned=on())}, "f", F_G, BASES),
            {"h": Order(swap=swap("g", "h"), pinned=on()), "f": Order(swap=F_G)},
        ),
        (
            swapped({"g": Order(swap=swap("h", "g", "h"), pinned=on())}, "f", F_G, BASES),
            {"h": Order(pinned=on()), "f": Order(swap=F_G)},
        ),
        (switched({"f": Order(resident=off())}, "f", "pinned", on(), BASES), {"f": Order(pinned=on())}),
        (ended({"f": Order(swap=F_G, pinned=on())}, "f", Order(swap=F_G)), {"f": Order(pinned=on())}),
        (ended({"f": Order(swap=F_G)}, "f", Order(swap=F_G, pinned=on())), {}),
        (ended({"f": Order(pinned=off())}, "f", Order(pinned=on())), {"f": Order(pinned=off())}),
        (ended({"f": Order(swap=swap("h", "f", "h"))}, "f", Order(swap=F_G)), {"f": Order(swap=swap("h", "f", "h"))}),
        (ended({}, "f", Order(pinned=on())), {}),
    ],
)
def test_what_an_order_makes_of_those_that_stand(orders: Orders, expected: Orders) -> None:
    assert orders == expected


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (Order(), "agent.toml"),
        (
            Order(swap=swap("g", "f", "g", at_ms=1_795_687_920_000)),
            "ordered 2026-11-26 10:12 UTC: swap to g; agent.toml says f",
        ),
        (
            Order(swap=swap("g", "f", at_ms=60_000), pinned=on(120_000)),
            "ordered 1970-01-01 00:01 UTC: swap to g; 1970-01-01 00:02 UTC: pin; agent.toml says f, not pinned",
        ),
        (
            Order(swap=swap("g", "f", at_ms=60_000), resident=off(119_000)),
            "ordered 1970-01-01 00:01 UTC: swap to g, unload; agent.toml says f, loaded at the start",
        ),
        (Order(resident=Switch(on=False)), "ordered before an upgrade: unload; agent.toml says loaded at the start"),
    ],
)
def test_where_what_is_served_comes_from(order: Order, text: str) -> None:
    (found, *_) = starts(BASES, {"f": order} if order != Order() else {})
    assert standing.origin(found) == text


@pytest.mark.parametrize("table", [{"rows": 0}, {"rows": "many"}, {"path": 7}, {"engine": "other"}])
def test_a_kept_order_that_this_version_cannot_carry_out_is_known_as_such(table: dict[str, Any]) -> None:
    good = Order(swap=Swapped(table={"name": "g", "path": "/g", "newer": 1}, names=("f", "g")))
    assert standing.unreadable(good) == ""
    assert of(starts((F,), {"f": good}), "f")[1] == "/g"
    bad = Order(swap=Swapped(table={"name": "g", "path": "/g", **table}, names=("f", "g")))
    assert standing.unreadable(bad)
    assert standing.unreadable(Order(swap=Swapped(table={"name": "g"}, names=())))


# ---- against a small model of the node itself ----


class Node:
    """What happens to the models of a node that carries out orders, as ``agent.models`` does it; ``said`` is the last
    order that says whether a model is to be in memory."""

    def __init__(self, bases: Sequence[Base]) -> None:
        self.bases = {one.model.name: one.model for one in bases}
        self.slots = [self.fresh(name) for name in self.bases]

    def fresh(self, name: str) -> dict[str, Any]:
        return {"names": [name], "files": name, "pin": None, "said": None}

    def slot(self, name: str) -> dict[str, Any]:
        return next(one for one in self.slots if name in one["names"])

    def swap(self, old: str, new: str) -> bool:
        slot = self.slot(old)
        if slot["files"] == new:
            return False
        slot["files"], slot["said"] = new, "swap"
        for other in [one for one in self.slots if one is not slot and new in one["names"]]:
            other["names"].remove(new)
            if not other["names"]:
                self.slots.remove(other)
        if new not in slot["names"]:
            slot["names"].append(new)
        if old == new == slot["names"][0]:
            for name in slot["names"][1:]:
                slot["names"].remove(name)
                self.slots.append(self.fresh(name))
        for one in self.slots:
            if one["names"] == [one["files"]] and one["said"] == "swap":
                one["said"] = None  # as configured again
        return True

    def served(self) -> set[tuple[str, str, bool]]:
        return {(" ".join(one["names"]), f"/{one['files']}", self.pinned(one)) for one in self.slots}

    def pinned(self, slot: dict[str, Any]) -> bool:
        """One that was not pinned or unpinned by order is as its own name is configured."""
        return self.bases[slot["names"][0]].pinned if slot["pin"] is None else bool(slot["pin"])


ORDERS = st.lists(
    st.tuples(
        st.sampled_from(["swap", "load", "unload", "pin", "unpin"]), st.sampled_from("abcd"), st.sampled_from("abcd")
    ),
    max_size=12,
)
TABLES = st.tuples(*(st.tuples(st.booleans(), st.booleans()) for _ in "abcd"))


@given(TABLES, ORDERS)
def test_a_restart_serves_what_was_served_whatever_was_ordered(
    tables: tuple[tuple[bool, bool], ...], ordered: list[tuple[str, str, str]]
) -> None:
    bases = [base(name, preload=a, pinned=b) for name, (a, b) in zip("abcd", tables, strict=True)]
    node, orders = Node(bases), dict[str, Order]()
    found: Orders = orders
    for at_ms, (verb, name, other) in enumerate(ordered, 1):
        slot = node.slot(name)
        key = slot["names"][0]
        if verb == "swap":
            if not node.swap(name, other):
                continue
            table = msgspec.to_builtins(node.bases[other])
            now = node.slot(name)
            done = Swapped(table=table, names=tuple(now["names"]), at_ms=at_ms)
            found = swapped(found, now["names"][0], done, bases)
        elif verb in ("load", "unload"):
            slot["said"] = verb
            found = switched(found, key, "resident", Switch(on=verb == "load", at_ms=at_ms), bases)
        else:
            slot["pin"] = None if (verb == "pin") == node.bases[key].pinned else verb == "pin"
            slot["said"] = "pin" if verb == "pin" and not node.bases[key].pinned else None
            found = switched(found, key, "pinned", Switch(on=verb == "pin", at_ms=at_ms), bases)
        served = starts(bases, found)
        assert {(" ".join(s.names), s.model.path, s.model.pinned) for s in served} == node.served(), (ordered, found)
        for one in served:
            said = node.slot(one.names[0])["said"]
            if said is not None:
                assert one.model.preload == (said != "unload"), (ordered, found)
    assert all(order != Order() for order in found.values())
    assert msgspec.json.decode(msgspec.json.encode(found), type=dict[str, Order]) == found


@given(TABLES, ORDERS)
def test_clearing_every_order_leaves_what_holds_without(
    tables: tuple[tuple[bool, bool], ...], ordered: list[tuple[str, str, str]]
) -> None:
    bases = [base(name, preload=a, pinned=b) for name, (a, b) in zip("abcd", tables, strict=True)]
    found: Orders = {}
    for verb, name, _ in ordered:
        if verb != "swap":
            what: standing.Said = "resident" if verb in ("load", "unload") else "pinned"
            found = switched(found, name, what, Switch(on=verb in ("load", "pin")), bases)
    for name, order in dict(found).items():
        found = ended(found, name, order)
    assert found == {}
    assert [(s.model, s.order) for s in starts(bases, found)] == [(one.model, Order()) for one in bases]
