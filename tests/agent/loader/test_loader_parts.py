"""Frames, stop strings and the prompt cache: the loader without a model."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader import prefill_pace, prompt_cache, scheduling
from agent.loader.prefill_pace import PrefillCost
from agent.loader.prompt_cache import MIN_PREFIX_TOK, TOKEN_BYTES, PromptCache, common, most_shared
from agent.loader.prompt_cache import Tokens as Run
from agent.loader.scheduling import Turn
from agent.loader.stopping import StopText
from agent.wire.frames import (
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
from agent.wire.namespaces import OPEN, Namespace, namespace_of
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
def test_frames_are_decoded_whatever_the_chunk_boundaries(cuts: list[int]) -> None:
    stream, decoder, got = b"".join(encode(f) for f in FRAMES), Decoder(), list[Frame]()
    for size in [*cuts, len(stream)]:
        got += decoder.feed(stream[:size])
        stream = stream[size:]
    got += decoder.feed(stream)
    assert got == FRAMES


@pytest.mark.parametrize("raw", [b"\xc1", b"\x01", encode(Report())[:-1] + b"\xff", b"\x81\xa1f\xa4nope"])
def test_an_invalid_frame_is_rejected(raw: bytes) -> None:
    with pytest.raises(Refused):
        decode(raw)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_of_an_older_peer_lacks_fields_and_one_of_a_newer_peer_has_more(frame: Frame) -> None:
    """Every field beyond the first version's has a default; an unknown one is skipped."""
    tree = msgspec.msgpack.decode(encode(frame))
    lately = (
        "cache",
        "top_k",
        "min_p",
        "repetition_penalty",
        "repetition_window_tok",
        "ignore_eos",
        "strict",
        "ignored",
        "unmet",
    )
    older = {name: value for name, value in tree.items() if name not in lately}
    assert decode(msgspec.msgpack.encode(older)) == frame
    assert decode(msgspec.msgpack.encode({**tree, "field_to_come": [1]})) == frame


texts = st.text(alphabet="abSTOP ", max_size=40)


@given(texts, st.lists(st.integers(1, 5), max_size=40), st.sampled_from([("STOP",), ("TOP", "b"), ("a a",), ()]))
def test_stop_strings_match_whatever_the_chunk_boundaries(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
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
    # a stop string that begins earlier may complete later than another: then less is sent, never more
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
def test_the_shortest_prompt_goes_first_unless_another_waited_long(waiting: list[Turn], expected: int) -> None:
    assert expected == scheduling.first(waiting, 100.0).id


@given(turns, turns, st.floats(0, 1000))
def test_two_prompts_do_not_alternate_without_progress(a: Turn, b: Turn, rate: float) -> None:
    assert not (scheduling.yields(a, b, rate) and scheduling.yields(b, a, rate))


@given(turns, st.floats(1, 1000))
def test_no_prompt_starves(long: Turn, rate: float) -> None:
    """However short new prompts are: after long enough the long prompt goes first and no longer yields."""
    waited = long._replace(waited_s=long.left_tok / (scheduling.AGEING * rate) + 1)
    newcomer = Turn(100, 1, 0.0)
    assert scheduling.first([waited, newcomer], rate) == waited
    assert not scheduling.yields(waited, newcomer, rate)


def learnt(a: float, b: float, pieces: list[tuple[int, int]]) -> PrefillCost:
    """A cost model that has measured chunks of exactly this law."""
    cost = PrefillCost()
    for tokens, before in pieces:
        cost.learn(tokens, before, a * tokens + b * tokens * (before + tokens / 2))
    return cost


@given(
    st.floats(1e-4, 1e-2),
    st.floats(0, 1e-5),
    st.lists(st.tuples(st.integers(32, 512), st.integers(0, 8000)), min_size=2, max_size=12, unique_by=lambda p: p[1]),
    st.integers(0, 8000),
    st.floats(0.05, 3.0),
)
def test_a_prefill_chunk_fits_the_remaining_time(
    a: float, b: float, pieces: list[tuple[int, int]], before: int, seconds: float
) -> None:
    cost = learnt(a, b, pieces)
    size = cost.tokens_in(seconds, before)
    assert cost.seconds(size, before) <= seconds * 1.001
    assert cost.seconds(size + 1, before) >= seconds * 0.999


def test_the_prefill_cost_model_is_fitted_from_chunks() -> None:
    cost = learnt(2e-3, 3e-6, [(256, 0), (256, 256), (128, 512), (128, 2000)])
    assert cost.seconds(100, 4000) == pytest.approx(2e-3 * 100 + 3e-6 * 100 * 4050, rel=1e-3)
    assert learnt(2e-3, 0.0, [(100, 0)]).seconds(50, 0) == pytest.approx(0.1, rel=0.3)
    assert (PrefillCost().known, PrefillCost().seconds(9, 9)) == (False, 0.0)


@pytest.mark.parametrize(
    ("decode_s", "before", "size"),
    [(0.0, 0, 512), (0.1, 0, 233), (0.1, 3000, 49), (0.7, 0, 32), (0.0, 20_000, 32)],
    ids=["none waiting", "during decode", "long prefix", "no time left", "very long prefix"],
)
def test_a_prefill_chunk_is_bounded_by_waiting_requests(decode_s: float, before: int, size: int) -> None:
    cost = learnt(1e-3, 1.5e-6, [(256, 0), (256, 1000)])
    plain = prefill_pace.chunk_tok(cost, 0.5, decode_s, before, 512)
    assert plain == pytest.approx(size, abs=1)
    assert 32 <= plain <= 512
    assert prefill_pace.chunk_tok(PrefillCost(), 0.5, decode_s, before, 512) == 512


def as_tokens(ids: list[int], namespace: Namespace = OPEN) -> Run:
    return prompt_cache.as_tokens(namespace, ids)


State = tuple[Namespace, int]


class Pieces:
    """A cache whose states are the namespaces and tokens themselves, 10 bytes each, so that results are readable."""

    def __init__(self, budget: int, *, cuttable: bool = True) -> None:
        split = (lambda piece, at: (piece[:at], piece[at:])) if cuttable else None
        self.cache: PromptCache[list[State]] = PromptCache(budget, lambda piece: 10 * len(piece), split)

    def put(self, tokens: list[int], namespace: Namespace = OPEN) -> list[int]:
        """Store a prompt; returns the tokens whose state was requested."""
        asked: list[int] = []

        def piece_of(begin: int, end: int) -> list[State]:
            asked[:] = tokens[begin:end]
            return [(namespace, token) for token in asked]

        self.cache.put(as_tokens(tokens, namespace), piece_of)
        return asked

    def find(self, tokens: list[int], namespace: Namespace = OPEN) -> list[int] | None:
        """The cached prefix, reassembled."""
        hit = self.cache.find(as_tokens(tokens, namespace))
        if hit is None:
            return None
        found = [state for piece, taken in hit.pieces for state in piece[:taken]]
        assert hit.common_tok == len(found)
        assert {owner for owner, _ in found} == {namespace}, "a state of another namespace"
        return [token for _, token in found]


def test_a_common_prefix_is_held_once() -> None:
    pieces = Pieces(10_000)
    system, one, two = list(range(50)), list(range(100, 120)), list(range(200, 230))
    assert pieces.put(system + one) == system + one
    assert pieces.put(system + two) == two
    assert pieces.cache.bytes == (50 + 20 + 30) * (10 + TOKEN_BYTES)
    assert pieces.find([*system, *two, 7]) == system + two
    assert pieces.find([*system, *one[:9], 7]) == system + one[:9]
    assert pieces.put(system) == []
    assert (pieces.cache.hits, pieces.cache.misses, pieces.cache.saved_tok) == (2, 0, 139)


def test_at_least_one_token_remains_to_be_computed() -> None:
    pieces = Pieces(1_000)
    pieces.put(list(range(20)))
    assert pieces.find(list(range(20))) == list(range(19))
    assert pieces.cache.peek(as_tokens(list(range(20)))) == 19


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    pieces = Pieces(2 * 20 * (10 + TOKEN_BYTES))
    a, b, c = list(range(20)), list(range(100, 120)), list(range(200, 220))
    pieces.put(a)
    pieces.put(b)
    assert pieces.find(a) is not None
    pieces.put(c)
    assert pieces.find(b) is None
    assert pieces.find(a) is not None
    assert dict(pieces.cache.evictions) == {"budget": 1}


def test_shared_prefixes_outlive_single_prompts() -> None:
    each = 10 + TOKEN_BYTES
    system = list(range(50))
    pieces = Pieces((50 + 3 * 10) * each)
    for question in range(9):
        pieces.put([*system, *range(100 * question + 100, 100 * question + 110)])
    assert pieces.find([*system, 7]) == system
    assert pieces.cache.bytes <= 80 * each
    assert pieces.cache.evictions["budget"] == 6


def test_a_state_larger_than_the_budget_evicts_nothing() -> None:
    pieces = Pieces(30 * (10 + TOKEN_BYTES))
    pieces.put(list(range(20)))
    pieces.put(list(range(100, 200)))
    assert pieces.find(list(range(20))) is not None
    assert not pieces.cache.evictions


def test_an_untrimmable_state_serves_only_prompts_that_extend_it() -> None:
    pieces = Pieces(10_000, cuttable=False)
    first, second = list(range(20)), [*range(20), *range(50, 60)]
    assert pieces.put(second) == second
    assert pieces.find([*first, 7]) is None, "nobody has the state after twenty"
    assert pieces.put(first) == first
    assert pieces.find([*first, 7]) == first
    assert pieces.find([*second, 7]) == second
    assert pieces.find([*second[:25], 7]) == first
    assert pieces.find(first) is None, "one token is needed to start from"


ALICE, BOB = namespace_of("alice"), namespace_of("bob")
TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=14)
ACTS = st.lists(st.tuples(st.booleans(), TOKENS, st.sampled_from([OPEN, ALICE, BOB])), max_size=30)
Acts = list[tuple[bool, list[int], Namespace]]


def test_namespaces_share_the_budget_and_nothing_else() -> None:
    each = 20 * (10 + TOKEN_BYTES)
    pieces, same = Pieces(2 * each), list(range(20))
    assert pieces.put(same, ALICE) == same
    assert pieces.find([*same, 7], BOB) is None
    assert pieces.put(same, BOB) == same, "stored again, although the tokens are the same"
    assert (pieces.find([*same, 7], ALICE), pieces.find([*same, 7], BOB)) == (same, same)
    assert pieces.cache.bytes == 2 * each
    pieces.find([*same, 7], ALICE)
    pieces.put(list(range(100, 120)), OPEN)
    assert (pieces.find([*same, 7], ALICE), pieces.find([*same, 7], BOB)) == (same, None), "the least recent is evicted"
    assert sorted(pieces.cache._roots) == sorted([ALICE, OPEN])
    pieces.put(list(range(500)), BOB)
    assert BOB not in pieces.cache._roots, "nothing is kept of what is too large"


@given(ACTS, st.booleans())
def test_a_namespace_is_as_if_it_were_alone(acts: Acts, cuttable: bool) -> None:
    """Whatever the others do, in whatever order, if the budget suffices."""
    together = Pieces(1 << 20, cuttable=cuttable)
    alone = {owner: Pieces(1 << 20, cuttable=cuttable) for owner in (OPEN, ALICE, BOB)}
    for putting, tokens, owner in acts:
        for pieces in (together, alone[owner]):
            assert pieces.cache.peek(as_tokens(tokens, owner)) == alone[owner].cache.peek(as_tokens(tokens, owner))
        did = [p.put(tokens, owner) if putting else p.find(tokens, owner) for p in (together, alone[owner])]
        assert did[0] == did[1]
    assert together.cache.bytes == sum(pieces.cache.bytes for pieces in alone.values())


@given(ACTS, st.integers(1, 900), st.booleans())
def test_the_prefix_tree_keeps_its_invariants(acts: Acts, budget: int, cuttable: bool) -> None:
    """The budget holds, accounting is exact, hits are prefixes of the prompt, and no empty tree stays."""
    pieces = Pieces(budget, cuttable=cuttable)
    for putting, tokens, owner in acts:
        if putting:
            pieces.put(tokens, owner)
        else:
            found = pieces.find(tokens, owner)
            assert found is None or (found == tokens[: len(found)] and len(found) < len(tokens))
        assert 0 <= pieces.cache.bytes <= budget
        assert pieces.cache.bytes == sum(n.size for n in nodes(pieces.cache))
        for node in nodes(pieces.cache):
            assert node.children or node.piece is not None, "nothing hangs there without a state"
            assert bool(node.children) != (node in pieces.cache._leaves)
        assert all(root.children for root in pieces.cache._roots.values())
    pieces.cache.shrink(0, "pressure")
    assert (pieces.cache.bytes, nodes(pieces.cache), pieces.cache._roots) == (0, [], {})


def nodes(cache: PromptCache[list[State]]) -> list[Any]:
    found, left = [], [node for root in cache._roots.values() for node in root.children.values()]
    while left:
        node = left.pop()
        found.append(node)
        left += node.children.values()
    return found


@given(st.lists(st.tuples(TOKENS, TOKENS), max_size=6))
def test_an_ample_cache_returns_the_longest_prefix(pairs: list[tuple[list[int], list[int]]]) -> None:
    pieces, kept = Pieces(1 << 20), []
    for put, asked in pairs:
        pieces.put(put)
        kept += [put] if len(put) >= MIN_PREFIX_TOK else []
        best = max((common(as_tokens(one), as_tokens(asked[:-1])) for one in kept), default=0)
        assert pieces.cache.peek(as_tokens(asked)) == (best if best >= MIN_PREFIX_TOK else 0)


@given(TOKENS.map(as_tokens), st.lists(TOKENS.map(as_tokens), max_size=5), st.integers(1, 9))
def test_the_longest_shared_prefix_is_found(tokens: Run, others: list[Run], least: int) -> None:
    longest = max((common(tokens, other) for other in others), default=0)
    found = most_shared(tokens, others, least)
    assert (found is None) == (longest < least)
    if found is not None:
        assert (common(tokens, others[found[0]]), found[1]) == (longest, longest)
    assert most_shared(Run(ALICE, tokens.ids), others, least) is None, "another's tokens are never alike"


def test_short_prompts_are_prefilled_together_up_to_one_chunk() -> None:
    lead = Turn(1, 40, 0.0)
    others = [Turn(2, 60, 0.0), Turn(3, 40, 0.0), Turn(4, 500, 0.0), Turn(5, 41, 0.0)]
    assert scheduling.together(lead, others, 500.0, 256) == [1, 3, 5, 2]
    assert scheduling.together(lead, others, 500.0, 130) == [1, 3, 5]
    assert scheduling.together(Turn(1, 900, 0.0), others, 500.0, 256) == [1], "a long one is worked on alone"


@given(st.integers(1, 300), st.lists(st.integers(1, 300), max_size=20), st.integers(32, 2048), st.floats(0, 5000))
def test_a_chunk_is_never_larger_in_a_batch(lead: int, others: list[int], largest: int, rate: float) -> None:
    turns = [Turn(number, left, 0.0) for number, left in enumerate(others, start=2)]
    ids = scheduling.together(Turn(1, lead, 0.0), turns, rate, largest)
    left = {1: lead} | {turn.id: turn.left_tok for turn in turns}
    assert ids[0] == 1
    assert len(ids) == len(set(ids))
    assert len(ids) == 1 or len(ids) * max(left[n] for n in ids) <= largest
