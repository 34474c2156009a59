"""Reconciliation: plans keep every model served and converge on the desired state."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.control.reconcile import Action, Bring, Pin, Unload, drift, plan
from agent.views import Actual
from shared.desired import Assignment


def has(name: str, version: str = "", *, pinned: bool = False, changing: bool = False, alias: str = "") -> Actual:
    names = (name, alias) if alias else (name,)
    return Actual(model=name, names=names, version=version, pinned=pinned, changing=changing)


def gone(name: str, version: str) -> Actual:
    """An evicted model that loads again on demand."""
    return Actual(model=name, names=(name,), offers=version)


def want(name: str, version: str, *, pinned: bool = False) -> Assignment:
    return Assignment(model=name, source=f"{name}-files", version=version, pinned=pinned)


A1, A2 = want("a", "v1"), want("a", "v2")
PINNED = want("a", "v1", pinned=True)


@pytest.mark.parametrize(
    ("actual", "desired", "overridden", "expected"),
    [
        ([], [], (), ()),
        ([has("a", "v1")], [A1], (), ()),
        ([has("a", "v1")], [A2], (), (Bring(assignment=A2, swap=True),)),
        ([has("a")], [A2], (), (Bring(assignment=A2, swap=False),)),
        ([], [A1], (), (Bring(assignment=A1, swap=False),)),
        ([gone("a", "v1")], [A1], (), ()),
        (
            [gone("a", "v1")],
            [want("a", "v1", pinned=True)],
            (),
            (Bring(assignment=want("a", "v1", pinned=True), swap=False),),
        ),
        ([gone("a", "v2")], [A1], (), (Bring(assignment=A1, swap=False),)),
        ([has("m", "v1", alias="b")], [want("m", "v2")], ("b",), ()),
        ([has("a", "v1"), has("b", "v1")], [A1], (), (Unload(model="b"),)),
        ([has("a", "v1"), has("b", "v1")], [A2], (), (Bring(assignment=A2, swap=True), Unload(model="b"))),
        ([has("a", "v1", changing=True)], [A2], (), ()),
        ([has("a", "v1", changing=True)], [], (), ()),
        ([has("a", "v9")], [A1], ("a",), ()),
        ([has("b", "v9")], [], ("b",), ()),
        ([has("a", "v1")], [want("a", "v1", pinned=True)], (), (Pin(model="a", pinned=True),)),
        ([has("old", "v1", alias="a")], [A1], (), ()),
        ([has("b")], [], (), ()),
    ],
)
def test_reconcile_plans(
    actual: list[Actual], desired: list[Assignment], overridden: tuple[str, ...], expected: tuple[Action, ...]
) -> None:
    assert expected == plan(actual, desired, overridden)


@pytest.mark.parametrize(
    ("actual", "desired", "overridden", "expected"),
    [
        ([has("a", "v1")], [A1], (), ()),
        ([has("a", "v1")], [A2], (), ("a serves v1 instead of v2",)),
        ([has("a", "v1")], [A2], ("a",), ("a serves v1 instead of v2 (ordered on this node)",)),
        ([has("a", changing=True)], [A2], (), ("a is not resident instead of v2 (being changed)",)),
        ([], [A2], (), ("a is not resident instead of v2",)),
        ([has("b", "v1")], [], (), ("b is resident but not assigned",)),
        ([has("b", "v1")], [], ("b",), ("b is resident but not assigned (ordered on this node)",)),
        ([has("b")], [], (), ()),
    ],
)
def test_drift_is_reported(
    actual: list[Actual], desired: list[Assignment], overridden: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert expected == drift(actual, desired, overridden)


names = st.sampled_from("abcd")
actuals = st.lists(
    st.builds(has, names, st.sampled_from(["", "v1", "v2"]), pinned=st.booleans(), changing=st.just(False)),
    unique_by=lambda one: one.model,
)
wants = st.lists(
    st.builds(want, names, st.sampled_from(["v1", "v2"]), pinned=st.booleans()), unique_by=lambda one: one.model
)


def performed(actual: list[Actual], action: Action) -> list[Actual]:
    """A node on which every action works."""
    by_name = {one.model: one for one in actual}
    if isinstance(action, Bring):
        one = action.assignment
        assert action.swap == bool(by_name.get(one.model, has(one.model)).version)
        before = by_name.get(one.model, has(one.model))
        by_name[one.model] = msgspec.structs.replace(before, version=one.version, pinned=one.pinned)
    elif isinstance(action, Pin):
        by_name[action.model] = msgspec.structs.replace(by_name[action.model], pinned=action.pinned)
    else:
        by_name[action.model] = msgspec.structs.replace(by_name[action.model], version="")
    return list(by_name.values())


@given(actuals, wants, st.sets(names))
def test_successful_actions_converge_and_leave_only_drift_from_local_orders(
    actual: list[Actual], desired: list[Assignment], overridden: set[str]
) -> None:
    served = {one.model for one in actual if one.version} & {one.model for one in desired}
    while todo := plan(actual, desired, overridden):
        actual = performed(actual, todo[0])
        assert served <= {one.model for one in actual if one.version}, "what is assigned is served all the while"
    assert all("ordered on this node" in text for text in drift(actual, desired, overridden))
    if not overridden:
        assert drift(actual, desired) == ()
