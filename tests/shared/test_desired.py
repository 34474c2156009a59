"""Writing and reading the desired state."""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.batch import Batch, decode
from shared.batch import encode as pack
from shared.desired import Assignment, DesiredPeer, DesiredState, encode, parse
from shared.errors import Refused
from shared.records import DesiredObserved

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
        ({"generation": 0}, ">= 1"),
        ({"generation": 1, "schema": 2}, "schema 2, this agent reads 1"),
        ({"generation": 1, "nodes": {"n": [ONE, ONE]}}, "assigned m twice"),
        ({"generation": 1, "nodes": {"n": [{**ONE, "model": "../x"}]}}, "node n: model"),
        ({"generation": 1, "nodes": {"n": [{**ONE, "version": "a/b"}]}}, "node n: version"),
        ({"generation": 1, "nodes": {"n": [{**ONE, "rows": 0}]}}, ">= 1"),
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


def named_numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all numbers in a tree."""
    if isinstance(value, dict | list):
        for at, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_numbers(inner, (*path, at))
    elif type(value) in (int, float):
        yield path


FULL = encode(
    DesiredState(
        generation=1,
        written_ms=1,
        nodes={"n": (Assignment(**ONE, rows=1, plan_context_tok=1, cache_bytes=1, keep_alive_s=1.0),)},
    )
)


def test_the_full_state_has_every_number() -> None:
    kinds = (DesiredState, Assignment, DesiredPeer)
    numbers = {f.name for kind in kinds for f in msgspec.structs.fields(kind) if re.search("int|float", str(f.type))}
    assert {path[-1] for path in named_numbers(json.loads(FULL))} == numbers


@pytest.mark.parametrize("value", [2**47, 2**50, 2**63, 2**64, 10**30, -2, -(2**63), -(10**30)])
@pytest.mark.parametrize("path", list(named_numbers(json.loads(FULL))))
def test_a_number_that_cannot_be_meant_is_rejected(path: tuple[Any, ...], value: int) -> None:
    tree = at = json.loads(FULL)
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(Refused) as caught:
        parse(json.dumps(tree).encode())
    assert caught.value.code == "bad_desired"


def test_what_is_accepted_can_be_reported() -> None:
    largest = max(n for n in (10**9, 2**46, 2**50) if _accepts(n))
    batch = Batch(rack="r", node="n", epoch=1, seq=1, t_start_ms=1, t_end_ms=2)
    record = DesiredObserved(generation=largest, state="converged")
    assert decode(pack(msgspec.structs.replace(batch, records=(record,)))).records == (record,)


def _accepts(generation: int) -> bool:
    try:
        return parse(json.dumps({"generation": generation}).encode()).generation == generation
    except Refused:
        return False


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_rejected_cleanly(raw: bytes) -> None:
    with pytest.raises(Refused):
        parse(b"\x00" + raw)
