"""How a row's next token is sampled: filters, penalties, masks and sizes of vectors."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.loader.mlx import constraint, sampling
from agent.loader.mlx.constraint import too_complex
from agent.loader.mlx.encoder import EncoderEngine
from agent.loader.mlx.engine import MLXEngine
from agent.loader.mlx.pooling import EmbeddingQueue
from agent.wire.frames import Accepted, Done, Embed, Embedded, Failed, Frame, Generate, Message, Tokens


def ask(number: int = 1, **more: Any) -> Generate:
    message = Message(role="user", content="hello there")
    return Generate(id=number, model="m", messages=(message,), **{"max_tokens": 12, **more})


def kept(request: Generate, probabilities: Sequence[float]) -> list[int]:
    """Tokens that the filters leave."""
    found: Any = sampling.filtered(request, mx.log(mx.array([probabilities]))).tolist()
    return [token for token, value in enumerate(found[0]) if value > -math.inf]


@pytest.mark.parametrize(
    ("more", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 2, 3]),  # two are equally likely: both stay
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.5}, [1, 3]),
        ({"min_p": 0.24}, [0, 1, 2, 3]),
        ({"min_p": 0.5, "temperature": 2.0}, [0, 1, 2, 3]),  # the temperature comes first
        ({"top_p": 0.5}, [1, 3]),
        ({"top_k": 2, "top_p": 0.55}, [1]),  # top_p of what top_k left
        ({"top_p": 0.6, "min_p": 0.9}, [1]),
        ({"top_k": 1, "top_p": 0.0, "min_p": 1.0}, [1]),
    ],
)
def test_filters_keep_the_likeliest(more: dict[str, Any], left: list[int]) -> None:
    assert kept(ask(**more), [0.12, 0.44, 0.12, 0.3, 0.02]) == left


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.floats(-20, 5), min_size=2, max_size=40),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.01, 2),
)
def test_the_likeliest_token_always_stays(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    request = ask(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    raw = mx.array([logits])
    found: Any = sampling.filtered(request, raw - mx.logsumexp(raw))
    values = np.asarray(found)[0]
    assert values[int(np.argmax(np.asarray(logits, dtype=np.float32)))] > -math.inf
    assert not np.isnan(values).any()


@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}])
def test_a_draw_depends_on_seed_and_position_alone(more: dict[str, Any]) -> None:
    logprobs = mx.log(mx.softmax(mx.arange(40).astype(mx.float32) / 9)).reshape(1, -1)

    def drawn(position: int, count: int, seed: int = 7) -> list[int]:
        sample = sampling.sampler(ask(seed=seed, **more), position)
        assert sample is not None
        return [sample(logprobs).tolist()[0] for _ in range(count)]  # type: ignore[index,misc]

    whole = drawn(0, 12)
    assert drawn(5, 7) == whole[5:], "as after a failover"
    assert drawn(0, 12, seed=8) != whole
    assert sampling.sampler(ask(temperature=0.0), 0) is None


def test_a_repetition_penalty_covers_prompt_and_answer() -> None:
    def changed(factor: float, window_tok: int) -> list[float]:
        found: Any = sampling.repetition(factor, window_tok)(mx.array([1, 2, 2, 3]), mx.array([[4.0, 4.0, -4.0, 4.0]]))
        return list(found.tolist()[0])

    assert changed(2.0, 0) == [4.0, 2.0, -8.0, 2.0]
    assert changed(2.0, 2) == [4.0, 4.0, -8.0, 2.0]
    assert changed(2.0, 99) == changed(2.0, 0)
    assert changed(0.5, 1) == [4.0, 4.0, -4.0, 8.0]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[MLXEngine]:
    made = MLXEngine(str(tiny_model), rows=4, prefill_chunk_tok=32)
    yield made
    made.close()


def run(engine: MLXEngine | EncoderEngine, *requests: Generate | Embed) -> dict[int, list[Frame]]:
    got: dict[int, list[Frame]] = {request.id: [] for request in requests}
    for request in requests:
        prepared = engine.prepare(request)
        got[request.id].append(prepared if isinstance(prepared, Failed) else engine.submit(prepared))
    while engine.busy:
        for frame in engine.step():
            got[frame.id].append(frame)  # type: ignore[union-attr]
    return got


def ids(frames: list[Frame]) -> list[int]:
    return [token for frame in frames if isinstance(frame, Tokens) for token in frame.ids]


def test_ignore_eos_answers_until_max_tokens(engine: MLXEngine) -> None:
    (end,) = engine._model.ends
    wants_to_end = ((end, 100.0),)
    answers = run(engine, ask(1, logit_bias=wants_to_end), ask(2, logit_bias=wants_to_end, ignore_eos=True))
    first, second = answers[1][-1], answers[2][-1]
    assert isinstance(first, Done)
    assert isinstance(second, Done)
    assert (first.finish, first.completion_tok) == ("stop", 1)
    assert (second.finish, second.completion_tok) == ("length", 12)
    assert end not in ids(answers[2])
    schema = ask(3, schema='{"type": "object", "additionalProperties": false}', ignore_eos=True, max_tokens=60)
    (*_, done) = run(engine, schema)[3]
    assert isinstance(done, Done)
    assert done.finish == "stop", "what is complete can only end"


def test_sampling_fields_affect_their_own_row_alone(engine: MLXEngine) -> None:
    greedy = ids(run(engine, ask(1, temperature=0.0))[1])
    mixed = run(
        engine,
        ask(1, temperature=0.0),
        ask(2, temperature=1.0, top_k=1, seed=3),
        ask(3, temperature=1.0, min_p=1.0, seed=4),
        ask(4, temperature=0.0, repetition_penalty=10.0),
    )
    assert ids(mixed[1]) == ids(mixed[2]) == ids(mixed[3]) == greedy
    assert ids(mixed[4]) != greedy
    assert ids(mixed[4]) == ids(run(engine, ask(4, temperature=0.0, repetition_penalty=10.0))[4])


class Doubled:
    """Weights whose hidden states are eight wide."""

    layers: tuple[Any, ...] = ()

    def model(self, tokens: mx.array, cache: Any) -> mx.array:
        """Ones."""
        return mx.ones((*tokens.shape, 8))


@pytest.mark.parametrize(("dimensions", "served"), [(None, True), (8, True), (4, False), (16, False)])
def test_a_text_model_s_vectors_have_their_own_size(dimensions: int | None, served: bool) -> None:
    queue = EmbeddingQueue(Doubled())
    queue.take(1, [[1, 2], [3]], dimensions)
    frames: list[Frame] = []
    while queue.busy:
        frames += queue.step(lambda _: 8)
    if served:
        assert [type(frame) for frame in frames] == [Embedded, Embedded, Done]
    else:
        (refusal,) = frames
        assert isinstance(refusal, Failed)
        assert (refusal.code, refusal.param) == ("invalid_value", "dimensions")
        assert "have 8 numbers" in refusal.message


def test_an_encoder_s_vectors_have_their_own_size(tmp_path: Path, tiny_model: Path) -> None:
    encoder = EncoderEngine(str(_tiny_encoder(tmp_path / "bert", tiny_model)))
    own = run(encoder, Embed(id=1, model="e", inputs=("a",), dimensions=8))[1]
    assert [type(frame) for frame in own[1:]] == [Embedded, Done]
    (refusal,) = run(encoder, Embed(id=2, model="e", inputs=("a",), dimensions=9))[2]
    assert isinstance(refusal, Failed)
    assert (refusal.code, refusal.param) == ("invalid_value", "dimensions")
    encoder.close()


def _tiny_encoder(folder: Path, tokenizer_of: Path) -> Path:
    """A BERT-class encoder of width 8 with random weights, under the names that Hugging Face uses."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_of / "tokenizer.json").read_bytes())
    size, inner, vocabulary = 8, 16, 512
    config = {"model_type": "bert", "hidden_size": size, "num_attention_heads": 2, "intermediate_size": inner}
    config |= {"num_hidden_layers": 1, "vocab_size": vocabulary, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, size),
        "embeddings.position_embeddings.weight": (32, size),
        "embeddings.token_type_embeddings.weight": (2, size),
        "embeddings.LayerNorm.weight": (size,),
        "embeddings.LayerNorm.bias": (size,),
    }
    layer = "encoder.layer.0."
    linear = {"attention.self.query": (size, size), "attention.self.key": (size, size)}
    linear |= {"attention.self.value": (size, size), "attention.output.dense": (size, size)}
    linear |= {"intermediate.dense": (inner, size), "output.dense": (size, inner)}
    for name, shape in linear.items():
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes |= {f"{layer}{name}.weight": (size,), f"{layer}{name}.bias": (size,)}
    arrays = {name: mx.random.normal(shape, key=mx.random.key(n)) for n, (name, shape) in enumerate(shapes.items())}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


COMPLEX = {"alternatives": "(a|b)?" * 1500, "options": "a?" * 3000}
"""What llguidance finds too complex, even for a vocabulary of single bytes."""


@pytest.mark.parametrize("where", ["answer", "property"])
@pytest.mark.parametrize("which", COMPLEX)
def test_a_pattern_that_is_too_complex_to_follow_is_refused(engine: MLXEngine, which: str, where: str) -> None:
    text = {"type": "string", "pattern": f"^{COMPLEX[which]}$"}
    tree = {"type": "object", "properties": {"p": text}, "required": ["p"], "additionalProperties": False}
    answers = run(engine, ask(1, schema=json.dumps(text if where == "answer" else tree), max_tokens=60))[1]
    _check_too_complex(answers[-1])
    assert where == "property" or len(answers) == 1, "found in preparation"


def test_a_pattern_that_is_too_complex_in_the_answer_ends_that_one_alone(
    engine: MLXEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every such pattern shows it in the first steps."""
    monkeypatch.setattr(constraint, "_TRIAL_STEPS", 0)
    schema = json.dumps({"type": "string", "pattern": f"^{COMPLEX['alternatives']}$"})
    answers = run(engine, ask(1, schema=schema, max_tokens=60), ask(2, ignore_eos=True))
    assert isinstance(answers[1][0], Accepted), "it begins"
    _check_too_complex(answers[1][-1])
    done = answers[2][-1]
    assert isinstance(done, Done)
    assert done.completion_tok == 12


def test_the_place_of_a_schema_that_is_too_complex_is_named() -> None:
    assert too_complex(ask(1, schema="{}")).param == "response_format"
    assert too_complex(ask(1, tools=("{}",))).param == "tools"


def _check_too_complex(failed: Frame) -> None:
    assert isinstance(failed, Failed)
    assert (failed.code, failed.param, failed.retryable) == ("invalid_value", "response_format", False)
    assert "too complex to enforce; simplify its patterns" in failed.message


def test_patterns_that_can_be_followed_are(engine: MLXEngine) -> None:
    for pattern in ("^[a-z]{3,20}$", "^a?$", "^[^@]{1,9}@[^@]{1,9}$", "^(a|b)?c$", ""):
        schema = json.dumps({"type": "string", "pattern": pattern, "maxLength": 20})
        (last,) = run(engine, ask(1, schema=schema, max_tokens=80))[1][-1:]
        assert isinstance(last, Done), (pattern, last)
