"""What a node has adopted of the desired state: on disk first, and back after a restart."""

from pathlib import Path

import pytest

from agent.control.adopted import Adopted
from shared.desired import Assignment, DesiredState
from shared.errors import Retryable

HERE = Assignment(model="m", source="m", version="1" * 64)
THERE = Assignment(model="n", source="n", version="2" * 64)
DESIRED = DesiredState(generation=3, nodes={"n1": (HERE,), "n2": (THERE,)})


def test_a_restart_remembers_what_was_adopted_brought_and_ordered(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "desired.json", "n1")
    assert (adopted.desired, adopted.follows, adopted.assigned) == (None, False, ())
    adopted.adopt(DESIRED)
    adopted.brought("m", "store:m@1")
    adopted.order("m", "/elsewhere", differs=True)
    again = Adopted(tmp_path / "desired.json", "n1")
    assert (again.desired, again.follows, again.assigned) == (DESIRED, True, (HERE,))
    assert (again.served, again.ordered) == ({"m": "store:m@1"}, {"m": "/elsewhere"})
    assert (again.on_others("m"), again.on_others("n")) == (False, True)


def test_orders_end_with_their_generation_and_when_they_agree_with_it(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "desired.json", "n1")
    adopted.adopt(DESIRED)
    adopted.order("m", "", differs=True)
    adopted.order("m", "store:m@1", differs=False)
    assert adopted.ordered == {}
    adopted.order("m", "", differs=True)
    adopted.adopt(DESIRED)
    assert adopted.ordered == {}


def test_a_node_that_is_not_named_follows_nothing(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "desired.json", "n9")
    adopted.adopt(DESIRED)
    assert (adopted.follows, adopted.assigned) == (False, ())


@pytest.mark.parametrize("generation", [2**50, 10**30, 0])
def test_what_cannot_be_meant_is_dropped_at_a_start(
    tmp_path: Path, generation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "desired.json"
    Adopted(file, "n1").adopt(DESIRED)
    file.write_bytes(file.read_bytes().replace(b'"generation":3', b'"generation":%d' % generation))
    adopted = Adopted(file, "n1")
    assert (adopted.desired, adopted.assigned) == (None, ())
    assert "desired_not_read" in "".join(capsys.readouterr())
    adopted.adopt(DESIRED)
    assert Adopted(file, "n1").desired == DESIRED


def test_what_cannot_be_written_is_not_in_force(tmp_path: Path) -> None:
    adopted = Adopted(tmp_path / "missing" / "desired.json", "n1")
    with pytest.raises(Retryable, match="cannot be written"):
        adopted.adopt(DESIRED)
    assert adopted.desired is None
