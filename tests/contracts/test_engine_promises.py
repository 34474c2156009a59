"""Guarantees of the MLX engine under load, on tiny real models: prefix sharing, memory, cancellation, odd models."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import msgspec
import pytest
from mlx_lm.generate import BatchGenerator

from agent.loader.disk_cache import BLOCK_TOK, DiskCache
from agent.loader.mlx import entries
from agent.loader.mlx.engine import MLXEngine
from agent.wire.frames import Accepted, Done, Embed, Embedded, Failed, Frame, Generate, Message, Tokens
from tests.contracts.test_engine import ask, done_of, random_schema, run, submit, text_of
from tests.tiny_model import MAMBA, SLIDING, THINKING, write_tiny_model

SYSTEM = "You answer in one word, and never twice the same one. " * 12


@pytest.fixture
def mlx(tiny_model: Path) -> Iterator[MLXEngine]:
    made = MLXEngine(str(tiny_model), rows=4, prefill_chunk_tok=64, cache_bytes=8 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a context for long prompts."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    write_tiny_model(folder, seed=2, config={"max_position_embeddings": 8192})
    return folder


def shared(number: int) -> Generate:
    return Generate(
        id=number,
        model="m",
        prompt=SYSTEM + f"{chr(65 + number)} question of its own, number {number}",
        max_tokens=6,
        temperature=0.0,
    )


@pytest.mark.parametrize("together", [False, True], ids=["in sequence", "all at once"])
def test_twenty_requests_compute_a_shared_prefix_once(roomy_model: Path, together: bool) -> None:
    cold = MLXEngine(str(roomy_model), rows=20, prefill_chunk_tok=256)
    expected = {n: text_of(run(cold, shared(n))[n]) for n in range(20)}
    cold.close()
    warm = MLXEngine(str(roomy_model), rows=20, prefill_chunk_tok=256, cache_bytes=64 << 20)
    requests = [shared(n) for n in range(20)]
    got = run(warm, *requests) if together else {r.id: run(warm, r)[r.id] for r in requests}
    report = warm.report()
    warm.close()
    assert expected == {n: text_of(answers) for n, answers in got.items()}
    assert (report.cache_hits, report.cache_misses) == (19, 1)
    prefix = len(SYSTEM)
    assert sorted(done_of(a).cached_tok >= prefix for a in got.values()) == [False] + [True] * 19
    assert report.prefill_tok < prefix + 64 + 20 * 40


def test_a_running_request_shares_its_prefix(roomy_model: Path) -> None:
    engine = MLXEngine(str(roomy_model), rows=4, prefill_chunk_tok=1024, cache_bytes=64 << 20)
    long = Generate(id=1, model="m", prompt=SYSTEM + "first", max_tokens=60, temperature=0.0)
    submit(engine, long)
    for _ in range(5):
        engine.step()
    submit(engine, shared(2))
    (second,) = [a for _ in range(12) for a in engine.step() if isinstance(a, Done)]
    engine.close()
    assert second.id == 2, "the first still runs"
    assert second.cached_tok >= len(SYSTEM)


@pytest.fixture(scope="module")
def heavy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose weights weigh as much as many tokens, as those of real models do."""
    folder = tmp_path_factory.mktemp("models") / "heavy"
    write_tiny_model(folder, seed=2, config={"max_position_embeddings": 2048, "intermediate_size": 4096})
    return folder


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
def test_short_prompts_go_on_beside_one_that_takes_most_of_the_memory(heavy_model: Path, phase: str) -> None:
    """Counted in steps: a starved machine makes them longer, not more."""
    engine = MLXEngine(str(heavy_model), rows=4, prefill_chunk_tok=32, cache_bytes=8 << 20, kv_tok=2048)
    assert engine._scheduler.limits.weights_tok > 4096, "joining the long one would be cheapest"
    submit(engine, Generate(id=1, model="m", prompt="x" * 1100, max_tokens=None, temperature=0.0, ignore_eos=True))
    engine.step()
    while phase == "decoding" and not any(isinstance(a, Tokens) for a in engine.step()):
        pass
    row = engine._rows.by_id[1]
    row.since_s, row.joined_s = row.since_s - 1e5, row.joined_s - 1e5  # it has been computed for very long
    for number in range(2, 6):
        submit(engine, Generate(id=number, model="m", prompt=f"question {number}", max_tokens=4, temperature=0.0))
        steps = 1
        while not any(isinstance(a, Done) and a.id == number for a in engine.step()):
            steps += 1
            assert steps < 12, "it waits for the long one"
        assert row.id in engine._rows.by_id, "which is still there"
    before = row.length_tok - row.left_tok
    for _ in range(4):
        engine.step()
    assert row.length_tok - row.left_tok > before, "and goes on"
    engine.close()


def test_cache_bytes_match_measured_memory(roomy_model: Path) -> None:
    """MLX's memory with a full cache less that without it, against the cache's own accounting."""
    engine = MLXEngine(str(roomy_model), rows=8, prefill_chunk_tok=256, cache_bytes=6 << 20)
    before = mx.get_active_memory()
    for begin in range(0, 96, 8):
        run(engine, *(shared(n) for n in range(begin, begin + 8)))
        run(engine, *(ask(n, f"{n} " * (20 + n), max_tokens=9) for n in range(begin, begin + 8)))
    report = engine.report()
    held = mx.get_active_memory() - before
    engine.close()
    assert report.cache_evictions > 0, "the budget was reached"
    assert report.cache_bytes <= 6 << 20
    assert held <= 1.05 * report.cache_bytes


def test_rows_of_unequal_length_do_not_pay_for_padding(roomy_model: Path) -> None:
    """One prompt of 4,096 tokens beside seven of 8: peak bytes of keys and values over all batches."""
    prompts = ["x" * 4096] + [f"{n}" * 8 for n in range(7)]
    engine = MLXEngine(str(roomy_model), rows=8, prefill_chunk_tok=512, kv_tok=64 * 1024)
    for number, prompt in enumerate(prompts):
        submit(engine, Generate(id=number, model="m", prompt=prompt, max_tokens=8, temperature=0.0))
    ends: list[int] = []
    peak = 0
    while engine.busy:
        ends += [a.id for a in engine.step() if isinstance(a, Done)]
        peak = max(peak, engine._rows.kv_bytes)
    engine.close()
    each = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    total_tok = sum(len(prompt) + 8 for prompt in prompts)
    assert peak <= 1.5 * total_tok * each
    assert ends[-1] == 0, "the short ones ended first"
    assert peak <= _peak_of_one_batch(engine, prompts) / 4


def _peak_of_one_batch(engine: MLXEngine, prompts: list[str]) -> int:
    """The same prompts in one batch with mlx-lm's own settings."""
    model = engine._model
    batch: Any = BatchGenerator(model.weights, stop_tokens=[[t] for t in model.ends])
    batch.insert([model.encode(prompt) for prompt in prompts], max_tokens=[8] * len(prompts))
    left, peak = len(prompts), 0
    while left:
        _, generated = batch.next()
        left -= sum(response.finish_reason is not None for response in generated)
        peak = max(peak, batch.prompt_cache_nbytes)
    batch.close()
    return peak


def test_rows_that_outgrow_memory_wait_and_give_the_same_answer(roomy_model: Path) -> None:
    requests = [ask(n, f"question {n} " * 12, max_tokens=300, temperature=0.7, seed=n) for n in range(4)]
    ample = MLXEngine(str(roomy_model), rows=4, prefill_chunk_tok=256)
    expected = {r.id: text_of(run(ample, r)[r.id]) for r in requests}
    ample.close()
    tight = MLXEngine(str(roomy_model), rows=4, prefill_chunk_tok=256, kv_tok=1536, cache_bytes=8 << 20)
    each = 2 * 2 * 2 * 16 * 4
    got: dict[int, list[Frame]] = {r.id: [submit(tight, r)] for r in requests}
    while tight.busy:
        for answer in tight.step():
            got[answer.id].append(answer)  # type: ignore[union-attr]
        assert tight._rows.kv_bytes <= (1536 + 4 * 256) * each, "one step may pass the bound before it is seen"
    report = tight.report()
    tight.close()
    assert expected == {n: text_of(a) for n, a in got.items()}
    assert report.cached_tok >= 0


def test_two_hundred_random_cancels_leave_nothing(mlx: MLXEngine) -> None:
    dice = random.Random(5)
    alive: set[int] = set()
    ended = 0
    number = 0
    while number < 200 or alive:
        while number < 200 and len(alive) < 12:
            text = (
                SYSTEM[: dice.randint(1, 380)] if dice.random() < 0.5 else chr(97 + number % 26) * dice.randint(1, 300)
            )
            assert isinstance(submit(mlx, ask(number, text, max_tokens=dice.randint(1, 40))), Accepted)
            alive.add(number)
            number += 1
        for answer in mlx.step():
            if isinstance(answer, Done | Failed):
                assert isinstance(answer, Done)
                alive.discard(answer.id)
                ended += 1
        for victim in [one for one in alive if dice.random() < 0.15]:
            mlx.cancel(victim)
            alive.discard(victim)
            assert victim not in mlx._rows.by_id
        running = [row.id for batch in mlx._rows.batches for row in batch.rows.values()]
        waiting = [row.id for row in mlx._rows.waiting]
        assert sorted(running + waiting) == sorted(alive) == sorted(mlx._rows.by_id)
        assert {row.id for row in mlx._rows.prefilling} <= set(running)
    assert 0 < ended < 200
    assert not mlx.busy
    mlx.step()
    assert (mlx._rows.kv_bytes, mlx._rows.waiting, mlx._rows.prefilling) == (0, [], [])
    assert text_of(run(mlx, ask(999))[999])


def test_fifty_random_schemas_in_batches_of_eight(tiny_model: Path) -> None:
    """Random weights never produce JSON without a grammar."""
    engine = MLXEngine(str(tiny_model), rows=8, prefill_chunk_tok=64)
    dice = random.Random(23)
    schemas = [random_schema(dice) for _ in range(50)]
    for begin in range(0, 50, 8):
        batch = range(begin, min(begin + 8, 50))
        requests = [ask(n, schema=json.dumps(schemas[n]), max_tokens=420, temperature=0.8, seed=n) for n in batch]
        for number, answers in run(engine, *requests).items():
            assert done_of(answers).finish == "stop"
            jsonschema.validate(json.loads(text_of(answers)), schemas[number])
    engine.close()


def test_a_stop_string_never_leaks_and_costs_at_most_one_token(mlx: MLXEngine) -> None:
    """The tiny tokenizer has a token per byte, so a stop string is split at each of its characters in turn."""
    whole = text_of(run(mlx, ask(1, max_tokens=40))[1])
    for number, (begin, length) in enumerate([(b, n) for b in range(2, 30, 3) for n in (1, 2, 5, 9)], start=2):
        stop = whole[begin : begin + length]
        answers = run(mlx, ask(number, max_tokens=40, stop=(stop,)))[number]
        at = whole.index(stop)
        assert text_of(answers) == whole[:at]
        assert done_of(answers).finish == "stop"
        needed = len((whole[: at + length]).encode())
        assert done_of(answers).completion_tok <= needed + 1


def test_a_row_whose_logits_processor_raises_fails_alone(mlx: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask(n, f"question {n}", max_tokens=20) for n in (1, 2, 3)]
    alone = {r.id: text_of(run(mlx, r)[r.id]) for r in requests}
    plain = entries.processors

    def with_one_that_raises(model: Any, row: Any) -> list[Any]:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if len(tokens) > len(row.prompt) + 4:
                raise RuntimeError("as a grammar might")
            return logits

        return [process] if row.id == 9 else plain(model, row)

    monkeypatch.setattr(entries, "processors", with_one_that_raises)
    got = run(mlx, *requests[:2], ask(9, "the bad one", max_tokens=20), requests[2])
    assert alone == {n: text_of(got[n]) for n in (1, 2, 3)}
    assert isinstance(got[9][-1], Failed)
    assert mlx.report().rebuilds == 0


@pytest.mark.parametrize("config", [MAMBA, SLIDING], ids=["recurrent", "sliding"])
def test_models_with_untrimmable_state(tmp_path: Path, config: dict[str, Any]) -> None:
    """The same text alone, in a batch, after a cache hit and cold; a prompt extending an earlier answer is a hit."""
    write_tiny_model(tmp_path / "odd", seed=3, config=config)
    cold = MLXEngine(str(tmp_path / "odd"), rows=4, prefill_chunk_tok=32)
    requests = [ask(n, f"question {n} " * (n + 1), max_tokens=10) for n in range(4)]
    alone = {r.id: text_of(run(cold, r)[r.id]) for r in requests}
    cold.close()
    warm = MLXEngine(str(tmp_path / "odd"), rows=4, prefill_chunk_tok=32, cache_bytes=8 << 20)
    assert alone == {n: text_of(a) for n, a in run(warm, *requests).items()}
    first = Generate(id=5, model="m", prompt="once upon a time", max_tokens=8, temperature=0.0)
    answer = run(warm, first)[5]
    go_on = Generate(
        id=6, model="m", prompt=f"once upon a time{text_of(answer)} and then", max_tokens=8, temperature=0.0
    )
    hit = run(warm, go_on)[6]
    warm._cache.clear()
    assert text_of(hit) == text_of(run(warm, go_on)[6])
    assert warm.report().cache_hits >= (1 if text_of(answer).isascii() else 0)
    warm.close()


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "thinking"
    write_tiny_model(folder, seed=4, template=THINKING, thinks=True, config={"vocab_size": 264})
    return folder


END_OF_THOUGHT = 259


def test_reasoning_is_separated_and_counted(thinking_model: Path) -> None:
    engine = MLXEngine(str(thinking_model), rows=2)
    thought = run(engine, ask(1, max_tokens=9))[1]
    ends_at_once = run(engine, ask(2, max_tokens=9, logit_bias=((END_OF_THOUGHT, 100.0),)))[2]
    silent = run(engine, ask(3, max_tokens=9, reasoning_effort="none"))[3]
    engine.close()
    assert (text_of(thought), done_of(thought).reasoning_tok) == ("", 9)
    assert "".join(a.reasoning for a in thought if isinstance(a, Tokens))
    assert done_of(ends_at_once).reasoning_tok == 1
    assert done_of(silent).reasoning_tok == 0
    assert text_of(silent)


def test_a_schema_holds_after_the_reasoning(thinking_model: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    engine = MLXEngine(str(thinking_model), rows=2)
    request = ask(
        1,
        max_tokens=40,
        schema=json.dumps(schema),
        template_args='{"enable_thinking": true}',
        logit_bias=((END_OF_THOUGHT, 100.0),),
    )
    answers = run(engine, request)[1]
    engine.close()
    jsonschema.validate(json.loads(text_of(answers)), schema)


def test_a_model_without_reasoning_reports_it(mlx: MLXEngine) -> None:
    refused = submit(mlx, ask(1, reasoning_effort="high"))
    assert isinstance(refused, Failed)
    assert (refused.code, refused.param) == ("unsupported_parameter", "reasoning_effort")
    assert done_of(run(mlx, ask(2, reasoning_effort="none"))[2])


def test_a_tool_call_can_be_required(roomy_model: Path) -> None:
    mlx = MLXEngine(str(roomy_model), rows=4)
    parameters = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tools = tuple(json.dumps({"name": name, "parameters": parameters}) for name in ("left", "right"))
    answers = run(mlx, ask(1, max_tokens=90, tools=tools, must_call="", temperature=0.9, seed=1), ask(2, "company"))[1]
    (call,) = [call for a in answers if isinstance(a, Tokens) for call in a.calls]
    assert (call.name in ("left", "right"), done_of(answers).finish, text_of(answers)) == (True, "tool_calls", "")
    jsonschema.validate(json.loads(call.arguments), parameters)
    named = run(mlx, ask(3, max_tokens=90, tools=tools, must_call="right"))[3]
    mlx.close()
    assert [c.name for a in named if isinstance(a, Tokens) for c in a.calls] == ["right"]


def test_embeddings_are_computed_beside_answers(mlx: MLXEngine) -> None:
    alone = text_of(run(mlx, ask(1))[1])
    embed = Embed(id=7, model="m", inputs=("a text", "another text of more tokens " * 4, (1, 2, 3)))
    frames: dict[int, list[Frame]] = {1: [submit(mlx, ask(1))], 7: [submit(mlx, embed)]}
    while mlx.busy:
        for answer in mlx.step():
            frames[answer.id].append(answer)  # type: ignore[union-attr]
    assert alone == text_of(frames[1])
    accepted, *embedded, done = frames[7]
    assert isinstance(accepted, Accepted)
    assert isinstance(done, Done)
    vectors = [v for frame in embedded if isinstance(frame, Embedded) for v in frame.vectors]
    assert (len(vectors), {len(v) for v in vectors}) == (3, {64 * 4})
    assert done.prompt_tok == accepted.prompt_tok
    for inputs in (("",), ((10**6,),), ("x" * 600,)):
        refused = submit(mlx, Embed(id=8, model="m", inputs=inputs))
        assert isinstance(refused, Failed) or inputs == ("",)
        mlx.cancel(8)
    assert not mlx.busy


def test_a_prompt_of_ten_megabytes_is_refused_at_once(mlx: MLXEngine) -> None:
    huge = Generate(id=1, model="m", messages=(Message(role="user", content="x" * (10 << 20)),), max_tokens=5)
    refused = submit(mlx, huge)
    assert isinstance(refused, Failed)
    assert refused.code == "context_length_exceeded"


def test_a_configuration_that_only_mlx_lm_reads_loads(tmp_path: Path) -> None:
    pattern = {"model_type": "exaone4", "head_dim": 16, "sliding_window": 24, "sliding_window_pattern": "LLLG"}
    write_tiny_model(tmp_path / "m", seed=1, config={**pattern, "num_hidden_layers": 4, "rope_scaling": None})
    engine = MLXEngine(str(tmp_path / "m"))
    assert done_of(run(engine, ask(1))[1]).completion_tok
    engine.close()


def test_unequal_prompts_of_a_recurrent_model_are_not_mixed(tmp_path: Path) -> None:
    """Some recurrent models read the padding of a shorter prompt as text."""
    write_tiny_model(tmp_path / "odd", seed=8, config=MAMBA)
    engine = MLXEngine(str(tmp_path / "odd"), rows=4, prefill_chunk_tok=512)
    requests = [ask(n, "word " * (1 + 5 * n), max_tokens=10) for n in range(4)]
    alone = {r.id: text_of(run(engine, r)[r.id]) for r in requests}
    assert alone == {n: text_of(a) for n, a in run(engine, *requests).items()}
    engine.close()


def test_an_odd_kv_budget_still_admits(roomy_model: Path) -> None:
    engine = MLXEngine(str(roomy_model), rows=1, kv_tok=1000, prefill_chunk_tok=256)
    answers = run(engine, Generate(id=1, model="m", prompt="x" * 890, max_tokens=90, temperature=0.0))[1]
    engine.close()
    assert done_of(answers).prompt_tok == 890


@pytest.mark.parametrize("more", [{"top_p": 0.0, "temperature": 1.0}, {"temperature": 1e-6}, {"temperature": 1e-300}])
def test_sampling_with_one_candidate_is_greedy(mlx: MLXEngine, more: dict[str, Any]) -> None:
    greedy = text_of(run(mlx, ask(1))[1])
    assert {greedy} == {text_of(run(mlx, ask(n, seed=n, **more))[n]) for n in range(2, 6)}


def test_user_text_does_not_open_reasoning(thinking_model: Path) -> None:
    engine = MLXEngine(str(thinking_model), rows=2)
    quoted = ask(1, "what does <think> mean", max_tokens=9, template_args='{"enable_thinking": false}')
    answers = run(engine, quoted)[1]
    continued = Generate(id=2, model="m", prompt="<think> is a tag", max_tokens=9, temperature=0.0)
    plain = run(engine, continued)[2]
    engine.close()
    assert (done_of(answers).reasoning_tok, done_of(plain).reasoning_tok) == (0, 0)
    assert text_of(answers)
    assert text_of(plain)


def test_a_model_may_reason_before_a_tool_call(thinking_model: Path) -> None:
    tool = json.dumps({"name": "f", "parameters": {"type": "object", "properties": {}}})
    engine = MLXEngine(str(thinking_model), rows=2)
    begin_thought = 258
    off = '{"enable_thinking": false}'
    thought = run(
        engine,
        ask(1, max_tokens=4, tools=(tool,), template_args=off, logit_bias=((begin_thought, 100.0),)),
        ask(2, max_tokens=4, tools=(tool,), template_args=off),
    )
    engine.close()
    assert done_of(thought[1]).reasoning_tok == 3, "all that followed the mark"
    assert done_of(thought[2]).reasoning_tok == 0


def test_a_continued_text_keeps_its_white_space(mlx: MLXEngine) -> None:
    space = 220  # the byte-level alphabet puts the space there
    request = Generate(id=1, model="m", prompt="if x:\n", max_tokens=4, logit_bias=((space, 100.0),), temperature=0.0)
    text = text_of(run(mlx, request)[1])
    assert len(text) == 4
    assert len(set(text)) == 1


def test_a_row_with_undecodable_text_fails_alone(mlx: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = text_of(run(mlx, ask(1))[1])
    made = mlx._model.detokenizer

    class Broken:
        last_segment = ""

        def add_token(self, token: int) -> None:
            raise IndexError("no such token")

    served: list[int] = []

    def one_broken(*, trims: bool) -> Any:
        served.append(1)
        return Broken() if len(served) == 2 else made(trims=trims)

    monkeypatch.setattr(mlx._model, "detokenizer", one_broken)
    got = run(mlx, ask(2), ask(3, "the bad one"), ask(4))
    assert plain == text_of(got[2]) == text_of(got[4])
    assert isinstance(got[3][-1], Failed)
    assert not mlx.busy


def test_embeddings_of_long_texts_are_chunked_and_interleaved(roomy_model: Path) -> None:
    engine = MLXEngine(str(roomy_model), rows=2, prefill_chunk_tok=128)
    submit(engine, Embed(id=1, model="m", inputs=("x" * 2000, "y" * 2000)))
    submit(engine, Embed(id=2, model="m", inputs=("z" * 100,)))
    ends: list[tuple[int, int]] = []
    steps = 0
    while engine.busy:
        steps += 1
        ends += [(a.id, steps) for a in engine.step() if isinstance(a, Done)]
    engine.close()
    assert [number for number, _ in ends] == [2, 1]
    assert steps >= 2 * 2000 / 128, "no step does all of a long text"


def test_a_fault_in_planning_is_survived(mlx: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = text_of(run(mlx, ask(1, max_tokens=20))[1])
    submit(mlx, ask(2, max_tokens=20))
    got: list[Frame] = [frame for _ in range(3) for frame in mlx.step()]
    plain = mlx._scheduler.make_room
    raised: list[int] = []

    def once() -> None:
        if not raised:
            raised.append(1)
            raise RuntimeError("as if memory had run out")
        plain()

    monkeypatch.setattr(mlx._scheduler, "make_room", once)
    while mlx.busy:
        got += mlx.step()
    assert alone == text_of(got)


def with_disk(model: Path, folder: Path) -> MLXEngine:
    disk = DiskCache(folder, b"a secret of at least thirty-two characters", "v1", 64 << 20)
    disk._queue.maxsize = 0  # a slow disk would drop blocks here, as it should
    return MLXEngine(str(model), rows=2, prefill_chunk_tok=256, cache_bytes=32 << 20, disk=disk)


def test_a_restart_finds_prompts_on_disk(roomy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are read back where that is quicker than prefill, which depends on the machine: here it always is."""
    long = Generate(id=1, model="m", prompt=SYSTEM * 2 + "and so on. " * 60, max_tokens=12, temperature=0.0)
    first = with_disk(roomy_model, tmp_path)
    cold = run(first, long)[1]
    private = msgspec.structs.replace(long, id=2, prompt="secret " * 200, private=True)
    run(first, private)
    first.close()
    second = with_disk(roomy_model, tmp_path)
    monkeypatch.setattr(second._pace.cost, "seconds", lambda *_: 3600.0)
    moved: list[None] = []
    second.prepare(long, lambda: moved.append(None))
    warm = run(second, long)[1]
    report = second.report()
    assert len(moved) > report.disk_restored_tok // BLOCK_TOK > 1, "a block is progress"
    assert text_of(cold) == text_of(warm)
    assert done_of(warm).cached_tok == report.disk_restored_tok >= 0.9 * (done_of(cold).prompt_tok - 256)
    assert done_of(run(second, private)[2]).cached_tok == 0
    second.close()


def test_a_corrupt_cache_file_changes_no_answer(roomy_model: Path, tmp_path: Path) -> None:
    long = Generate(id=1, model="m", prompt=SYSTEM * 3, max_tokens=12, temperature=0.0)
    first = with_disk(roomy_model, tmp_path)
    cold = run(first, long)[1]
    first.close()
    for file in tmp_path.glob("*.kv"):
        file.write_bytes(file.read_bytes()[:1000])
    second = with_disk(roomy_model, tmp_path)
    again = run(second, long)[1]
    second.close()
    assert text_of(cold) == text_of(again)
    assert done_of(again).cached_tok == 0
    assert list((tmp_path / "quarantine").iterdir())


def test_an_answer_ended_by_a_stop_string_is_cached_on_disk(roomy_model: Path, tmp_path: Path) -> None:
    first = with_disk(roomy_model, tmp_path)
    long = Generate(id=1, model="m", prompt=SYSTEM * 2, max_tokens=30, temperature=0.0)
    stop = text_of(run(MLXEngine(str(roomy_model)), long)[1])[5:8]
    answers = run(first, msgspec.structs.replace(long, stop=(stop,)))[1]
    first.close()
    assert done_of(answers).finish == "stop"
    second = with_disk(roomy_model, tmp_path)
    assert done_of(run(second, long)[1]).cached_tok >= 1024
    second.close()


LARGE = "y" * (5 << 20)
HUGE = {
    "a message": {"messages": (Message(role="user", content=LARGE),)},
    "words": {"messages": (Message(role="user", content="ab " * (2 << 20)),)},
    "many messages": {"messages": tuple(Message(role="user", content="z" * 5000) for _ in range(1000))},
    "an earlier answer": {"messages": (Message(role="assistant", content=LARGE), Message(role="user", content="a"))},
    "tools": {
        "messages": (Message(role="user", content="a"),),
        "tools": (json.dumps({"name": "f", "description": LARGE, "parameters": {}}),),
    },
    "a prompt": {"prompt": LARGE},
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_prompt_that_cannot_fit_is_refused_without_being_tokenized(
    mlx: MLXEngine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = mlx._model, 0
    tokenizer, plain = model.tokenizer, type(model.tokenizer).__getattr__

    def counted(held: Any, name: str) -> Any:
        found = plain(held, name)
        if name != "encode" or held is not tokenizer:
            return found

        def encode(text: str, **more: Any) -> Any:
            nonlocal read
            read += len(text)
            return found(text, **more)

        return encode

    monkeypatch.setattr(type(tokenizer), "__getattr__", counted)
    refused = mlx.prepare(Generate(id=1, model="m", max_tokens=4, temperature=0.0, **HUGE[kind]))  # type: ignore[arg-type]
    assert isinstance(refused, Failed)
    assert refused.code == "context_length_exceeded"
    assert read < 64 * model.context_tok, "as far as it takes to know"
    fits = mlx.prepare(Generate(id=2, model="m", max_tokens=4, temperature=0.0, prompt="short"))
    assert not isinstance(fits, Failed)
