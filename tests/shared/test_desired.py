"""Writing and reading the desired state."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.desired import Assignment, DesiredState, encode, parse
from shared.errors import Refused

ONE: dict[str, Any] = {"model": "m", "source": "s", "version": "v1"}


def test_the_desired_state_round_trips() -> None:
    made = DesiredState(generation=3, note="why", nodes={"n1": (Assignment(**ONE, pinned=True, rows=4),), "n2": ()})
    assert parse(encode(made)) == made


def test_fields_of_a_newer_aggregator_are_ignored() -> None:
    raw = json.dumps({"generation": 1, "later": 5, "nodes": {"n1": [{**ONE, "later": 6}]}}).encode()
    assert parse(raw).nodes["n1"][0].model == "m"


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ([], "Expected"),
        ({}, "generation"),
        ({"generation": 0}, "below 1"),
        ({"generation": 1, "schema": 2}, "schema 2, this agent reads 1"),
        ({"generation": 1, "nodes": {"n": [ONE, ONE]}}, "assigned m twice"),
        ({"generation": 1, "nodes": {"n": [{**ONE, "model": "../x"}]}}, "node n: model"),
        ({"generation": 1, "nodes": {"n": [{**ONE, "version": "a/b"}]}}, "node n: version"),
        ({"generation": 1, "nodes": {"n": [{**ONE, "rows": 0}]}}, "below 1"),
        ({"generation": 1, "nodes": {"n": [{"model": "m"}]}}, "source"),
        ({"generation": 1, "peers": [{"id": "a", "url": "ftp://x"}]}, r"peer a: url: expected an http\(s\) URL"),
        ({"generation": 1, "peers": [{"id": "../a", "url": "http://x"}]}, "peers: id"),
        ({"generation": 1, "peers": [{"id": "a", "url": "http://x"}, {"id": "a", "url": "http://y"}]}, "the id a"),
        ({"generation": 1, "peers": [{"id": "a", "url": "http://x"}, {"id": "b", "url": "http://x/"}]}, "the url"),
    ],
)
def test_an_invalid_state_is_rejected(tree: object, why: str) -> None:
    with pytest.raises(Refused, match=why):
        parse(json.dumps(tree).encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_rejected_cleanly(raw: bytes) -> None:
    with pytest.raises(Refused):
        parse(b"\x00" + raw)
