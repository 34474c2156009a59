"""What `run` says at the start: the URL when a model answers, else why none does."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.operator.startup import Said

URL = "http://127.0.0.1:8470/v1"


def model(name: str = "m", state: str = "ready", reason: str = "") -> dict[str, Any]:
    return {"names": [name], "state": state, "reason": reason}


def status(*models: dict[str, Any], peers: int = 0) -> dict[str, Any]:
    return {"models": list(models), "peers": [{}] * peers}


def said_of(*statuses: dict[str, Any], preloaded: tuple[str, ...] = ("m", "n"), every_s: float = 1.0) -> list[str]:
    said, lines = Said(URL, preloaded, keys=True), list[str]()
    for n, one in enumerate(statuses):
        more, done = said.next(one, n * every_s)
        lines += more
        if done:
            break
    return lines


def test_the_url_is_said_when_a_model_answers_and_not_before() -> None:
    cold, starting = status(model(state="cold")), status(model(state="starting"))
    assert said_of(cold, starting, starting, status(model())) == [
        "m: loading ...",
        "m: ready after 3.0 s",
        f"URL: {URL} (m answers)",
    ]


def test_a_model_that_failed_is_no_url() -> None:
    dead = status(model(state="failed", reason="model m: no such folder: /nope"))
    assert said_of(status(model(state="starting")), dead) == [
        "m: loading ...",
        "m: failed: no such folder: /nope",
        "no model answers here: see the reasons above, and `mlxrack-agent doctor`",
    ]
    (*_, last) = said_of(status(model(state="failed", reason="x"), peers=1))
    assert "requests are forwarded to peers that have it" in last


def test_one_that_answers_is_enough_beside_one_that_failed() -> None:
    lines = said_of(status(model(state="failed", reason="x"), model("n")))
    assert lines == ["m: failed: x", "n: ready after 0.0 s", f"URL: {URL} (n answers)"]


def test_a_long_load_says_how_long_it_takes() -> None:
    lines = said_of(*[status(model(state="starting"))] * 40, status(model()), every_s=5.0)
    assert lines[:4] == ["m: loading ...", "m: loading ... 10 s", "m: loading ... 30 s", "m: loading ... 60 s"]
    assert lines[4:6] == ["m: loading ... 120 s", "m: loading ... 180 s"]
    assert lines[6:] == ["m: ready after 200.0 s", f"URL: {URL} (m answers)"]


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (status(model(state="cold")), [f"URL: {URL}", "first request"]),
        (status(), ["neither models nor peers", "mlxrack-agent serve MODEL"]),
        (status(peers=2), [f"URL: {URL}", "forwarded to the peers"]),
        (status(model(state="cold", reason="load m: 2 MB over the memory budget")), ["m: cold: load m", "no model"]),
    ],
)
def test_where_nothing_is_loaded_it_is_said_what_answers(seen: dict[str, Any], words: list[str]) -> None:
    text = "\n".join(said_of(seen, preloaded=()))
    assert [word for word in words if word not in text] == []


def test_without_keys_it_is_said_who_may_connect() -> None:
    lines, _ = Said(URL, ("m",), keys=False).next(status(model()), 1.0)
    assert "no [[keys]]" in lines[-1]


STATES = st.sampled_from(["cold", "starting", "ready", "draining", "failed", "closed", "out of rotation"])
MODELS = st.builds(model, st.sampled_from(["m", "n"]), STATES, st.sampled_from(["", "x"]))


@given(st.lists(st.builds(lambda ms: status(*ms), st.lists(MODELS, max_size=3)), max_size=8))
def test_the_url_is_said_once_at_most_and_only_where_something_may_answer(history: list[dict[str, Any]]) -> None:
    said, lines = Said(URL, ("m",), keys=True), list[str]()
    for n, one in enumerate(history):
        more, done = said.next(one, float(n))
        lines += more
        if any("URL" in line for line in more):
            assert any(m["state"] in ("ready", "cold") for m in one["models"])
        assert done is not any(m["state"] == "starting" for m in one["models"]) or not done
    assert sum("URL" in line for line in lines) + sum("no model" in line for line in lines) <= 1
