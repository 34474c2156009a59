"""One suite for every Engine: the fake one, and MLX on a tiny real model; then MLX only."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from agent.loader.fake_engine import FakeEngine
from agent.loader.generation import Engine
from agent.loader.mlx.engine import MLXEngine
from agent.wire.frames import Accepted, Ask, Done, Failed, Frame, Generate, Message, Scored, Tokens
from shared.errors import Refused


@pytest.fixture(params=["fake", "mlx"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine
    if request.param == "fake":
        made = FakeEngine()
    else:
        made = MLXEngine(str(request.getfixturevalue("tiny_model")), rows=4, prefill_chunk_tok=32, cache_bytes=8 << 20)
    yield made
    made.close()


def ask(number: int, text: str = "hello there", **more: object) -> Generate:
    values: dict[str, object] = {"max_tokens": 12, "temperature": 0.0, **more}
    return Generate(id=number, model="m", messages=(Message(role="user", content=text),), **values)  # type: ignore[arg-type]


def submit(engine: Engine, request: Ask) -> Frame:
    prepared = engine.prepare(request)
    return prepared if isinstance(prepared, Failed) else engine.submit(prepared)


def run(engine: Engine, *requests: Generate) -> dict[int, list[Frame]]:
    """Submit all, step until idle; answers by request."""
    got: dict[int, list[Frame]] = {r.id: [submit(engine, r)] for r in requests}
    while engine.busy:
        for answer in engine.step():
            assert isinstance(answer, Tokens | Done | Failed)
            got[answer.id].append(answer)
    return got


def text_of(answers: list[Frame]) -> str:
    return "".join(a.text for a in answers if isinstance(a, Tokens))


def done_of(answers: list[Frame]) -> Done:
    last = answers[-1]
    assert isinstance(last, Done)
    return last


def test_an_answer_is_accepted_generated_and_done(engine: Engine) -> None:
    answers = run(engine, ask(1))[1]
    first, done = answers[0], done_of(answers)
    assert isinstance(first, Accepted)
    assert first.prompt_tok == done.prompt_tok > 0
    assert sum(a.count for a in answers if isinstance(a, Tokens)) == done.completion_tok <= 12
    assert done.finish in ("length", "stop")


def test_batching_does_not_change_an_answer(engine: Engine) -> None:
    alone = {n: text_of(run(engine, ask(n, f"question {n}"))[n]) for n in (1, 2, 3)}
    together = run(engine, *(ask(n, f"question {n}") for n in (3, 1, 2)))
    assert alone == {n: text_of(together[n]) for n in (1, 2, 3)}


def test_a_seed_determines_a_sampled_answer(engine: Engine) -> None:
    def sampled(number: int, seed: int) -> Generate:
        return ask(number, temperature=0.9, top_p=0.95, seed=seed)

    alone = text_of(run(engine, sampled(1, 7))[1])
    mixed = run(engine, ask(2, "other"), sampled(3, 7), sampled(4, 8))
    assert alone == text_of(mixed[3])
    assert alone != text_of(mixed[4])


def test_max_tokens_is_exact(engine: Engine) -> None:
    done = done_of(run(engine, ask(1, max_tokens=3))[1])
    assert done.completion_tok <= 3


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine: Engine) -> None:
    whole = text_of(run(engine, ask(1))[1])
    stop = whole[4:7]
    answers = run(engine, ask(2, stop=(stop,)))[2]
    assert whole[: whole.index(stop)] == text_of(answers)
    assert done_of(answers).finish == "stop"


def test_an_oversized_request_is_rejected_and_the_next_is_served(engine: Engine) -> None:
    refused = submit(engine, ask(1, max_tokens=10**6, strict=True))
    assert isinstance(refused, Failed)
    assert (refused.code, refused.param) == ("context_length_exceeded", "max_tokens")
    long = submit(engine, ask(3, "word " * 40_000, max_tokens=1))
    assert isinstance(long, Failed)
    assert (long.code, long.param) == ("context_length_exceeded", "messages")
    # LiteLLM and LangChain shorten the conversation when they find these words
    assert "this model's maximum context length is" in long.message
    assert "prompt is too long" in long.message


def test_max_tokens_beyond_the_context_are_capped_and_named(engine: Engine) -> None:
    capped = submit(engine, ask(1, max_tokens=10**6))
    assert isinstance(capped, Accepted)
    assert capped.ignored == ("max_tokens",)
    engine.cancel(1)
    assert done_of(run(engine, ask(2))[2])


def test_a_cancelled_request_leaves_nothing_behind(engine: Engine) -> None:
    submit(engine, ask(1, max_tokens=200))
    submit(engine, ask(2))
    engine.step()
    engine.cancel(1)
    engine.cancel(99)
    left = []
    while engine.busy:
        left += [a.id for a in engine.step() if isinstance(a, Tokens | Done | Failed)]
    assert {2} == set(left)


def test_counts_are_reported_once(engine: Engine) -> None:
    answers = run(engine, ask(1), ask(2, "more"))
    made = sum(done_of(a).completion_tok for a in answers.values())
    first, second = engine.report(), engine.report()
    assert made == first.decode_tok
    assert 0 == second.decode_tok == second.steps
    assert first.busy_decode_us > 0


GONE_ON: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"stop": ("a", "e")},
    {"prompt": "once upon a time"},
    {"schema": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}', "max_tokens": 40},
    # ends with the model's EOS token, which is counted
    {
        "schema": '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], '
        '"additionalProperties": false}',
        "max_tokens": 40,
    },
]


@pytest.mark.parametrize("more", GONE_ON, ids=["greedy", "sampled", "penalties", "stop", "text", "schema", "eos"])
def test_an_answer_can_be_continued_after_any_token(engine: Engine, more: dict[str, Any]) -> None:
    """Tokens of another loader are continued: text and counts equal those of an uninterrupted answer."""
    whole = run(engine, ask(1, **more))[1]
    ids = [token for a in whole if isinstance(a, Tokens) for token in a.ids]
    texts = [a.text for a in whole if isinstance(a, Tokens)]
    assert len(ids) == done_of(whole).completion_tok
    for cut in range(1, len(ids) + 1):
        rest = run(engine, ask(2, made=tuple(ids[:cut]), **more))[2]
        assert [token for a in rest if isinstance(a, Tokens) for token in a.ids] == ids[cut:]
        assert text_of(rest) == "".join(texts[cut:])
        assert (done_of(rest).finish, done_of(rest).completion_tok) == (done_of(whole).finish, len(ids))


def test_an_answer_longer_than_this_context_is_continued_elsewhere(engine: Engine) -> None:
    """Ended here, it would be shorter than the node that began it made it."""
    refused = submit(engine, ask(1, max_tokens=10**6, made=(5,) * engine.describe().context_tok))
    assert isinstance(refused, Failed)
    assert refused.code == "context_length_exceeded"


# MLX only


@pytest.fixture
def mlx(tiny_model: Path) -> Iterator[MLXEngine]:
    made = MLXEngine(str(tiny_model), rows=4, prefill_chunk_tok=32, cache_bytes=8 << 20)
    yield made
    made.close()


def test_a_cached_prefix_gives_the_same_answer(mlx: MLXEngine, tiny_model: Path) -> None:
    long = "a shared beginning of some length. " * 3
    run(mlx, ask(1, long + "one"))
    warm = run(mlx, ask(2, long + "two"))[2]
    again = run(mlx, ask(3, long + "two"))[3]
    fresh = MLXEngine(str(tiny_model), cache_bytes=0)
    cold = run(fresh, ask(4, long + "two"))[4]
    fresh.close()
    assert text_of(cold) == text_of(warm) == text_of(again)
    assert 0 == done_of(cold).cached_tok < done_of(warm).cached_tok < done_of(again).cached_tok
    report = mlx.report()
    assert (report.cache_hits, report.cache_misses) == (2, 1)


def test_a_broken_batch_is_rebuilt_and_the_answers_are_the_same(mlx: MLXEngine) -> None:
    alone = {n: text_of(run(mlx, ask(n, f"question {n}", temperature=0.8, seed=n))[n]) for n in (1, 2)}
    got: dict[int, list[Frame]] = {n: [submit(mlx, ask(n, f"question {n}", temperature=0.8, seed=n))] for n in (1, 2)}
    for _ in range(4):
        for answer in mlx.step():
            got[answer.id].append(answer)  # type: ignore[union-attr]

    def broken(chunk_tok: int) -> None:
        raise RuntimeError("as if one row had broken the batch")

    mlx._rows.batches[0].step = broken  # type: ignore[method-assign, assignment]
    while mlx.busy:
        for answer in mlx.step():
            got[answer.id].append(answer)  # type: ignore[union-attr]
    assert alone == {n: text_of(got[n]) for n in (1, 2)}


def test_the_working_set_is_never_wired(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    calls: list[int] = []

    def spy(size: int) -> int:
        calls.append(size)
        return 0

    monkeypatch.setattr(mx, "set_wired_limit", spy)
    engine = MLXEngine(str(tiny_model))
    run(engine, ask(1))
    engine.close()
    assert calls == []


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(b"\x00" * 64), "load failed"),
        (lambda p: (p / "model.safetensors").unlink(), "load failed"),
        (lambda p: (p / "config.json").write_text("{"), "load failed"),
        (lambda p: (p / "config.json").write_text('{"model_type": "unheard-of"}'), "load failed"),
        (lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir(), "broken: does not exist"),
    ],
    ids=["corrupt weights", "no weights", "bad json", "unknown kind", "no folder"],
)
def test_an_unloadable_model_reports_the_reason(tiny_model: Path, tmp_path: Path, break_it: object, why: str) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(Refused, match=why):
        MLXEngine(str(folder))


@pytest.mark.slow
def test_the_demo_model_answers_a_factual_question() -> None:
    from scripts.fetch_demo_model import MAIN, default_folder

    folder = default_folder() / MAIN
    assert folder.is_dir(), "make model fetches it"
    engine = MLXEngine(str(folder))
    answer = run(engine, ask(1, "What is the capital of France?"))[1]
    engine.close()
    assert text_of(answer) == "The capital of France is Paris."


def test_a_short_prompt_does_not_wait_behind_a_long_one(mlx: MLXEngine) -> None:
    long, short = ask(1, "x" * 400, max_tokens=8), ask(2, "hi", max_tokens=8)
    alone = {n: text_of(run(mlx, msgspec.structs.replace(r, id=n + 10))[n + 10]) for n, r in ((1, long), (2, short))}
    mlx._cache.clear()
    ends: list[int] = []
    got: dict[int, list[Frame]] = {1: [submit(mlx, long)]}
    mlx.step()
    got[2] = [submit(mlx, short)]
    while mlx.busy:
        for answer in mlx.step():
            assert isinstance(answer, Tokens | Done)
            got[answer.id].append(answer)
            ends += [answer.id] if isinstance(answer, Done) else []
    assert ends == [2, 1], "the long prompt gave way"
    assert alone == {n: text_of(got[n]) for n in (1, 2)}
    assert done_of(got[1]).cached_tok == 0, "its own half-done prompt is no cache hit"


def test_a_partial_prefill_is_cached_on_cancel(mlx: MLXEngine) -> None:
    submit(mlx, ask(1, "y" * 300))
    for _ in range(5):
        mlx.step()
    mlx.cancel(1)
    again = run(mlx, ask(2, "y" * 300))[2]
    assert done_of(again).cached_tok >= 100
    mlx._cache.clear()
    assert text_of(again) == text_of(run(mlx, ask(3, "y" * 300))[3])


def test_requests_beyond_the_rows_are_queued(mlx: MLXEngine) -> None:
    answers = run(mlx, *(ask(n, f"question {n}", max_tokens=5) for n in range(1, 13)))
    assert all(done_of(a).completion_tok <= 5 for a in answers.values())
    assert mlx.report().queue_max >= 8
    assert (len(mlx._rows.by_id), mlx._rows.waiting, mlx._rows.prefilling, [b.rows for b in mlx._rows.batches]) == (
        0,
        [],
        [],
        [{}],
    )


def scored_of(answers: list[Frame]) -> list[Scored]:
    return [s for a in answers if isinstance(a, Tokens) for s in a.scored]


def test_log_probabilities_belong_to_the_sampled_token(mlx: MLXEngine) -> None:
    answers = run(mlx, ask(1, logprobs=3), ask(2, "company"))
    scored = scored_of(answers[1])
    assert done_of(answers[1]).completion_tok == len(scored)
    assert b"".join(s.chosen.raw for s in scored).decode("utf-8", "replace") == text_of(answers[1])
    for one in scored:
        assert one.chosen == one.top[0], "greedy takes the likeliest"
        assert [c.logprob for c in one.top] == sorted((c.logprob for c in one.top), reverse=True)
        assert sum(2.718281828**c.logprob for c in one.top) <= 1.0001
    assert not scored_of(answers[2])


def test_penalties_and_bias_affect_one_row_only(mlx: MLXEngine) -> None:
    plain = text_of(run(mlx, ask(1))[1])
    banned = ord("a") - 33  # the tiny tokenizer's alphabet begins at "!"
    mixed = run(mlx, ask(2), ask(3, logit_bias=((banned, 100.0),)), ask(4, presence_penalty=2.0, frequency_penalty=2.0))
    assert plain == text_of(mixed[2])
    assert {"a"} == set(text_of(mixed[3]))
    refused = submit(mlx, ask(5, logit_bias=((10**6, 1.0),)))
    assert isinstance(refused, Failed)
    assert (refused.code, refused.param) == ("invalid_value", "logit_bias")


def test_penalties_match_openai() -> None:
    """logit - count x frequency - presence, over generated tokens: the prompt (here 1 and 2) is exempt."""
    import mlx.core as mx

    from agent.loader.mlx.sampling import penalty

    changed: Any = penalty(0.5, 0.25, 2)(mx.array([1, 2, 5, 5, 7]), mx.zeros((1, 9))).tolist()
    assert changed == [[0, 0, 0, 0, 0, -1.25, 0, -0.75, 0]]
    assert penalty(1.0, 1.0, 2)(mx.array([1, 2]), mx.zeros((1, 3))).tolist() == [[0, 0, 0]]


def random_schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "boolean", "string", "enum", "null"] + (["object", "array"] if depth < 2 else [])
    match dice.choice(kinds) if depth else "object":
        case "object":
            names = [f"k{n}" for n in range(dice.randint(1, 3))]
            inner = {name: random_schema(dice, depth + 1) for name in names}
            return {"type": "object", "properties": inner, "required": names, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": random_schema(dice, depth + 1), "minItems": 1, "maxItems": 2}
        case "string":
            return {"type": "string", "maxLength": dice.randint(1, 4)}
        case "integer":
            return {"type": "integer", "minimum": 0, "maximum": dice.randint(1, 99)}
        case "enum":
            return {"enum": dice.sample(["red", "green", 7, None, True], 2)}
        case kind:
            return {"type": kind}


def test_random_schemas_in_batches_are_satisfied(mlx: MLXEngine) -> None:
    """A model with random weights never produces JSON without a grammar."""
    dice = random.Random(11)
    schemas = [random_schema(dice) for _ in range(24)]
    for begin in range(0, len(schemas), 8):
        requests = [
            ask(n, schema=json.dumps(schemas[n]), max_tokens=420, temperature=0.8, seed=n)
            for n in range(begin, begin + 8)
        ]
        for number, answers in run(mlx, *requests).items():
            assert done_of(answers).finish == "stop"
            jsonschema.validate(json.loads(text_of(answers)), schemas[number])


def test_a_schema_survives_a_rebuilt_batch(mlx: MLXEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}}, "required": ["a"]}
    request = ask(
        1, schema=json.dumps({**schema, "additionalProperties": False}), max_tokens=300, temperature=0.7, seed=3
    )
    whole = text_of(run(mlx, request)[1])
    got: list[Frame] = [submit(mlx, request)]
    for _ in range(6):
        got += mlx.step()

    def broken(chunk_tok: int) -> None:
        raise RuntimeError("as if a row had broken the batch")

    mlx._rows.batches[0].step = broken  # type: ignore[method-assign, assignment]
    while mlx.busy:
        got += mlx.step()
    assert whole == text_of(got)
    jsonschema.validate(json.loads(whole), schema)


@pytest.mark.parametrize(
    "schema", ['{"type": "objekt"}', '{"type": "string", "pattern": "("}', '{"$ref": "#/nowhere"}']
)
def test_an_unsupported_schema_is_rejected_by_name(mlx: MLXEngine, schema: str) -> None:
    refused = submit(mlx, ask(1, schema=schema))
    assert isinstance(refused, Failed)
    assert (refused.code, refused.param) == ("invalid_value", "response_format")
    assert not mlx.busy
    assert text_of(run(mlx, ask(2))[2])


def test_an_object_of_a_thousand_optional_properties_can_be_written(mlx: MLXEngine) -> None:
    schema = {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1000)}}
    answers = run(mlx, ask(1, schema=json.dumps(schema), max_tokens=40))[1]
    assert done_of(answers).finish in ("stop", "length")


def test_a_grammar_is_compiled_before_the_engine_has_it(mlx: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compiled(tokenizer: LLTokenizer, grammar: str, **settings: Any) -> LLMatcher:
        made.append(grammar)
        return LLMatcher(tokenizer, grammar, **settings)

    monkeypatch.setattr("agent.loader.mlx.model.LLMatcher", compiled)
    prepared = mlx.prepare(ask(1, schema='{"type": "object", "properties": {"a": {"type": "integer"}}}'))
    assert not isinstance(prepared, Failed)
    before = len(made)
    mlx.submit(prepared)
    while mlx.busy:
        mlx.step()
    assert (before, len(made)) == (1, 1)


def test_no_schema_ends_the_loader(mlx: MLXEngine) -> None:
    deep = '{"type": "object", "properties": {"a": ' * 200 + '{"type": "integer"}' + "}}" * 200
    for schema in (deep, "[]", "true", "not json", '{"type": "object", "properties": 5}', '{"enum": []}'):
        answer = submit(mlx, ask(1, schema=schema, max_tokens=3))
        assert isinstance(answer, Accepted | Failed), schema
        mlx.cancel(1)
    assert text_of(run(mlx, ask(2))[2])


def test_a_raw_prompt_is_not_templated(mlx: MLXEngine) -> None:
    plain = Generate(id=1, model="m", prompt="hello", max_tokens=4, temperature=0.0)
    empty = Generate(id=2, model="m", prompt="", max_tokens=4, temperature=0.0)
    answers = run(mlx, plain, empty)
    assert (done_of(answers[1]).prompt_tok, done_of(answers[2]).prompt_tok) == (5, 1)
    assert done_of(answers[2]).completion_tok == 4
