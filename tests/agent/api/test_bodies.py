"""What bodies weigh before they are decoded, and the budget of those in flight."""

import contextlib
import json
import tracemalloc
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.bodies import (
    AT_ONCE_BYTES,
    LIGHT_BYTES,
    MOST_WAIT_S,
    READ_BYTES_S,
    Bodies,
    Held,
    _marks,
    _outside_strings,
    _pieces,
    weight,
)
from agent.api.openai.fields import shallower
from shared.errors import RackError, Refused, Retryable

ENOUGH = 1 << 40


def repeated(piece: str, size: int = 200_000, ends: str = "[]") -> bytes:
    return (ends[0] + ",".join([piece] * (size // (len(piece.encode()) + 1))) + ends[1]).encode()


def distinct_keys(size: int, name: str = "k{}") -> bytes:
    return ("{" + ",".join(f'"{name.format(n)}":1' for n in range(size // 12)) + "}").encode()


BOMBS = {
    "empty lists": repeated("[]"),
    "empty objects": repeated("{}"),
    "objects": repeated('{"a":1}'),
    "nested lists": repeated("[[[[]]]]"),
    "nested objects": repeated('{"a":{"b":{"c":{}}}}'),
    "empty strings": repeated('""'),
    "strings": repeated('"ab"'),
    "longer strings": repeated('"0123456789abcdef0"'),
    "wide strings": repeated('"\U0001f600"'),
    "escaped strings": repeated('"\\ud83d\\ude00"'),
    "quotes in strings": repeated('"\\"[[[[,,,,\\\\"'),
    "small numbers": repeated("7"),
    "numbers": repeated("1234567"),
    "fractions": repeated("1.5"),
    "nulls": repeated("null"),
    "distinct keys": distinct_keys(200_000),
    "distinct long keys": distinct_keys(200_000, "a key that is longer than any cache holds {}"),
    "the same key": b"{" + b",".join([b'"k":[]'] * 30_000) + b"}",
    "one wide character": ('["' + "a" * 200_000 + '\U0001f600"]').encode(),
    "one escaped wide character": ('["' + "a" * 200_000 + '\\ud83d\\ude00"]').encode(),
    "one character beyond Latin": ('["' + "a" * 200_000 + '\u4e2d"]').encode(),
    "a chat": json.dumps({"messages": [{"role": "user", "content": "a[b]{c},: " * 200}] * 100}).encode(),
}


def cost(body: bytes) -> int:
    """The most memory that decoding and the check of depth take, in bytes."""
    tracemalloc.start()
    try:
        decoded = msgspec.json.decode(body)
        shallower(decoded, 100)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_decoding_takes_no_more_than_a_body_weighs(name: str) -> None:
    body = BOMBS[name]
    # the decoder puts a string with escapes together in a buffer, one at a time
    buffer = 2 * len(body) if b"\\" in body else 0
    assert cost(body) <= weight(body, ENOUGH) + buffer
    assert weight(body, ENOUGH) <= 180 * len(body), "and the bound is of some use"


def test_a_text_weighs_what_it_takes_whatever_is_written_in_it() -> None:
    text = json.dumps({"messages": [{"role": "user", "content": '{"a": [1, 2, 3], "b": "\\\\"},\n' * 20_000}]}).encode()
    assert weight(text, ENOUGH) < 2.1 * len(text)


def test_small_bodies_are_not_worth_weighing() -> None:
    assert weight(b"[" * LIGHT_BYTES, ENOUGH) == 5 * LIGHT_BYTES  # as if every character were of the widest
    worst = repeated("[]", LIGHT_BYTES)
    assert cost(worst) < 1 << 20


def test_what_is_surely_too_much_is_not_counted_to_the_end() -> None:
    assert 10_000 <= weight(repeated('""'), 10_000) < weight(repeated('""'), ENOUGH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**9) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=60,
)


def marks_of(tree: Any) -> Counter[str]:
    if isinstance(tree, dict):
        own = Counter({"{": 1, ":": len(tree), ",": max(0, len(tree) - 1)})
        return sum((marks_of(one) for one in tree.values()), own)
    if isinstance(tree, list):
        return sum(map(marks_of, tree), Counter({"[": 1, ",": max(0, len(tree) - 1)}))
    return Counter()


@given(JSON, st.booleans())
def test_exactly_the_marks_outside_strings_are_counted(tree: Any, ascii_only: bool) -> None:
    text = json.dumps([tree] * 3, ensure_ascii=ascii_only).encode()
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    assert +_outside_strings(plain) == +marks_of([tree] * 3)


@given(st.binary(max_size=400))
def test_any_bytes_have_a_weight(body: bytes) -> None:
    assert weight(body + b" " * LIGHT_BYTES, ENOUGH) >= len(body)


def test_marks_are_counted_across_pieces() -> None:
    text = (",".join(['"' + ",[{" * 40 + '"'] * 3000)).encode()
    assert +_outside_strings(text) == {",": 2999}


def refusal(held: Held, more: int) -> RackError:
    with pytest.raises(RackError) as caught:
        held.take(more)
    return caught.value


def test_a_budget_for_each_key_and_for_all() -> None:
    bodies = Bodies(total=10, per_key=6)
    with bodies.held("a") as first, bodies.held("a") as second, bodies.held("b") as third:
        assert refusal(first, 7).code == "body_too_large"
        assert isinstance(refusal(first, 7), Refused), "no retry helps"
        first.take(4)
        second.take(2)
        full = refusal(second, 1)
        assert isinstance(full, Retryable)
        assert (full.code, full.retry_after_s) == ("key_bodies_full", 2.0)
        assert refusal(third, 5).code == "bodies_full"
        third.take(4)
    assert bodies.in_all == 0
    with bodies.held("b") as again:
        again.take(6)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), max_size=40))
def test_the_budget_is_kept_and_given_back(steps: list[tuple[str, int, bool]]) -> None:
    bodies, stacks = Bodies(total=12, per_key=8), list[tuple[contextlib.ExitStack, Held, str]]()
    for key, size, ends in steps:
        if ends and stacks:
            stacks.pop(size % len(stacks))[0].close()
        stack = contextlib.ExitStack()
        held = stack.enter_context(bodies.held(key))
        with contextlib.suppress(RackError):
            held.take(size)
        stacks.append((stack, held, key))
        by_key: Counter[str] = Counter()
        for _, one, owner in stacks:
            by_key[owner] += one.bytes
        assert bodies.in_all == by_key.total() <= 12
        assert all(total <= 8 for total in by_key.values())
    for stack, _, _ in stacks:
        stack.close()
    assert bodies.in_all == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 10 << 20), st.floats(0, 2)), max_size=40))
def test_a_key_s_bodies_are_read_no_faster_than_its_pace(asked: list[tuple[str, int, float]]) -> None:
    """In any span a key gets what it may have at once, and its rate, unless it would be held up long. What others
    ask for changes nothing."""
    both, alone = Bodies(1, 1), Bodies(1, 1)
    now_s, read = 100.0, []
    for key, size, later_s in asked:
        now_s += later_s
        wait_s = both.pace_s(key, size, now_s)
        if key == "a":
            assert wait_s == alone.pace_s(key, size, now_s) <= MOST_WAIT_S
            read.append((now_s + wait_s, 0 if wait_s == MOST_WAIT_S else size))
    for first, (began_s, _) in enumerate(read):
        total = 0
        for ended_s, size in read[first:]:
            total += size
            assert total <= AT_ONCE_BYTES + READ_BYTES_S * (ended_s - began_s) + (10 << 20) + 1


def test_the_first_bodies_of_a_key_do_not_wait() -> None:
    bodies = Bodies(1, 1)
    assert [bodies.pace_s("a", 5 << 20, 50.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bodies.pace_s("b", 5 << 20, 50.0) == 0.0
    assert bodies.pace_s("a", 1 << 20, 60.0) == 0.0, "it has had nothing for a while"


@given(st.text(alphabet='"\\[{,:a', max_size=60).map(str.encode), st.integers(1, 7))
def test_pieces_of_a_body_have_the_marks_of_the_whole(body: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.api.bodies._PIECE", size)
        assert b"".join(_pieces(body)) == body
        assert b"".join(map(_marks, _pieces(body))) == _marks(body)
