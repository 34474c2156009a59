"""What a node has adopted and was ordered: on disk first, and back after a restart, whatever the file has become."""

import functools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import Model
from agent.control.adopted import SET_ASIDE, Adopted
from agent.control.standing import Base, Order, Swapped, Switch, switched
from shared.desired import Assignment, DesiredState
from shared.errors import Retryable

HERE = Assignment(model="m", source="m", version="1" * 64)
THERE = Assignment(model="n", source="n", version="2" * 64)
DESIRED = DesiredState(generation=3, nodes={"n1": (HERE,), "n2": (THERE,)})
ELSEWHERE = DesiredState(generation=4, nodes={"n2": (THERE,)})
BASES = (Base(model=Model(name="m")),)
UNLOAD = Switch(on=False, at_ms=7)
ORDERS = {"m": Order(resident=UNLOAD)}


def ordered(adopted: Adopted, switch: Switch = UNLOAD) -> Adopted:
    adopted.change(functools.partial(switched, name="m", what="resident", switch=switch, bases=BASES))
    adopted.keep()
    return adopted


def test_a_restart_remembers_what_was_adopted_brought_and_ordered(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "desired.json", "n1")
    assert (adopted.desired, adopted.follows, adopted.assigned) == (None, False, ())
    adopted.adopt(DESIRED)
    adopted.brought("m", "store:m@1")
    ordered(adopted)
    again = Adopted(tmp_path / "desired.json", "n1")
    assert (again.desired, again.follows, again.assigned) == (DESIRED, True, (HERE,))
    assert (again.served, again.orders) == ({"m": "store:m@1"}, ORDERS)
    assert (again.on_others("m"), again.on_others("n")) == (False, True)
    assert again.problems() == []


def test_orders_are_kept_without_a_desired_state(tmp_path: Path) -> None:
    ordered(Adopted(tmp_path / "desired.json", "n1"))
    assert Adopted(tmp_path / "desired.json", "n1").orders == ORDERS


def test_orders_end_with_a_newer_generation_for_this_node_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "desired.json"
    adopted = ordered(Adopted(file, "n1"))
    adopted.adopt(ELSEWHERE)
    assert adopted.orders == Adopted(file, "n1").orders == ORDERS, "it does not mention this node"
    adopted.adopt(DESIRED)
    assert adopted.orders == Adopted(file, "n1").orders == {}
    ordered(adopted)
    ordered(adopted, Switch(on=True))
    assert adopted.orders == Adopted(file, "n1").orders == {}, "and when they agree with what holds without them"


def test_a_node_that_is_not_named_follows_nothing(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "desired.json", "n9")
    adopted.adopt(DESIRED)
    assert (adopted.follows, adopted.assigned) == (False, ())


@pytest.mark.parametrize("generation", [2**50, 10**30, 0])
def test_a_desired_state_that_cannot_be_meant_is_dropped_at_a_start_and_the_orders_are_not(
    tmp_path: Path, generation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "desired.json"
    adopted = Adopted(file, "n1")
    adopted.adopt(DESIRED)
    ordered(adopted)
    file.write_bytes(file.read_bytes().replace(b'"generation":3', b'"generation":%d' % generation))
    adopted = Adopted(file, "n1")
    assert (adopted.desired, adopted.assigned, adopted.orders) == (None, (), ORDERS)
    assert "desired_not_read" in "".join(capsys.readouterr())
    adopted.adopt(DESIRED)
    assert Adopted(file, "n1").desired == DESIRED


def test_a_desired_state_that_cannot_be_written_is_not_in_force(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "missing" / "desired.json", "n1")
    with pytest.raises(Retryable, match="cannot be written"):
        adopted.adopt(DESIRED)
    assert adopted.desired is None


def test_an_order_that_cannot_be_written_is_in_force_said_and_written_as_soon_as_possible(tmp_path: Path) -> None:
    file = tmp_path / "full" / "desired.json"
    adopted = ordered(Adopted(file, "n1"))
    assert adopted.orders == ORDERS
    assert "cannot be written" in adopted.unkept
    assert any("end with this process" in one for one in adopted.problems())
    file.parent.mkdir()
    adopted.keep()
    assert (adopted.unkept, adopted.problems()) == ("", [])
    assert Adopted(file, "n1").orders == ORDERS


def test_an_order_given_while_a_generation_is_written_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adopted = ordered(Adopted(tmp_path / "desired.json", "n1"))
    write = Adopted._write

    def meanwhile(self: Adopted, *args: Any) -> None:
        write(self, *args)
        monkeypatch.undo()
        self.change(lambda _: {"m": Order(pinned=Switch(on=True))})

    monkeypatch.setattr(Adopted, "_write", meanwhile)
    adopted.adopt(DESIRED)
    adopted.keep()
    assert Adopted(tmp_path / "desired.json", "n1").orders == {"m": Order(pinned=Switch(on=True))}


def kept(tmp_path: Path) -> Any:
    """The file's contents, with two orders."""
    adopted = ordered(Adopted(tmp_path / "desired.json", "n1"))
    swap = Swapped(table={"name": "k", "path": "/k"}, names=("x", "k"))
    adopted.change(lambda orders: {**orders, "x": Order(swap=swap)})
    adopted.keep()
    return json.loads((tmp_path / "desired.json").read_bytes())


@pytest.mark.parametrize("cut", [0, 1, 2, 0.5, 0.9, -1])
def test_a_truncated_file_is_set_aside_and_said_until_the_operator_has_seen_it(tmp_path: Path, cut: float) -> None:
    kept(tmp_path)
    file = tmp_path / "desired.json"
    whole = file.read_bytes()
    left = whole[: int(cut * len(whole)) if isinstance(cut, float) else cut]
    file.write_bytes(left)
    adopted = Adopted(file, "n1")
    assert adopted.orders == {}
    assert adopted.problems()
    ordered(adopted)
    again = Adopted(file, "n1")
    assert again.orders == ORDERS
    assert "orders clear --unreadable" in again.problems()[0], "at every start, also when it is written again"
    assert (tmp_path / f"desired.json{SET_ASIDE}").read_bytes() == left
    again.forget_unreadable()
    assert again.problems() == []


@pytest.mark.parametrize("rubbish", [b"\x00" * 400, b"[]", b"null", b"7", b"[" * 5000, b'{"orders": 5}', b"\xff\xfe"])
def test_rubbish_in_its_place_does_not_keep_the_agent_from_starting(tmp_path: Path, rubbish: bytes) -> None:
    file = tmp_path / "desired.json"
    file.write_bytes(rubbish)
    adopted = Adopted(file, "n1")
    assert (adopted.desired, adopted.orders) == (None, {})
    assert adopted.problems()


@pytest.mark.parametrize(
    "broken",
    [
        5,
        [],
        {"swap": 5},
        {"resident": {"on": "perhaps"}},
        {"swap": {"table": {"name": "k", "rows": 0}, "names": ["x"]}},
        {"swap": {"table": {"name": "k"}, "names": []}},
    ],
)
def test_one_order_that_cannot_be_read_costs_no_other(tmp_path: Path, broken: Any) -> None:
    tree = kept(tmp_path)
    tree["orders"]["x"] = broken
    (tmp_path / "desired.json").write_text(json.dumps(tree))
    adopted = Adopted(tmp_path / "desired.json", "n1")
    assert adopted.orders == ORDERS
    assert any("x" in one for one in adopted.problems())
    assert (tmp_path / f"desired.json{SET_ASIDE}").exists()


def test_the_file_of_a_newer_version_is_read_and_what_is_not_understood_is_said(tmp_path: Path) -> None:
    tree = kept(tmp_path)
    tree["fleet"] = {"of": "the future"}
    tree["orders"]["m"] |= {"adapter": {"name": "law", "at_ms": 5}}
    tree["orders"]["x"]["swap"]["table"]["speculative"] = "draft"
    (tmp_path / "desired.json").write_text(json.dumps(tree))
    adopted = Adopted(tmp_path / "desired.json", "n1")
    assert adopted.orders["m"] == ORDERS["m"]
    assert adopted.orders["x"].swap is not None
    (said,) = adopted.problems()
    assert "m: adapter was ordered with another version" in said


class _Old(msgspec.Struct, kw_only=True, frozen=True):
    """The file as 0.1 reads it."""

    desired: DesiredState | None = None
    served: dict[str, str] = {}
    ordered: dict[str, str] = {}


def test_the_file_of_an_older_version_keeps_its_orders_and_reads_ours(tmp_path: Path) -> None:
    file = tmp_path / "desired.json"
    file.write_bytes(msgspec.json.encode(_Old(desired=DESIRED, ordered={"m": "", "k": "/elsewhere"})))
    adopted = Adopted(file, "n1")
    assert adopted.orders["m"] == Order(resident=Switch(on=False))
    assert adopted.orders["k"].swap == Swapped(table={"name": "k", "path": "/elsewhere"}, names=("k",))
    adopted.keep()
    assert Adopted(file, "n1").orders == adopted.orders
    assert msgspec.json.decode(file.read_bytes(), type=_Old) == _Old(desired=DESIRED)


def test_orders_of_a_process_that_serves_one_model_leave_those_of_the_service_alone(tmp_path: Path) -> None:
    file = tmp_path / "desired.json"
    ordered(Adopted(file, "n1"))
    alone = Adopted(file, "n1", lasting=False)
    assert alone.orders == {}
    alone.change(lambda _: {"m": Order(pinned=Switch(on=True))})
    alone.keep()
    alone.brought("m", "store:m@1")
    assert Adopted(file, "n1").orders == ORDERS
    alone.adopt(DESIRED)
    assert Adopted(file, "n1").orders == {}
