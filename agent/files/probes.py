"""Probes: questions that a standby must answer before it takes over, and the checks of its answers. Pure.

An operator records answers of a model that is known to be good (``mlxrack-agent probes``); without any, built-in
questions at least detect models that answer nothing, answer everything alike or produce NaN.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from shared.errors import Refused

TIMED = 30
"""Requests whose times are compared with the model's budget; the p99 of this few is their maximum."""
TIMED_TOK = 4
ALIKE_TOK = 4
"""From this many tokens on, identical answers to different questions are a fault."""


class Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question and, where one was recorded, its answer at temperature 0. ``match`` contains ignores case."""

    prompt: str
    answer: str | None = None
    match: Literal["exact", "contains"] = "exact"
    max_tokens: int = 16


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What a loader answered."""

    text: str
    tokens: int
    logprobs: tuple[float, ...] = ()


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    probes: tuple[Probe, ...]


BUILT_IN = tuple(
    Probe(prompt=text)
    for text in (
        "What is the capital of France?",
        "What is two plus two?",
        "Name a colour of the sky.",
        "Finish: one, two, three,",
        "Say hello.",
    )
)


def parse(raw: bytes, what: str) -> tuple[Probe, ...]:
    """Parse a file of probes. Raises Refused."""
    try:
        probes = msgspec.json.decode(raw, type=_File).probes
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Refused(f"{what}: {error}; `mlxrack-agent probes MODEL` prints a valid one", code="bad_probes") from None
    if not probes or any(not p.prompt or not 0 < p.max_tokens <= 512 for p in probes):
        raise Refused(f"{what}: needs probes with a prompt and 1 to 512 max_tokens", code="bad_probes")
    return probes


def render(probes: Sequence[Probe]) -> bytes:
    """A file of these probes."""
    return msgspec.json.format(msgspec.json.encode(_File(probes=tuple(probes))), indent=2) + b"\n"


def fault(probe: Probe, heard: Heard) -> str:
    """What is wrong with one answer; "" when nothing is. Never quotes it."""
    if heard.tokens == 0:
        return "the answer is empty"
    if not all(math.isfinite(one) for one in heard.logprobs):
        return "the model produced NaN or infinity; its weights may be corrupt"
    if probe.answer is None:
        return ""
    if probe.match == "contains":
        return "" if probe.answer.lower() in heard.text.lower() else "the answer does not contain the recorded text"
    return "" if probe.answer == heard.text else "the answer differs from the recorded one"


def alike(heard: Sequence[Heard]) -> str:
    """What is wrong with all answers together; "" when nothing is."""
    long = {one.text for one in heard if one.tokens >= ALIKE_TOK}
    if len(heard) > 2 and len(long) == 1 and all(one.tokens >= ALIKE_TOK for one in heard):
        return f"the model gives the same answer to {len(heard)} different questions"
    return ""
