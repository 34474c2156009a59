"""Frames, stop strings and the prompt cache: the loader without a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.frames import (
    Accepted,
    Cancel,
    Decoder,
    Done,
    Failed,
    Frame,
    Generate,
    Message,
    Report,
    Tokens,
    decode,
    encode,
)
from agent.loader import scheduling
from agent.loader.prompt_cache import PromptCache
from agent.loader.scheduling import Turn
from agent.loader.stopping import StopText
from shared.errors import Refused

FRAMES: list[Frame] = [
    Generate(id=1, model="m", messages=(Message(role="user", content="ü"),), max_tokens=None, stop=("x",)),
    Cancel(id=1),
    Report(),
    Accepted(id=1, prompt_tok=3, cached_tok=0),
    Tokens(id=1, text="a", count=1),
    Done(id=1, finish="stop", prompt_tok=3, cached_tok=0, completion_tok=1),
    Failed(id=1, code="c", message="m"),
]


@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_come_whole_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    stream, decoder, got = b"".join(encode(f) for f in FRAMES), Decoder(), list[Frame]()
    for size in [*cuts, len(stream)]:
        got += decoder.feed(stream[:size])
        stream = stream[size:]
    got += decoder.feed(stream)
    assert got == FRAMES


@pytest.mark.parametrize("raw", [b"\xc1", b"\x01", encode(Report())[:-1] + b"\xff", b"\x81\xa1f\xa4nope"])
def test_what_is_no_frame_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused):
        decode(raw)


texts = st.text(alphabet="abSTOP ", max_size=40)


@given(texts, st.lists(st.integers(1, 5), max_size=40), st.sampled_from([("STOP",), ("TOP", "b"), ("a a",), ()]))
def test_a_stop_string_is_exact_wherever_the_text_is_cut(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    expected = text[: min(found)] if found else text
    stop, shown, stopped, rest = StopText(stops), "", False, text
    for size in [*cuts, len(text)]:
        piece, rest = rest[:size], rest[size:]
        out, stopped = stop.feed(piece)
        shown += out
        assert expected.startswith(shown), "nothing beyond the stop string was ever shown"
        if stopped:
            break
    if not stopped:
        shown += stop.finish()
    assert bool(found) == stopped
    # a stop that begins earlier may complete later than another one: then less is shown, never more
    assert shown == expected or (found and expected.startswith(shown))


turns = st.builds(Turn, st.integers(1, 99), st.integers(1, 5000), st.floats(0, 100))


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([Turn(1, 4000, 0), Turn(2, 50, 0)], 2),
        ([Turn(1, 4000, 100), Turn(2, 50, 0)], 1),
        ([Turn(2, 50, 0), Turn(1, 50, 0)], 1),
    ],
)
def test_the_shortest_goes_first_unless_another_waited_long(waiting: list[Turn], expected: int) -> None:
    assert expected == scheduling.first(waiting, 100.0).id


@given(turns, turns, st.floats(0, 1000))
def test_two_prompts_never_take_turns_in_vain(a: Turn, b: Turn, rate: float) -> None:
    assert not (scheduling.yields(a, b, rate) and scheduling.yields(b, a, rate))


@given(turns, st.floats(1, 1000))
def test_nobody_waits_for_ever(long: Turn, rate: float) -> None:
    """However short the newcomers: after long enough the long prompt goes first and yields no more."""
    waited = long._replace(waited_s=long.left_tok / (scheduling.AGEING * rate) + 1)
    newcomer = Turn(100, 1, 0.0)
    assert scheduling.first([waited, newcomer], rate) == waited
    assert not scheduling.yields(waited, newcomer, rate)


@given(st.floats(0, 10_000), st.floats(0.01, 2), st.integers(32, 2048), st.booleans())
def test_a_piece_fits_the_stall(rate: float, stall: float, largest: int, decoding: bool) -> None:
    size = scheduling.chunk_tok(rate, stall, largest, decoding=decoding)
    assert 32 <= size <= largest
    if decoding and rate > 0 and size > 32:
        assert size <= rate * stall


def test_the_longest_common_beginning_is_found() -> None:
    cache: PromptCache[str] = PromptCache(1_000)
    cache.put(list(range(20)), "short", 10)
    cache.put([*range(10), *range(100, 130)], "other", 10)
    hit = cache.find([*range(10), *range(100, 115), 7])
    assert hit is not None
    assert hit == ("other", 25, 40)
    assert (cache.hits, cache.misses) == (1, 0)


def test_one_token_is_always_left_to_start_from() -> None:
    cache: PromptCache[str] = PromptCache(1_000)
    cache.put(list(range(20)), "x", 10)
    hit = cache.find(list(range(20)))
    assert hit is not None
    assert hit.common_tok == 19


def test_the_least_recently_used_leaves_first() -> None:
    cache: PromptCache[str] = PromptCache(30)
    a, b, c = list(range(20)), list(range(100, 120)), list(range(200, 220))
    cache.put(a, "a", 15)
    cache.put(b, "b", 15)
    assert cache.find(a) is not None
    cache.put(c, "c", 15)
    assert cache.find(b) is None
    assert cache.find(a) is not None
    assert (cache.evictions, cache.bytes) == (1, 30)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=8, max_size=14), st.integers(1, 30)), max_size=25))
def test_the_byte_budget_holds(puts: list[tuple[list[int], int]]) -> None:
    cache: PromptCache[int] = PromptCache(60)
    for number, (tokens, size) in enumerate(puts):
        cache.put(tokens, number, size)
        assert 0 <= cache.bytes <= 60
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)
