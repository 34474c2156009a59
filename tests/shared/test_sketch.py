"""The latency sketch: bounded error and order-independent merging."""

import math
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sketch import RELATIVE_ERROR, Sketch, SketchWire, bucket_index, merged

values = st.lists(st.integers(min_value=0, max_value=10**12), max_size=60)


@given(st.integers(min_value=1, max_value=10**15))
def test_a_value_lies_in_its_bucket(value: int) -> None:
    index = bucket_index(value)
    assert 2 ** (index / 32) * (1 - 1e-12) < value <= 2 ** ((index + 1) / 32) * (1 + 1e-12)


@given(values, values, values)
def test_merging_is_commutative_associative_and_exact(a: list[int], b: list[int], c: list[int]) -> None:
    one = Sketch(a).merge(Sketch(b)).merge(Sketch(c)).to_wire()
    other = Sketch(c).merge(Sketch(b).merge(Sketch(a))).to_wire()
    assert Sketch([*a, *b, *c]).to_wire() == one == other


@given(values)
def test_the_wire_form_round_trips(items: list[int]) -> None:
    wire = Sketch(items).to_wire()
    raw = msgspec.msgpack.encode(wire)
    assert wire == Sketch.from_wire(msgspec.msgpack.decode(raw, type=SketchWire)).to_wire()


@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("shape", ["lognormal", "uniform", "two peaks", "constant"])
def test_quantiles_are_within_the_stated_error(shape: str, q: float) -> None:
    dice = random.Random(7)
    draws: dict[str, Callable[[], int]] = {
        "lognormal": lambda: int(dice.lognormvariate(10, 1)),
        "uniform": lambda: dice.randint(1, 10**6),
        "two peaks": lambda: dice.choice((1_000, 900_000)) + dice.randint(0, 50),
        "constant": lambda: 4_242,
    }
    items = [draws[shape]() for _ in range(5_000)]
    parts = [Sketch(items[n : n + 100]).to_wire() for n in range(0, len(items), 100)]
    exact = sorted(items)[math.ceil(q * len(items)) - 1]
    got = merged(parts).quantile(q)
    assert got is not None
    assert abs(got - exact) / exact <= RELATIVE_ERROR + 1e-9


def test_an_empty_sketch_has_no_quantile() -> None:
    assert Sketch().quantile(0.5) is None
    assert Sketch().mean() is None
    assert Sketch([0, 0]).quantile(0.9) == 0.0


def test_a_contradictory_wire_form_is_rejected() -> None:
    with pytest.raises(ValueError, match="bucket counts do not add up to the total"):
        Sketch.from_wire(SketchWire(count=3, idx=(1,), cnt=(1,)))
