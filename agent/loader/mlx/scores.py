"""Log probabilities of a chosen token and of the most likely alternatives."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from agent.wire.frames import Candidate, Scored

_LEAST = -9999.0
"""An impossible token has no finite logarithm, and JSON has no infinity."""


def scored(response: Any, wanted: int, token_bytes: Callable[[int], bytes]) -> Scored:
    """Log probabilities from mlx-lm's response: its token and the ``wanted`` most likely ones."""
    logprobs: mx.array = response.logprobs
    best: list[int] = []
    if wanted:
        likeliest: Any = mx.argpartition(-logprobs, wanted - 1)[:wanted].tolist()
        best = sorted(likeliest, key=lambda token: -float(_number(logprobs[token])))
    each = [_candidate(token, logprobs, token_bytes) for token in (response.token, *best)]
    return Scored(chosen=each[0], top=tuple(each[1:]))


def _candidate(token: int, logprobs: mx.array, token_bytes: Callable[[int], bytes]) -> Candidate:
    raw = token_bytes(token)
    return Candidate(text=raw.decode("utf-8", "replace"), raw=raw, logprob=max(float(_number(logprobs[token])), _LEAST))


def _number(array: mx.array) -> Any:
    return array.item()
