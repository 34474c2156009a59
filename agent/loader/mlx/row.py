"""One request inside the engine: its input, output and progress."""

import time
from dataclasses import dataclass, field
from typing import Any

from agent.loader.chat.speech import Said, Speech
from agent.loader.mlx.batch import Batch
from agent.loader.mlx.kv import Layers
from agent.loader.mlx.model import Extra
from agent.loader.prompt_cache import Tokens as TokenArray
from agent.loader.prompt_cache import as_tokens
from agent.loader.ranking import Standing
from agent.loader.row_placement import Candidate
from agent.loader.scheduling import Turn
from agent.loader.stopping import StopText
from agent.wire.frames import Done, Generate


@dataclass(eq=False)
class Row:
    """A request from submission to its last token. ``left_tok`` are the prompt tokens still to be computed; ``rank`` is
    the one with which it had its turn until its prompt is computed, then its own; ``yielded`` is how often it yielded
    its row to a higher one."""

    request: Generate
    prompt: list[int]
    max_tokens: int
    extra: Extra
    detokenizer: Any
    stop: StopText
    speech: Speech
    left_tok: int
    array: TokenArray
    since_s: float = field(default_factory=time.perf_counter)
    begun_s: float = 0.0
    joined_s: float = 0.0
    in_batches_s: float = 0.0
    first_s: float = 0.0
    batch: Batch | None = None
    uid: int = -1
    made: list[int] = field(default_factory=list)
    cached_tok: int = 0
    reasoning_tok: int = 0
    looked_up: bool = False
    partial: tuple[Layers, TokenArray] | None = None
    behind: "Row | None" = None
    shared_tok: int = 0
    rank: int = 0
    yielded: int = 0
    breaks: int = 0
    broken: Exception | None = None
    unmet: list[str] = field(default_factory=list)

    @property
    def id(self) -> int:
        """The request's id."""
        return self.request.id

    @property
    def length_tok(self) -> int:
        """Current number of tokens, prompt and answer."""
        return len(self.prompt) + len(self.made)

    @property
    def tokens(self) -> TokenArray:
        """Prompt and answer so far."""
        return as_tokens(self.request.cache, self.prompt + self.made) if self.made else self.array

    @property
    def prefilling(self) -> bool:
        """Whether it is in a batch and its prompt is not fully computed."""
        return self.batch is not None and self.left_tok > 0

    @property
    def apart(self) -> bool:
        """Whether it failed together with other rows, and must first succeed alone."""
        return self.breaks > 1

    @property
    def standing(self) -> Standing:
        """The row as input of ranking."""
        return Standing(self.rank, self.request.priority.leaves_rows, self.yielded)

    @property
    def state(self) -> tuple[Layers, TokenArray] | None:
        """A running row's state and the tokens that it covers."""
        assert self.batch is not None
        return self.batch.state(self)

    def turn(self, now_s: float) -> Turn:
        """The row as input of scheduling. While it is computed it does not wait, or a long prompt would at last be
        put before every short one for the time that it takes itself."""
        now_in_s = now_s - self.joined_s if self.batch is not None else 0.0
        return Turn(self.id, self.left_tok, now_s - self.since_s - self.in_batches_s - now_in_s)

    def left_batch(self) -> None:
        """It waits again."""
        self.batch = None
        self.in_batches_s += time.perf_counter() - self.joined_s

    def candidate(self, now_s: float) -> Candidate:
        """The row as input of placement."""
        return Candidate(self.turn(now_s), self.length_tok, self.max_tokens - len(self.made), self.apart)

    def take(self, token: int, finish: str | None) -> tuple[Said, bool]:
        """Add a token: the text it yields, and whether it completed a stop string."""
        self.breaks = 0  # progress resets the count of failures
        self.first_s = self.first_s or time.perf_counter()
        self.made.append(token)
        self.reasoning_tok += self.speech.reasoning
        if finish != "stop":
            self.detokenizer.add_token(token)
        if finish is not None:
            self.detokenizer.finalize()
        said = self.speech.feed(self.detokenizer.last_segment)
        if finish is not None:
            said += self.speech.finish(cut=finish == "length")
        # stop strings apply to content, not to reasoning and arguments
        text, stopped = self.stop.feed(said.text)
        if finish is not None and not stopped:
            text += self.stop.finish()
        calls = said.calls[:1] if self.request.one_call else said.calls
        if self.extra.unmet is not None:
            self.unmet += filter(None, (self.extra.unmet(call.name, call.arguments) for call in calls))
        called_enough = self.request.one_call and self.speech.called
        return Said(text, said.reasoning, calls), stopped or (called_enough and finish is None)

    def done(self, finish: str) -> Done:
        """The last frame."""
        now = time.perf_counter()
        first = self.first_s or now
        return Done(
            id=self.id,
            finish="tool_calls" if self.speech.called and finish == "stop" else finish,
            prompt_tok=len(self.prompt),
            cached_tok=self.cached_tok,
            completion_tok=len(self.made),
            reasoning_tok=self.reasoning_tok,
            queue_us=_us(self.begun_s - self.since_s),
            prefill_us=_us(first - self.begun_s),
            decode_us=_us(now - first),
            unmet=tuple(self.unmet),
        )


def _us(seconds: float) -> int:
    return max(0, int(seconds * 1e6))
