"""Embeddings from a text model: the mean of a text's last hidden states, normalized to length 1."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from agent.wire.frames import Accepted, Done, Embedded, Failed, Frame

FLOAT_BYTES = 4


@dataclass
class _Work:
    inputs: deque[list[int]]
    prompt_tok: int
    dimensions: int | None = None
    making: Iterator[bytes | None] | None = None
    since_s: float = field(default_factory=time.perf_counter)


class EmbeddingQueue:
    """Embedding requests beside a model's answers: one chunk of one input per step, so that no decoding row waits for a
    long text or a long list."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        self._work: dict[int, _Work] = {}

    @property
    def busy(self) -> bool:
        """Whether step() has work to do."""
        return bool(self._work)

    @property
    def waits(self) -> tuple[int, ...]:
        """Requests that are computed or wait for that."""
        return tuple(self._work)

    def take(self, number: int, inputs: Sequence[list[int]], dimensions: int | None = None) -> Accepted:
        """Accept a request; ``dimensions`` as in Embed."""
        work = self._work[number] = _Work(deque(inputs), sum(len(ids) for ids in inputs), dimensions)
        return Accepted(id=number, prompt_tok=work.prompt_tok, cached_tok=0)

    def cancel(self, number: int) -> None:
        """Drop a request; unknown ids are no error."""
        self._work.pop(number, None)

    def step(self, chunk_tok: Callable[[float], int]) -> list[Frame]:
        """One more chunk, for each request in turn; with Done after a request's last. ``chunk_tok`` returns the chunk
        size after a number of tokens."""
        number, work = next(iter(self._work.items()))
        self._work[number] = self._work.pop(number)  # to the end of the queue
        try:
            if work.making is None:
                work.making = mean_vector(self._weights, work.inputs.popleft(), chunk_tok)
            vector = next(work.making)
            made: list[Frame] = []
            if vector is not None:
                if refusal := other_size(number, work.dimensions, len(vector) // FLOAT_BYTES):
                    del self._work[number]
                    return [refusal]
                made = [Embedded(id=number, vectors=(vector,))]
                work.making = None
        except Exception as error:  # noqa: BLE001  # a model without ``model``, or out of memory
            del self._work[number]
            message = f"this model does not support embeddings ({type(error).__name__})"
            return [Failed(id=number, code="unsupported_parameter", message=message, param="model")]
        if work.inputs or work.making is not None:
            return made
        del self._work[number]
        return [*made, done(number, work.prompt_tok, work.since_s)]


def other_size(number: int, dimensions: int | None, size: int) -> Failed | None:
    """The failure of a request for vectors of another size than the model's own; None for its own size."""
    if dimensions in (None, size):
        return None
    message = f"dimensions: this model's vectors have {size} numbers, and none can be cut off; omit it or send {size}"
    return Failed(id=number, code="invalid_value", message=message, param="dimensions")


def done(number: int, prompt_tok: int, since_s: float) -> Done:
    """The last frame of an embedding request."""
    us = int((time.perf_counter() - since_s) * 1e6)
    return Done(id=number, finish="stop", prompt_tok=prompt_tok, cached_tok=0, completion_tok=0, prefill_us=us)


def mean_vector(weights: Any, tokens: list[int], chunk_tok: Callable[[float], int]) -> Iterator[bytes | None]:
    """Yields None after each chunk, and at last the mean over ``tokens``' hidden states as little-endian float32.
    Raises AttributeError for a model whose backbone is not ``model`` in mlx-lm."""
    cache = make_prompt_cache(weights)
    total: mx.array = mx.zeros(())
    begin = 0
    while begin < len(tokens):
        piece = tokens[begin : begin + chunk_tok(begin)]
        begin += len(piece)
        hidden = weights.model(mx.array([piece]), cache=cache)
        total = total + hidden.astype(mx.float32).sum(axis=(0, 1))
        mx.eval(total)
        yield None
    yield unit_bytes(total)


def unit_bytes(vector: mx.array) -> bytes:
    """A vector normalized to length 1, as little-endian float32."""
    numbers = np.asarray(vector, dtype="<f4")
    length = float(np.linalg.norm(numbers))
    return (numbers / length if length else numbers).astype("<f4").tobytes()
