"""Row placement by table and by property: rows, batches and limits as plain facts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader.row_placement import GROWTH_TOK, Block, Candidate, Limits, Placed, Placement, Start, fits, place
from agent.loader.scheduling import Turn

LIMITS = Limits(rows=4, kv_tok=8192, weights_tok=1000.0)


def row(number: int, length_tok: int, *, made: int = 1, prefilling: bool = False, apart: bool = False) -> Placed:
    return Placed(number, length_tok, float(number), made, prefilling, apart)


def candidate(number: int, length_tok: int, *, apart: bool = False) -> Candidate:
    return Candidate(Turn(number, length_tok, 0.0), length_tok, 1, apart)


def placement(*batches: list[Placed], limits: Limits = LIMITS) -> Placement:
    return Placement(tuple(map(tuple, batches)), limits)


@pytest.mark.parametrize(
    ("blocks", "length", "weights", "where"),
    [
        ([], 10, 1000.0, None),
        ([Block(7, 20)], 4096, 1000.0, None),
        ([Block(7, 20)], 4096, 1e6, 0),
        ([Block(1, 4100)], 8, 1000.0, None),
        ([Block(1, 4100)], 8, 1e6, 0),
        ([Block(1, 4100), Block(3, 30)], 8, 1000.0, 1),
        ([Block(1, 4100), Block(3, 30)], 4000, 1000.0, 0),
        ([Block(0, 0)], 500, 1000.0, 0),
    ],
)
def test_a_row_joins_with_least_padding(blocks: list[Block], length: int, weights: float, where: int | None) -> None:
    assert place(blocks, length, weights) == where


def test_memory_includes_padding() -> None:
    assert Block(8, 300).padded_tok == 8 * 512
    assert fits([], Block(1, 10**9), 1), "somebody has to be first"
    assert not fits([], Block(2, 10**9), 1)
    assert fits([], Block(2, 200), 512)
    assert not fits([], Block(2, 257), 512)
    assert fits([Block(1, 4096)], Block(1, 200), 4352)
    assert not fits([Block(1, 4096)], Block(1, 300), 4352)


@pytest.mark.parametrize(
    ("at", "prefilling", "expected"),
    [
        (placement(), [], Start(None, 1)),
        (placement([row(9, 50)]), [], Start(None, 1)),
        (placement([row(9, 50, made=0)]), [], Start(None, None)),
        (placement([row(9, 900, prefilling=True)]), [Turn(9, 150, 0.0)], Start(None, None)),
        (placement([row(9, 900, prefilling=True)]), [Turn(9, 800, 0.0)], Start(9, 1)),
        (placement([row(9, 900, prefilling=True)]), [Turn(9, 800, 60.0)], Start(None, None)),
        (placement([row(9, 900, prefilling=True)], limits=LIMITS._replace(pressed=True)), [], Start(None, None)),
        (placement([row(n, 50) for n in (6, 7, 8, 9)]), [], Start(None, None)),
        (placement([row(9, 8000)]), [], Start(None, None)),
    ],
    ids=[
        "idle",
        "beside a decoding row",
        "after the first token of another",
        "similar prompts do not alternate",
        "a long prompt yields",
        "one that waited long does not",
        "under memory pressure",
        "all rows are taken",
        "no memory left",
    ],
)
def test_which_prompt_starts_next(at: Placement, prefilling: list[Turn], expected: Start) -> None:
    assert at.start([candidate(1, 100), candidate(2, 400)], prefilling, 100.0) == expected


def test_a_row_that_has_no_room_in_the_cheapest_batch_may_have_it_in_another() -> None:
    """Beside a long row, a short one occupies as much as that; alone it needs little."""
    long = placement([row(9, 5000)], limits=LIMITS._replace(weights_tok=12_000.0))
    assert long.room_for(candidate(1, 31))
    assert long.seats([candidate(1, 31)]) == {1: [1]}
    assert long.start([candidate(1, 31)], [], 50.0) == Start(None, 1)
    assert not placement([row(9, 7937)], limits=LIMITS._replace(weights_tok=12_000.0)).room_for(candidate(1, 31))


def test_a_prompt_of_one_short_chunk_delays_no_first_token() -> None:
    assert placement([row(9, 50, made=0)]).start([candidate(1, 60)], [], 100.0) == Start(None, 1)


@pytest.mark.parametrize(
    ("at", "joining", "expected"),
    [
        (placement(), [candidate(1, 100), candidate(2, 110)], {0: [1, 2]}),
        (placement([row(9, 4000)]), [candidate(1, 100), candidate(2, 110)], {1: [1, 2]}),
        (placement([row(9, 120)], [row(8, 3000)]), [candidate(1, 100)], {0: [1]}),
        (placement([row(9, 120)], limits=LIMITS._replace(rows=2)), [candidate(1, 9), candidate(2, 9)], {0: [1]}),
        (placement([row(9, 120, apart=True)]), [candidate(1, 100)], {1: [1]}),
        (placement([row(9, 120)]), [candidate(1, 100, apart=True), candidate(2, 100)], {1: [1], 0: [2]}),
        (placement([row(9, 7900)]), [candidate(1, 600), candidate(2, 9)], {}),
    ],
    ids=["together", "apart from a long one", "the closest length", "limit", "shut", "alone", "memory, in order"],
)
def test_where_rows_are_decoded(at: Placement, joining: list[Candidate], expected: dict[int, list[int]]) -> None:
    assert at.seats(joining) == expected


def test_the_youngest_waits_when_rows_outgrow_memory() -> None:
    tight = LIMITS._replace(kv_tok=512)
    assert placement([row(1, 300), row(2, 20)], limits=tight).outgrown() == 2
    assert placement([row(1, 300)], [row(2, 20)], limits=tight).outgrown() == 2
    assert placement([row(1, 200), row(2, 20)], limits=tight).outgrown() is None
    assert placement([row(1, 9000)], limits=tight).outgrown() is None, "one that is alone goes on"


lengths = st.integers(1, 6000)
placed = st.builds(
    Placed, st.integers(100, 999), lengths, st.floats(0, 99), st.integers(0, 9), st.just(False), st.booleans()
)
placements = st.builds(
    Placement,
    st.lists(st.lists(placed, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    st.builds(Limits, st.integers(1, 12), st.integers(1, 64).map(lambda n: 256 * n), st.floats(0, 5000), st.booleans()),
)
candidates = st.lists(
    st.builds(
        Candidate,
        st.builds(Turn, st.integers(1, 99), lengths, st.floats(0, 100)),
        lengths,
        st.integers(1, 600),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda row: row.turn.id,
)


@given(placements, candidates)
def test_seats_respect_rows_memory_and_who_must_be_alone(at: Placement, joining: list[Candidate]) -> None:
    seats = at.seats(joining)
    by_id = {one.turn.id: one for one in joining}
    seated = [number for ids in seats.values() for number in ids]
    assert sorted(seated) == sorted(one.turn.id for one in joining[: len(seated)]), "in order, none skipped"
    assert not seated or len(at.rows) + len(seated) <= at.limits.rows
    fresh = [index for index in seats if index >= len(at.batches)]
    assert sorted(fresh) == list(range(len(at.batches), len(at.batches) + len(fresh)))
    padded = 0
    for index in range(len(at.batches) + len(fresh)):
        held = at.batches[index] if index < len(at.batches) else ()
        new = [by_id[number] for number in seats.get(index, [])]
        assert not new or not any(one.apart for one in held)
        assert not any(one.apart for one in new) or (len(new), len(held)) == (1, 0)
        longest = max([one.length_tok for one in held] + [one.planned_tok for one in new], default=0)
        padded += Block(len(held) + len(new), longest).padded_tok
    assert not seated or padded <= at.limits.kv_tok or (len(at.rows), len(seated)) == (0, 1)


@given(placements, candidates.filter(bool), st.floats(0, 1000))
def test_a_start_is_one_that_has_room(at: Placement, ready: list[Candidate], rate: float) -> None:
    start = at.start(ready, [], rate)
    assert start.preempts is None
    if start.begins is not None:
        best = next(one for one in ready if one.turn.id == start.begins)
        assert at.room_for(best)
        assert at.seats([best])
        assert not (at.limits.pressed and at.rows)


@given(placements)
def test_preempting_the_youngest_ends_with_rows_that_fit(at: Placement) -> None:
    while (youngest := at.outgrown()) is not None:
        fewer = at.without(youngest)
        assert len(fewer.rows) < len(at.rows)
        at = fewer
    total = sum(Block(len(b), max((r.length_tok for r in b), default=0)).padded_tok for b in at.batches)
    assert len(at.rows) < 2 or total <= at.limits.kv_tok


def test_a_row_is_planned_with_the_first_tokens_of_its_answer() -> None:
    assert Candidate(Turn(1, 5, 0.0), 100, 10).planned_tok == 110
    assert Candidate(Turn(1, 5, 0.0), 100, 10_000).planned_tok == 100 + GROWTH_TOK
