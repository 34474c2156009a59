"""What one namespace has sent changes nothing that another sees: in memory, from running rows, on disk, in grammars."""

import itertools
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import llguidance
import pytest

from agent.loader.fake_engine import FakeEngine, Pretence
from agent.loader.generation import Engine, Prepared
from agent.loader.mlx.engine import MLXEngine
from agent.loader.prompt_cache import as_tokens
from agent.wire.frames import Accepted, Generate, Tokens
from agent.wire.namespaces import OPEN, PROBES, Namespace, namespace_of
from tests.contracts.test_engine import ask, done_of, run, submit, text_of
from tests.contracts.test_engine_promises import with_disk
from tests.tiny_model import MAMBA, SLIDING, write_tiny_model

ALICE, BOB, GROUP = namespace_of("alice"), namespace_of("bob"), namespace_of("alice", "bob")
EACH = (ALICE, BOB, GROUP, OPEN, PROBES)
LONG = "The salary of Miller is forty thousand and a few hundred. " * 12


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a context for long prompts."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    write_tiny_model(folder, seed=2, config={"max_position_embeddings": 8192})
    return folder


def made(kind: str, tiny: Path, folder: Path) -> Engine:
    """Every kind of prompt cache: words, slices of states, whole states."""
    if kind == "fake":
        return FakeEngine(Pretence(cache_tok=100_000))
    if kind != "llama":
        tiny = folder / kind
        long: dict[str, Any] = {"max_position_embeddings": 8192}
        write_tiny_model(tiny, seed=3, config={"recurrent": MAMBA, "sliding": SLIDING}[kind] | long)
    return MLXEngine(str(tiny), rows=4, prefill_chunk_tok=256, cache_bytes=32 << 20)


def said(number: int, namespace: Namespace, text: str = LONG, **more: object) -> Generate:
    return ask(number, text, **{"max_tokens": 4, **more}, cache=namespace)


def cached_tok(engine: Engine, request: Generate) -> int:
    """Tokens that the engine promises to find for a request, and then finds."""
    answers = run(engine, request)[request.id]
    first = answers[0]
    assert isinstance(first, Accepted)
    assert first.cached_tok == done_of(answers).cached_tok
    return first.cached_tok


@pytest.mark.parametrize("kind", ["fake", "llama", "recurrent", "sliding"])
def test_a_namespace_finds_only_what_it_has_sent(roomy_model: Path, tmp_path: Path, kind: str) -> None:
    engine = made(kind, roomy_model, tmp_path)
    for number, namespace in enumerate(EACH):
        assert cached_tok(engine, said(number, namespace)) == 0, namespace
    if kind in ("fake", "llama"):
        for number, namespace in enumerate(EACH):
            assert cached_tok(engine, said(9 + number, namespace, LONG + " And Schulze's?")) > 100, namespace
    engine.close()


@pytest.mark.parametrize("kind", ["llama", "recurrent", "sliding"])
def test_a_conversation_is_continued_in_its_namespace_only(roomy_model: Path, tmp_path: Path, kind: str) -> None:
    """Of a state that cannot be sliced, only a prompt that continues it profits."""
    engine = made(kind, roomy_model, tmp_path)
    assert isinstance(engine, MLXEngine)
    prepared = engine.prepare(said(1, ALICE))
    assert isinstance(prepared, Prepared)
    answers = run(engine, said(1, ALICE))[1]
    whole = [*prepared.prompts[0], *(number for one in answers if isinstance(one, Tokens) for number in one.ids), 1]
    found = {one: engine._cache.peek(as_tokens(one, whole)) for one in EACH}
    engine.close()
    assert found.pop(ALICE) >= len(prepared.prompts[0])
    assert set(found.values()) == {0}


def test_equal_prompts_at_the_same_time_are_computed_once_for_each_namespace(roomy_model: Path) -> None:
    """Neither does one wait for the other's prefill, nor take its state from a running row."""
    engine = MLXEngine(str(roomy_model), rows=8, prefill_chunk_tok=64, cache_bytes=32 << 20)
    for number, namespace in enumerate((ALICE, BOB, ALICE, BOB)):
        submit(engine, said(number, namespace, max_tokens=8))
    behind: set[tuple[Namespace, Namespace]] = set()
    done: dict[int, Any] = {}
    while engine.busy:
        for row in engine._rows.waiting:
            if row.behind is not None:
                behind.add((row.request.cache, row.behind.request.cache))
        done |= {answer.id: answer for answer in engine.step() if hasattr(answer, "cached_tok")}  # type: ignore[union-attr]
    engine.close()
    assert behind == {(ALICE, ALICE), (BOB, BOB)}
    found = [done[number].cached_tok for number in range(4)]
    assert found[:2] == [0, 0]
    assert min(found[2:]) > 0.9 * done[0].prompt_tok


def test_a_running_row_lends_its_state_within_its_namespace_only(roomy_model: Path) -> None:
    engine = MLXEngine(str(roomy_model), rows=8, prefill_chunk_tok=512, cache_bytes=32 << 20)
    submit(engine, ask(1, LONG, max_tokens=200, cache=ALICE))
    while not any(row.made for row in engine._rows.running):
        engine.step()
    submit(engine, said(2, BOB))
    submit(engine, said(3, ALICE))
    done: dict[int, Any] = {}
    while 2 not in done or 3 not in done:
        done |= {answer.id: answer for answer in engine.step() if hasattr(answer, "cached_tok")}  # type: ignore[union-attr]
    assert 1 in engine._rows.by_id, "it still runs"
    engine.close()
    assert done[2].cached_tok == 0
    assert done[3].cached_tok > 0.9 * done[3].prompt_tok


def test_whatever_happens_a_tree_holds_its_own_namespaces_tokens(roomy_model: Path) -> None:
    """Preempted, cancelled, rebuilt and finished rows: what they leave is under their own namespace."""
    draw, numbers = random.Random(5), itertools.count()
    engine = MLXEngine(str(roomy_model), rows=4, prefill_chunk_tok=128, kv_tok=1536, cache_bytes=64 << 20)
    kept: dict[Namespace, list[list[int]]] = defaultdict(list)
    put = engine._cache._memory.put

    def noted(tokens: Any, piece_of: Any) -> None:
        kept[tokens.namespace].append(tokens.ids.tolist())
        put(tokens, piece_of)

    engine._cache._memory.put = noted  # type: ignore[method-assign]
    marks = {ALICE: "@", BOB: "%", OPEN: "~"}
    for _ in range(3):
        sent = [
            ask(next(numbers), LONG[: draw.randrange(300, 500)] + marks[one] * 9, max_tokens=60, cache=one)
            for one in draw.choices(list(marks), k=5)
        ]
        for request in sent:
            assert isinstance(submit(engine, request), Accepted)
        for step in itertools.count():
            if not engine.busy:
                break
            if step == 10:
                engine._rows.set_aside(draw.choice(engine._rows.running))
            if step == 20:
                engine._rows.put_back(draw.choice(engine._rows.running))
            if step == 30:
                engine.cancel(draw.choice(sent).id)
            if step == 40 and engine._rows.batches:
                engine._rows.rebuild(engine._rows.batches[0])
            engine.step()
    mark_of = {one: engine._model.encode(mark * 9)[-5:] for one, mark in marks.items()}
    engine.close()
    assert set(kept) == set(marks)
    for namespace, runs in kept.items():
        for other in set(marks) - {namespace}:
            assert not any(_holds(run_, mark_of[other]) for run_ in runs), (namespace, other)
        assert any(_holds(run_, mark_of[namespace]) for run_ in runs)


def _holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids)))


def test_blocks_on_disk_belong_to_a_namespace(
    roomy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> MLXEngine:
        engine = with_disk(roomy_model, tmp_path)
        monkeypatch.setattr(engine._pace.cost, "seconds", lambda *_: 3600.0)
        return engine

    first = opened()
    expected = text_of(run(first, said(1, ALICE))[1])
    first.close()
    second = opened()
    for number, namespace in enumerate((BOB, GROUP, OPEN)):
        assert cached_tok(second, said(number, namespace)) == 0
    answers = run(second, said(9, ALICE))[9]
    assert (text_of(answers), done_of(answers).cached_tok) == (expected, 512)
    second.close()
    third = opened()
    assert cached_tok(third, said(1, BOB)) == 512, "by now its own"
    third.close()


def test_a_grammar_is_compiled_for_each_namespace(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time until a constrained answer begins would tell who else has sent its schema."""
    engine = MLXEngine(str(tiny_model))
    made: list[str] = []
    matcher = llguidance.LLMatcher

    def compiled(tokenizer: Any, grammar: str, **settings: Any) -> Any:
        made.append(grammar)
        return matcher(tokenizer, grammar, **settings)

    monkeypatch.setattr("agent.loader.mlx.model.LLMatcher", compiled)
    schema = json.dumps({"type": "object", "properties": {"name": {"enum": ["Miller", "Schulze"]}}})
    for namespace in (ALICE, ALICE, BOB, BOB, ALICE):
        assert isinstance(engine.prepare(ask(1, schema=schema, cache=namespace)), Prepared)
    engine.close()
    assert len(made) == 2
    info = engine._model._planner._short.cache_info()
    assert (info.misses, info.hits) == (2, 3)
