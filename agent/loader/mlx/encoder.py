"""A BERT-class encoder in MLX: token ids in, one vector per text out. For embedding-only models.

The layout of the weights and of ``config.json`` is Hugging Face's for ``BertModel`` (Devlin et al. 2018); pooling is
read from the folder's ``1_Pooling/config.json`` as written by sentence-transformers, the mean where there is none.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from tokenizers import Tokenizer

from agent.loader.blas import REFERENCE
from agent.loader.calibration import Task
from agent.loader.counts import Counts
from agent.loader.generation import Advance, Prepared, nothing
from agent.loader.mlx.model import cannot_load, embedding_inputs, never_wire_memory
from agent.loader.mlx.pooling import done, other_size, unit_bytes
from agent.wire.frames import Accepted, Ask, Embed, Embedded, Failed, Frame, Ready, Reported, Working

_KINDS = ("bert",)


def is_encoder(path: str) -> bool:
    """Whether a model folder holds an encoder; False for an unreadable one, which fails with a reason when loaded."""
    try:
        return json.loads((Path(path) / "config.json").read_bytes()).get("model_type") in _KINDS
    except (OSError, ValueError, AttributeError):
        return False


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.heads = heads

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        batch, length, size = x.shape

        def by_head(y: mx.array) -> mx.array:
            return y.reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)

        q, k, v = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=(size // self.heads) ** -0.5, mask=mask)
        return mixed.transpose(0, 2, 1, 3).reshape(batch, length, size)


class _Layer(nn.Module):
    def __init__(
        self, size: int, heads: int, inner: int, eps: float, activation: Callable[[mx.array], mx.array]
    ) -> None:
        super().__init__()
        self.attention = _Attention(size, heads)
        self.attention_out, self.attention_norm = nn.Linear(size, size), nn.LayerNorm(size, eps=eps)
        self.up, self.down, self.norm = nn.Linear(size, inner), nn.Linear(inner, size), nn.LayerNorm(size, eps=eps)
        self._activation = activation

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = self.attention_norm(x + self.attention_out(self.attention(x, mask)))
        return self.norm(x + self.down(self._activation(self.up(x))))


class Bert(nn.Module):
    """The encoder: ids (texts, tokens) and mask (1 where there is a token) -> hidden states (texts, tokens, size)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, eps = int(config["hidden_size"]), float(config.get("layer_norm_eps", 1e-12))
        activations = {"gelu": nn.gelu, "gelu_new": nn.gelu_approx, "relu": nn.relu}
        activation = activations[config.get("hidden_act", "gelu")]
        heads, inner = int(config["num_attention_heads"]), int(config["intermediate_size"])
        self.words = nn.Embedding(int(config["vocab_size"]), size)
        self.positions = nn.Embedding(int(config["max_position_embeddings"]), size)
        self.types = nn.Embedding(int(config.get("type_vocab_size", 2)), size)
        self.norm = nn.LayerNorm(size, eps=eps)
        self.layers = [_Layer(size, heads, inner, eps, activation) for _ in range(int(config["num_hidden_layers"]))]

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        x = self.words(ids) + self.positions(mx.arange(ids.shape[1])) + self.types(mx.zeros_like(ids))
        x = self.norm(x)
        hidden_from = mx.where(mask[:, None, None, :] > 0, 0.0, -1e9).astype(x.dtype)
        for layer in self.layers:
            x = layer(x, hidden_from)
        return x


_NAMES = (
    ("embeddings.word_embeddings.", "words."),
    ("embeddings.position_embeddings.", "positions."),
    ("embeddings.token_type_embeddings.", "types."),
    ("embeddings.LayerNorm.", "norm."),
    ("encoder.layer.", "layers."),
    (".attention.self.", ".attention."),
    (".attention.output.dense.", ".attention_out."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".up."),
    (".output.dense.", ".down."),
    (".output.LayerNorm.", ".norm."),
)


def _renamed(name: str) -> str | None:
    """A weight's name in this module; None for weights that embeddings do not need (pooler, position ids)."""
    name = name.removeprefix("bert.")
    if name.startswith(("pooler.", "cls.")) or name.endswith("position_ids"):
        return None
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


@dataclass
class _Work:
    request: Embed
    inputs: deque[list[int]]
    prompt_tok: int
    since_s: float = field(default_factory=time.perf_counter)


class EncoderEngine:
    """Engine over one encoder. Raises Refused from the constructor when it cannot be loaded."""

    def __init__(self, path: str, *, batch_tok: int = 512, blas: str = REFERENCE) -> None:
        began = time.perf_counter()
        never_wire_memory()
        self._folder = Path(path)
        self._blas, self._batch_tok = blas, batch_tok
        try:
            self._load()
        except Exception as error:  # noqa: BLE001  # damaged files may raise anything
            raise cannot_load(self._folder, error) from None
        self._work: dict[int, _Work] = {}
        self._counts = Counts()
        mx.reset_peak_memory()
        self._vectors([[0]])
        self._warm_peak = mx.get_peak_memory()
        self._load_us = int((time.perf_counter() - began) * 1e6)

    def _load(self) -> None:
        config = json.loads((self._folder / "config.json").read_bytes())
        self._limit_tok = int(config["max_position_embeddings"])
        self._vocabulary, self._size = int(config["vocab_size"]), int(config["hidden_size"])
        self._tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._by_first = _pools_by_first(self._folder)
        self._model = Bert(config)
        shards: list[Any] = [mx.load(str(path)) for path in sorted(self._folder.glob("*.safetensors"))]
        named = [(_renamed(name), array) for shard in shards for name, array in shard.items()]
        self._model.load_weights([(name, array) for name, array in named if name is not None])
        mx.eval(self._model.parameters())

    def describe(self) -> Ready:
        return Ready(
            engine="mlx",
            context_tok=self._limit_tok,
            load_us=self._load_us,
            active_bytes=mx.get_active_memory(),
            peak_bytes=self._warm_peak,
            warm_tok=1,
            blas=self._blas,
            serves="vectors",
        )

    @property
    def busy(self) -> bool:
        return bool(self._work)

    def prepare(self, request: Ask, advance: Advance = nothing) -> Prepared | Failed:
        if not isinstance(request, Embed):
            message = f"{request.model} is an embedding model and generates no text; use /v1/embeddings"
            return Failed(id=request.id, code="unsupported_parameter", message=message, param="model")
        return other_size(request.id, request.dimensions, self._size) or embedding_inputs(
            request, self._encode, self._limit_tok, self._vocabulary, advance
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def submit(self, prepared: Prepared) -> Frame:
        request = prepared.request
        assert isinstance(request, Embed)
        total = sum(len(ids) for ids in prepared.prompts)
        self._work[request.id] = _Work(request, deque(prepared.prompts), total)
        return Accepted(id=request.id, prompt_tok=total, cached_tok=0)

    def cancel(self, request_id: int) -> None:
        self._work.pop(request_id, None)

    def step(self) -> list[Frame]:
        """Vectors for as many inputs of one request as fit one padded batch, requests in turn."""
        began = time.perf_counter()
        number, work = next(iter(self._work.items()))
        self._work[number] = self._work.pop(number)  # to the end of the queue
        batch: list[list[int]] = []
        while work.inputs and (not batch or (len(batch) + 1) * _longest(batch, work.inputs[0]) <= self._batch_tok):
            batch.append(work.inputs.popleft())
        made: list[Frame] = [Embedded(id=number, vectors=tuple(self._vectors(batch)))]
        self._counts.add("busy_prefill_us", int((time.perf_counter() - began) * 1e6))
        self._counts.add("prefill_tok", sum(len(ids) for ids in batch))
        self._counts.add("steps", 1)
        if work.inputs:
            return made
        del self._work[number]
        return [*made, done(number, work.prompt_tok, work.since_s)]

    def report(self) -> Reported:
        return Reported(**self._counts.taken(), active_bytes=mx.get_active_memory())

    def working(self) -> Working:
        active, reuse = mx.get_active_memory(), mx.get_cache_memory()
        return Working(active_bytes=active, reuse_bytes=reuse, waits=tuple(self._work))

    def relieve(self, level: Literal["calm", "soft", "hard"]) -> None:
        if level == "hard":
            mx.synchronize()
            mx.clear_cache()

    def bounds(self) -> None:
        return None

    def measure(self, task: Task) -> None:
        raise AssertionError("an encoder's steps are not timed")

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self._work.clear()
        mx.synchronize()

    def _vectors(self, batch: list[list[int]]) -> list[bytes]:
        longest = max(len(ids) for ids in batch)
        ids = mx.array([one + [0] * (longest - len(one)) for one in batch])
        mask = mx.array([[1.0] * len(one) + [0.0] * (longest - len(one)) for one in batch])
        hidden = self._model(ids, mask)
        pooled = hidden[:, 0] if self._by_first else (hidden * mask[:, :, None]).sum(axis=1)
        mx.eval(pooled)
        return [unit_bytes(pooled[number]) for number in range(len(batch))]


def _longest(batch: list[list[int]], one: list[int]) -> int:
    return max([len(ids) for ids in batch] + [len(one)])


def _pools_by_first(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "1_Pooling" / "config.json").read_bytes()).get("pooling_mode_cls_token"))
    except (OSError, ValueError):
        return False
