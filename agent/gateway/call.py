"""One part of one client request in progress, and its outcome. Pure data; dispatch changes it."""

import secrets

import msgspec

from agent.gateway.decisions import Trail
from agent.process.prefixes import Text
from agent.wire.frames import Accepted, Answer, Ask, Done, Generate, Tokens
from agent.wire.namespaces import Namespace
from shared.errors import Refused

MAX_CONTINUATIONS = 4
TURN_SEEDS = 0x51_7C_C1_B7_27
"""Distance of the seeds of several answers to one prompt: they differ, and are reproducible."""
_NO_TEXT = Text((), 1)


class Call(msgspec.Struct, kw_only=True):
    """A request for several answers is several calls: ``part`` counts them all, ``turn`` those for the same prompt. The
    first part counts as the request, the first turn as the prompt. ``cache`` is the namespace of its key; ``seed`` is
    None until one is drawn. ``made`` are the tokens produced; while ``continuing``, the answer resumes after them.
    ``over_tok`` is a context length that was too small for it, ``too_long`` the error of the node that found it so;
    engines of ``faulty`` nodes failed at it; ``ignored`` are the fields of the request that the worker capped or left
    out.
    """

    ask: Ask
    request_id: str
    cache: Namespace
    key_id: str = ""
    whole: bool = True
    part: int = 0
    turn: int = 0
    seed: int | None = None
    text: Text = _NO_TEXT
    trail: Trail | None = None
    made: list[int] = msgspec.field(default_factory=list)
    continuing: bool = False
    lost_s: float = 0.0
    over_tok: int = 0
    too_long: Refused | None = None
    faulty: tuple[str, ...] = ()
    continuations: int = 0
    tried: set[str] = msgspec.field(default_factory=set)
    retries: int = 0
    worker: str = ""
    version: str = ""
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0
    ignored: tuple[str, ...] = ()
    done: Done | None = None
    known: bool = False
    fate: str = ""
    began_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    gaps_us: list[tuple[int, int]] = msgspec.field(default_factory=list)

    @property
    def model(self) -> str:
        """The requested name."""
        return self.ask.model

    @property
    def answer_tok(self) -> int:
        """The most tokens that may still be generated."""
        if not isinstance(self.ask, Generate):
            return 0
        return max(1, (self.ask.max_tokens or 4096) - len(self.made))

    @property
    def can_continue(self) -> bool:
        """Whether another loader of the same version could continue the answer: every token of it is known."""
        known = isinstance(self.ask, Generate) and bool(self.version) and len(self.made) == self.completion_tok > 0
        return known and self.continuations < MAX_CONTINUATIONS

    @property
    def finish(self) -> str:
        """Why the answer ended; "" when it has not."""
        return self.done.finish if self.done else ""

    def frame(self, gateway: str) -> Ask:
        """The frame for the worker."""
        ask = self.ask
        if not isinstance(ask, Generate):
            return msgspec.structs.replace(ask, id=1, request_id=self.request_id, door=gateway, cache=self.cache)
        # without a seed the gateway draws one, so that a retry samples the same tokens
        seed = self.seed if self.seed is not None else secrets.randbits(62)
        self.seed = seed
        return msgspec.structs.replace(
            ask,
            id=1,
            request_id=self.request_id,
            door=gateway,
            whole=self.whole,
            cache=self.cache,
            seed=seed + self.turn * TURN_SEEDS,
            made=tuple(self.made) if self.continuing else (),
            version=self.version if self.continuing else "",
        )

    def note(self, answer: Answer, now_s: float) -> None:
        """Count a piece of the answer."""
        if isinstance(answer, Tokens):
            if self.first_s is None:
                self.first_s = now_s
            else:
                # tokens in one frame were produced one after another
                each = max(1, answer.count)
                self.gaps_us.append((int((now_s - self.last_s) * 1e6 / each), each))
            self.last_s = now_s
            self.completion_tok += answer.count
            self.made += answer.ids
        elif isinstance(answer, Accepted):
            self.worker, self.version = answer.node, answer.version
            self.prompt_tok, self.cached_tok, self.ignored = answer.prompt_tok, answer.cached_tok, answer.ignored
        elif isinstance(answer, Done):
            self.done = answer
            if not self.continuing:
                self.cached_tok = answer.cached_tok
            self.completion_tok = answer.completion_tok

    def start_over(self) -> None:
        """Start over: of the lost attempt only the fact that it happened still counts."""
        self.continuing = False
        self.completion_tok = self.prompt_tok = self.cached_tok = 0
        self.first_s = None
        self.gaps_us.clear()
        self.made.clear()
