"""Requests of different ranks in every Engine: who gets a row, and that nobody's answer changes. Counted in steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.loader.fake_engine import FakeEngine, Pretence
from agent.loader.generation import Engine
from agent.loader.mlx.engine import MLXEngine
from agent.loader.ranking import MAX_YIELDS
from agent.wire.frames import Done, Failed, Generate, Tokens
from agent.wire.priority import NEUTRAL, Priority
from tests.contracts.test_engine import ask, done_of, run, submit, text_of

ROWS = 4
ROUTINE, ORCHESTRATION = Priority(rank=-1, starve_ms=600_000), Priority(rank=2)


def made(kind: str, model: Path) -> Engine:
    if kind == "fake":
        return FakeEngine(Pretence(prefill_tps=1e6), rows=ROWS)
    return MLXEngine(str(model), rows=ROWS, prefill_chunk_tok=32, cache_bytes=8 << 20)


@pytest.fixture(params=["fake", "mlx"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Engine]:
    found = made(request.param, tiny_model)
    yield found
    found.close()


class Watched:
    """Steps an engine and keeps what it said."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.said = engine, dict[int, list[Tokens | Done]]()

    def ask(self, number: int, text: str, priority: Priority, **more: object) -> None:
        """Submit a request that is answered to its full length."""
        self.said[number] = []
        values = {"max_tokens": 40, "ignore_eos": True, **more}
        submit(self.engine, ask(number, text, priority=priority, **values))

    def step(self) -> set[int]:
        """The requests that got a token."""
        told = set()
        for answer in self.engine.step():
            assert isinstance(answer, Tokens | Done), answer
            self.said[answer.id].append(answer)
            told.add(answer.id)
        return told

    def until(self, *numbers: int, most: int = 400) -> int:
        """Step until all of these have a token; in how many steps."""
        for step in range(most):
            if all(self.said[number] for number in numbers):
                return step
            self.step()
        raise AssertionError(f"{most} steps, and {numbers} have not begun")

    def finish(self) -> None:
        """Step until idle."""
        while self.engine.busy:
            self.step()

    def ended(self, number: int) -> bool:
        """Whether an answer is complete."""
        return any(isinstance(one, Done) for one in self.said[number])


def questions(count: int) -> dict[int, str]:
    return {number: f"question {number} " * 3 for number in range(count)}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_higher_rank_gets_a_row_of_a_lower_one_whose_answer_stays_the_same(
    engine: Engine, temperature: float
) -> None:
    more = {"temperature": temperature, "seed": 7, "max_tokens": 40, "ignore_eos": True}
    alone = run(engine, *(ask(number, text, **more) for number, text in questions(ROWS).items()))
    watched = Watched(engine)
    for number, text in questions(ROWS).items():
        watched.ask(number, text, ROUTINE, **more)
    watched.until(*questions(ROWS))
    watched.ask(99, "what next?", ORCHESTRATION)
    assert watched.until(99) <= 4, "a step for what runs, and its own prompt"
    assert not any(watched.ended(number) for number in questions(ROWS))
    watched.finish()
    for number in questions(ROWS):
        assert text_of(watched.said[number]) == text_of(alone[number])  # type: ignore[arg-type]
        assert done_of(watched.said[number]).completion_tok == 40  # type: ignore[arg-type]


def test_equals_wait_for_a_row(engine: Engine) -> None:
    watched = Watched(engine)
    for number, text in questions(ROWS).items():
        watched.ask(number, text, NEUTRAL)
    watched.until(*questions(ROWS))
    watched.ask(99, "what next?", NEUTRAL)
    watched.until(99)
    assert any(watched.ended(number) for number in questions(ROWS))


def test_reserved_rows_are_free_when_they_are_wanted(engine: Engine) -> None:
    watched = Watched(engine)
    for number, text in questions(2 * ROWS).items():
        watched.ask(number, text, Priority(rank=-1, leaves_rows=1))
    watched.until(*range(ROWS - 1))
    told = set()
    for _ in range(5):
        told |= watched.step()
    assert len(told) == ROWS - 1
    watched.ask(99, "what next?", ORCHESTRATION)
    watched.until(99)
    assert told <= watched.step(), "nobody had to yield"
    watched.finish()


def test_under_a_flood_of_a_higher_rank_a_lower_one_has_its_turn(engine: Engine) -> None:
    """With its bound used up it is the next; with a bound that is far away it waits while the flood lasts."""
    for starve_ms, waits in ((0, False), (600_000, True)):
        watched = Watched(engine)
        for number in range(100, 100 + 2 * ROWS):
            watched.ask(number, f"order {number}", ORCHESTRATION, max_tokens=6)
        watched.step()
        watched.ask(1, "a routine question", Priority(rank=-1, starve_ms=starve_ms), max_tokens=6)
        following = 200
        while not watched.said[1] and following < 240:
            watched.step()
            if sum(not watched.ended(number) for number in watched.said if number != 1) < 2 * ROWS:
                watched.ask(following, f"order {following}", ORCHESTRATION, max_tokens=6)
                following += 1
        assert (not watched.said[1]) == waits
        watched.finish()
        assert watched.ended(1)


def test_a_long_prompt_in_prefill_yields_to_a_higher_rank_that_is_no_shorter(tiny_model: Path) -> None:
    engine = MLXEngine(str(tiny_model), rows=ROWS, prefill_chunk_tok=32, cache_bytes=8 << 20)
    watched = Watched(engine)
    watched.ask(1, "a long document " * 20, ROUTINE, max_tokens=4)
    watched.step()
    row = engine._rows.by_id[1]
    assert row.prefilling
    watched.ask(2, "another, of the same length " * 12, ORCHESTRATION, max_tokens=4)
    watched.until(2)
    assert not watched.said[1]
    assert row.yielded == 1
    watched.finish()
    assert watched.ended(1)
    engine.close()


def test_rows_are_counted_as_they_yield(tiny_model: Path) -> None:
    engine = MLXEngine(str(tiny_model), rows=1, prefill_chunk_tok=32, cache_bytes=8 << 20)
    watched = Watched(engine)
    watched.ask(1, "a question", ROUTINE, max_tokens=30)
    watched.until(1)
    row = engine._rows.by_id[1]
    for number in range(2, 3 + MAX_YIELDS):
        watched.ask(number, f"order {number}", ORCHESTRATION, max_tokens=2)
        for _ in range(6):
            watched.step()
    assert row.yielded == MAX_YIELDS
    last = 2 + MAX_YIELDS
    assert not watched.said[last] or watched.ended(1), "this one had to wait for it"
    watched.finish()
    assert all(watched.ended(number) for number in watched.said)
    assert not any(isinstance(one, Failed) for said in watched.said.values() for one in said)
    engine.close()


def test_others_pause_for_a_first_token_where_rows_are_reserved_and_not_for_long(tiny_model: Path) -> None:
    """A pause ends with the first token, or with the time that decoding rows may wait."""
    for stall_s, pauses in ((600.0, True), (1e-6, False)):
        engine = MLXEngine(str(tiny_model), rows=ROWS, prefill_chunk_tok=32, cache_bytes=8 << 20, stall_s=stall_s)
        watched = Watched(engine)
        for number, text in questions(2).items():
            watched.ask(number, text, Priority(rank=-1, leaves_rows=1), max_tokens=200)
        watched.until(*questions(2))
        watched.ask(99, "an order of some length " * 10, ORCHESTRATION)
        watched.step()
        before = len(watched.said[0])
        watched.until(99)
        assert (len(watched.said[0]) == before) == pauses
        watched.finish()
        assert all(watched.ended(number) for number in watched.said)
        engine.close()


def test_a_cancelled_one_is_forgotten(engine: Engine) -> None:
    watched = Watched(engine)
    for number, text in questions(ROWS).items():
        watched.ask(number, text, ROUTINE)
    watched.until(*questions(ROWS))
    watched.ask(98, "what next?", ORCHESTRATION)
    watched.ask(99, "and then?", ORCHESTRATION)
    engine.cancel(98)
    watched.until(99)
    engine.cancel(99)
    watched.finish()
    assert all(watched.ended(number) for number in questions(ROWS))
    assert not isinstance(submit(engine, Generate(id=1, model="m", prompt="x", max_tokens=1)), Failed)
    engine.close()
