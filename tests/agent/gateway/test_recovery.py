"""Recovery of a request whose worker was lost."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.recovery import CRASHES, MAX_RETRIES, Loss, Next, after

LOST = Loss(how="lost", elsewhere=False, left=False, can_go_on=False, held=False, retries=0, in_time=True)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, Next(what="start_over", paid=True)),
        ({"retries": MAX_RETRIES}, Next(what="give_up")),
        ({"can_go_on": True}, Next(what="start_over", paid=True)),
        ({"can_go_on": True, "held": True}, Next(what="go_on", paid=True)),
        ({"can_go_on": True, "held": True, "retries": MAX_RETRIES}, Next(what="give_up")),
        ({"left": True}, Next(what="give_up")),
        ({"left": True, "can_go_on": True}, Next(what="go_on")),
        ({"left": True, "can_go_on": True, "retries": MAX_RETRIES}, Next(what="go_on")),
        ({"how": "turned_away"}, Next(what="start_over")),
        ({"how": "turned_away", "retries": MAX_RETRIES}, Next(what="start_over")),
        ({"how": "turned_away", "in_time": False}, Next(what="start_over", paid=True)),
        ({"how": "turned_away", "left": True, "can_go_on": True}, Next(what="go_on")),
        ({"how": "engine_failed"}, Next(what="give_up")),
        ({"how": "engine_failed", "elsewhere": True}, Next(what="start_over", paid=True)),
        ({"how": "engine_failed", "elsewhere": True, "left": True, "can_go_on": True}, Next(what="go_on")),
        ({"how": "engine_failed", "left": True, "can_go_on": True}, Next(what="give_up")),
        ({"how": "suspect"}, Next(what="give_up")),
        ({"how": "suspect", "elsewhere": True, "held": True}, Next(what="give_up")),
        ({"how": "suspect", "left": True, "can_go_on": True, "held": True}, Next(what="give_up")),
        ({"crashes": 1}, Next(what="start_over", paid=True)),
        ({"crashes": CRASHES}, Next(what="give_up")),
        ({"crashes": CRASHES, "left": True, "can_go_on": True}, Next(what="give_up")),
    ],
)
def test_recovery_after_a_lost_worker(known: dict[str, Any], expected: Next) -> None:
    assert after(msgspec.structs.replace(LOST, **known)) == expected


losses = st.builds(
    Loss,
    how=st.sampled_from(["lost", "turned_away", "engine_failed", "suspect"]),
    elsewhere=st.booleans(),
    left=st.booleans(),
    can_go_on=st.booleans(),
    held=st.booleans(),
    retries=st.integers(0, 5),
    in_time=st.booleans(),
    crashes=st.integers(0, 3),
)


def _ends_loaders(loss: Loss) -> bool:
    return loss.how == "suspect" or loss.crashes >= CRASHES


@given(losses)
def test_what_ends_loaders_is_tried_nowhere_again(loss: Loss) -> None:
    assert not _ends_loaders(loss) or after(loss) == Next(what="give_up")


@given(losses)
def test_received_tokens_are_never_repeated_nor_dropped_while_a_continuation_is_possible(loss: Loss) -> None:
    found = after(loss)
    if loss.left:
        may = loss.can_go_on and (loss.how != "engine_failed" or loss.elsewhere) and not _ends_loaders(loss)
        assert found == Next(what="go_on" if may else "give_up")
    if found.what == "go_on":
        assert loss.can_go_on
    if found.paid:
        assert loss.retries < MAX_RETRIES
