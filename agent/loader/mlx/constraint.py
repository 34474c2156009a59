"""The logits processor that holds an answer to its plan: free text, reasoning, and what a grammar constrains."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher

from agent.loader.chat.grammar import Plan

_TAIL_CHARS = 512
"""Free text that is searched for the announcement of a call."""
_MORE = "."
"""Stands for text that is searched no more, so that what follows is not taken for the begin of an answer."""


class Unconstrained(Exception):
    """The grammar and the model's tokens disagree, so the answer cannot be held to it."""


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
            raise Unconstrained(f"the grammar does not take a token that it allowed: {self._matcher.stop_reason()}")
        if self._plan.whole is None and self._matcher.is_stopped():
            self._checked(self._matcher)
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
        return None if matcher.is_stopped() else matcher  # complete, or no call of a described function

    def _masked(self, matcher: LLMatcher, logits: mx.array) -> mx.array:
        if matcher.is_stopped():
            self._checked(matcher)
            only_end = mx.full(logits.shape, -float("inf"), dtype=logits.dtype)
            only_end[:, mx.array(self._ends)] = 0.0
            return only_end
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        self._checked(matcher)
        allowed = np.zeros(logits.shape[-1], dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: len(allowed)]
        allowed[: len(known)] = known
        return mx.where(mx.array(allowed), logits, -float("inf"))

    def _checked(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise Unconstrained(f"the grammar failed: {matcher.stop_reason()}")
