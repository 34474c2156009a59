"""The logits processor that holds an answer to its plan: free text, reasoning, and what a grammar constrains."""

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher

from agent.loader.chat.grammar import Plan
from agent.wire.frames import Failed, Generate

_TAIL_CHARS = 512
"""Free text that is searched for the announcement of a call."""
_MORE = "."
"""Stands for text that is searched no more, so that what follows is not taken for the begin of an answer."""

_TRIAL_STEPS = 4
_LIMIT = re.compile(r"too (?:many|big|large|complex)|fuel")
"""In llguidance's words about a limit."""


class Unconstrained(Exception):
    """The grammar and the model's tokens disagree, so the answer cannot be held to it."""


class TooComplex(Unconstrained):
    """What the request's schemas demand of the answer takes more steps or states than are given to it."""


def trial(matcher: LLMatcher) -> None:
    """Take the first steps of an answer: most patterns that are too complex show it there. Raises Unconstrained."""
    for _ in range(_TRIAL_STEPS):
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        check(matcher)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if matcher.is_stopped() or not len(allowed):
            return
        matcher.consume_token(int(allowed[0]))
        check(matcher)


def check(matcher: LLMatcher) -> None:
    """Raises Unconstrained for a matcher that has failed, TooComplex where that was by one of its limits."""
    if matcher.is_error():
        kind = TooComplex if _at_limit(matcher) else Unconstrained
        raise kind(f"the grammar failed: {matcher.stop_reason()}")


def _at_limit(matcher: LLMatcher) -> bool:
    return _LIMIT.search(matcher.get_error()) is not None


def too_complex(request: Generate) -> Failed:
    """What the client is told of it."""
    param, place = "tools", "tools: a schema of them"
    if request.schema is not None:
        param, place = "response_format", "response_format.json_schema.schema: it"
    message = f"{place} is too complex to enforce; simplify its patterns, repetitions and alternatives"
    return Failed(id=request.id, code="invalid_value", message=message, param=param)


class Constraint:
    """Follows one row's tokens from position ``begin``. ``matcher`` compiles a grammar, of which a text may be written
    already, ``text`` decodes tokens, ``ends`` are the tokens that end an answer. A plan's whole grammar begins after
    the reasoning if the answer begins ``inside`` it; ``thought`` are the texts around reasoning. Raises
    Unconstrained."""

    def __init__(
        self,
        plan: Plan,
        begin: int,
        ends: list[int],
        matcher: Callable[..., LLMatcher],
        text: Callable[[list[int]], str],
        thought: tuple[str, str] | None,
        *,
        inside: bool,
    ) -> None:
        self._plan, self._ends, self._compile, self._decode = plan, ends, matcher, text
        self._begin, self._consumed = begin, 0
        self._thought, self._inside = thought, inside and thought is not None
        self._free, self._shortened = list[int](), ""
        self._matcher = None if self._inside or plan.whole is None else matcher(plan.whole)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits with every token masked that the plan does not allow."""
        fresh: Any = tokens[self._begin + self._consumed :].tolist()
        for token in fresh:
            self._take(token)
        self._consumed += len(fresh)
        return logits if self._matcher is None else self._masked(self._matcher, logits)

    def _take(self, token: int) -> None:
        if self._matcher is None:
            self._listen(token)
            return
        if self._matcher.is_stopped() and self._plan.whole is not None:
            return  # the end of the answer
        if not self._matcher.consume_token(token):
            check(self._matcher)
            raise Unconstrained(f"the grammar does not take a token that it allowed: {self._matcher.stop_reason()}")
        if self._plan.whole is None and self._matcher.is_stopped():
            check(self._matcher)
            self._matcher = None
            self._begin_text(inside=False)

    def _listen(self, token: int) -> None:
        """Free text or reasoning goes on: look for what ends it."""
        self._free.append(token)
        text = self._shortened + self._decode(self._free)
        if len(text) > _TAIL_CHARS:
            self._free, self._shortened = self._free[len(self._free) // 2 :], _MORE
        if self._inside:
            assert self._thought is not None
            if self._thought[1] in text:
                self._begin_text(inside=False)
                self._matcher = None if self._plan.whole is None else self._compile(self._plan.whole)
        elif self._thought is not None and self._thought[0] in text:
            self._begin_text(inside=True)
        elif self._plan.announced is not None and (found := self._plan.announced.search(text)) is not None:
            assert self._plan.call is not None
            self._free, self._shortened = [], _MORE
            self._matcher = self._behind(self._plan.call(found), text[found.end() :])

    def _begin_text(self, *, inside: bool) -> None:
        """Listen to new text, of which nothing is left out yet."""
        self._inside, self._free, self._shortened = inside, [], ""

    def _behind(self, grammar: str | None, written: str) -> LLMatcher | None:
        """The matcher of a call whose announcement ended inside a token: ``written`` is the rest of that token."""
        if grammar is None or not written:
            return None if grammar is None else self._compile(grammar)
        matcher = self._compile(grammar, written)
        if _at_limit(matcher):
            check(matcher)
        return None if matcher.is_stopped() else matcher  # complete, or no call of a described function

    def _masked(self, matcher: LLMatcher, logits: mx.array) -> mx.array:
        if matcher.is_stopped():
            check(matcher)
            only_end = mx.full(logits.shape, -float("inf"), dtype=logits.dtype)
            only_end[:, mx.array(self._ends)] = 0.0
            return only_end
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        check(matcher)
        allowed = np.zeros(logits.shape[-1], dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: len(allowed)]
        allowed[: len(known)] = known
        return mx.where(mx.array(allowed), logits, -float("inf"))
