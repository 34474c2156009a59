"""Sampling of one row's next token: logits processors, then the random draw.

In order: repetition penalty, frequency and presence penalties, logit bias, the mask of end tokens, the grammar; then
temperature, top_k, top_p, min_p, each over what the ones before it left; then the draw.

A draw depends only on the request's seed and the token's position, never on other rows in the batch, so a request can
be continued on any node with the same result.
"""

import math
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p, make_repetition_penalty

from agent.wire.frames import Generate

Sampler = Callable[[mx.array], mx.array]
"""Log probabilities of one row, (1, vocabulary) -> its token, (1,)."""
Processor = Callable[[mx.array, mx.array], mx.array]
"""(tokens so far, logits of one row) -> logits, as mlx-lm calls it."""

GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy."""
LEAST_TOP_P = 1e-6
"""Lower bound of top_p, so that the most likely token always remains."""
_MASK = (1 << 64) - 1


def sampler(request: Generate, position: int) -> Sampler | None:
    """None for greedy; else a sampler whose n-th draw depends only on the seed and n (n starts at ``position``)."""
    if request.temperature < GREEDY_BELOW:
        return None
    at = position

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal at
        key = mx.random.key(mixed(request.seed, at))
        at += 1
        return mx.random.categorical(filtered(request, logprobs), key=key)

    return sample


def filtered(request: Generate, logprobs: mx.array) -> mx.array:
    """The log probabilities that a token is drawn from: scaled, and -inf for each token that a filter removes."""
    # half precision could not hold the quotient
    scaled = logprobs.astype(mx.float32) * (1.0 / request.temperature)
    if 0 < request.top_k < scaled.shape[-1]:
        # compared by value: tokens as likely as the last of the k stay, whatever order the device sorts them in
        least = mx.topk(scaled, request.top_k, axis=-1).min(axis=-1, keepdims=True)
        scaled = mx.where(scaled < least, -mx.inf, scaled)
    if request.top_p < 1.0:
        normal = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
        scaled = apply_top_p(normal, max(request.top_p, LEAST_TOP_P))
    if request.min_p > 0.0:
        # not mlx-lm's, which compiles and keeps a kernel for each value that clients send
        least = scaled.max(axis=-1, keepdims=True) + math.log(request.min_p)
        scaled = mx.where(scaled < least, -mx.inf, scaled)
    return scaled


def repetition(factor: float, window_tok: int) -> Processor:
    """Divide the logits of tokens that occurred in the last ``window_tok`` of prompt and answer (0: all) by ``factor``,
    or multiply negative ones by it (Keskar et al. 2019)."""
    return make_repetition_penalty(factor, window_tok)


def never(tokens: list[int]) -> Processor:
    """Tokens that cannot be sampled."""
    return bias(tuple((token, -math.inf) for token in tokens))


def penalty(frequency: float, presence: float, begin: int) -> Processor:
    """OpenAI's penalties over the generated tokens: logit - count x frequency - (count > 0) x presence."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        made = tokens[begin:]
        if made.size == 0:
            return logits
        counts = mx.zeros(logits.shape[-1:], dtype=logits.dtype).at[made].add(1)
        return logits - frequency * counts - presence * (counts > 0)

    return process


def bias(pairs: tuple[tuple[int, float], ...]) -> Processor:
    """Add values to the logits of some tokens."""
    ids, values = mx.array([token for token, _ in pairs]), mx.array([value for _, value in pairs])

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, ids].add(values.astype(logits.dtype))

    return process


def mixed(seed: int, position: int) -> int:
    """SplitMix64 of the position-th step from ``seed`` (Steele, Lea and Flood 2014), a well-spread 63-bit number."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
