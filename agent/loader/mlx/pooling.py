"""A text's vector from a model that writes: the mean of its last hidden states, of length 1."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache


def mean_vector(weights: Any, tokens: list[int], chunk_tok: int) -> bytes:
    """Little-endian float32 of the mean over ``tokens``' hidden states, computed in chunks. Raises AttributeError for
    a model whose inner part mlx-lm keeps elsewhere."""
    cache = make_prompt_cache(weights)
    total: mx.array = mx.zeros(())
    for begin in range(0, len(tokens), chunk_tok):
        hidden = weights.model(mx.array([tokens[begin : begin + chunk_tok]]), cache=cache)
        total = total + hidden.astype(mx.float32).sum(axis=(0, 1))
        mx.eval(total)
    return unit_bytes(total)


def unit_bytes(vector: mx.array) -> bytes:
    """A vector brought to length 1, as little-endian float32."""
    numbers = np.asarray(vector, dtype="<f4")
    length = float(np.linalg.norm(numbers))
    return (numbers / length if length else numbers).astype("<f4").tobytes()
