"""One part of one client request in progress, and its outcome. Pure data; dispatch changes it."""

import secrets

import msgspec

from agent.gateway.decisions import Trail
from agent.gateway.outcomes import Ended
from agent.gateway.passage import Passage
from agent.policy.facts import DEFAULT_ANSWER_TOK
from agent.process.prefixes import Text
from agent.wire.frames import Accepted, Answer, Ask, Done, Generate, Tokens
from agent.wire.namespaces import Namespace
from agent.wire.priority import NEUTRAL, Priority
from shared.errors import RackError, Refused

MAX_CONTINUATIONS = 4
TURN_SEEDS = 0x51_7C_C1_B7_27
"""Distance of the seeds of several answers to one prompt: they differ, and are reproducible."""
_NO_TEXT = Text((), 1)


class Spent(msgspec.Struct, kw_only=True):
    """What the attempts of a request took at workers that were lost, by the gateway's clock, and how many tokens of the
    prompt were cached when the first of them began: what later ones find in a cache, the request may have put there.
    ``taken_s`` is when the current attempt was accepted, ``first_s`` its first token, None before. ``lost``: an attempt
    was lost that a worker had accepted."""

    prefill_us: int = 0
    decode_us: int = 0
    cached_tok: int | None = None
    taken_s: float | None = None
    first_s: float | None = None
    lost: bool = False


class Call(msgspec.Struct, kw_only=True):
    """A request for several answers is several calls: ``part`` counts them all, ``turn`` those for the same prompt. The
    first part counts as the request, the first turn as the prompt. ``cache`` is the namespace of its key; ``seed`` is
    None until one is drawn. ``made`` are the tokens produced; while ``continuing``, the answer resumes after them.
    ``over_tok`` is a context length that was too small for it, ``too_long`` the error of the node that found it so;
    engines of ``faulty`` nodes failed at it; ``ignored`` are the fields of the request that the worker capped or left
    out. ``due_s`` is when the request is over. ``fate`` is the end of another part, which ended this one. ``crashes``:
    see Loss. ``spent`` is what lost attempts took. ``passage`` is the request on its way through the wall; ``refused``
    is why the rack did not admit it, so that it is answered elsewhere. ``end`` is how it ended.
    """

    ask: Ask
    request_id: str
    cache: Namespace
    key_id: str = ""
    priority: Priority = NEUTRAL
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
    fate: Ended | None = None
    crashes: int = 0
    began_s: float = 0.0
    due_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    gaps_us: list[tuple[int, int]] = msgspec.field(default_factory=list)
    spent: Spent = msgspec.field(default_factory=Spent)
    passage: Passage | None = None
    refused: RackError | None = None
    end: Ended | None = None
    code: str = ""

    @property
    def model(self) -> str:
        """The requested name."""
        return self.ask.model

    @property
    def answer_tok(self) -> int:
        """The most tokens that may still be generated."""
        if not isinstance(self.ask, Generate):
            return 0
        return max(1, (self.ask.max_tokens or DEFAULT_ANSWER_TOK) - len(self.made))

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
            return msgspec.structs.replace(
                ask, id=1, request_id=self.request_id, door=gateway, cache=self.cache, priority=self.priority
            )
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
            priority=self.priority,
            seed=seed + self.turn * TURN_SEEDS,
            made=tuple(self.made) if self.continuing else (),
            version=self.version if self.continuing else "",
        )

    def note(self, answer: Answer, now_s: float) -> None:
        """Count a piece of the answer."""
        if isinstance(answer, Tokens):
            self.spent.first_s = self.spent.first_s or now_s
            self.crashes = 0  # it gets on, so it was by chance; MAX_CONTINUATIONS bounds what only seems so
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
            self.cached_tok, self.completion_tok = answer.cached_tok, answer.completion_tok

    def taken(self, answer: Accepted, now_s: float) -> None:
        """An attempt was accepted."""
        spent = self.spent
        spent.taken_s, spent.first_s = now_s, None
        # until it is known how much was really found: an estimate
        spent.cached_tok = answer.cached_tok if spent.cached_tok is None else min(spent.cached_tok, answer.cached_tok)

    def lose(self, now_s: float) -> None:
        """The attempt was lost: what it took is part of the request."""
        spent = self.spent
        if spent.taken_s is not None:
            first_s = spent.first_s or now_s
            spent.prefill_us += int((first_s - spent.taken_s) * 1e6)
            spent.decode_us += int((max(self.last_s, first_s) - first_s) * 1e6) if spent.first_s else 0
            spent.taken_s = spent.first_s = None
            spent.lost = True

    def told(self, done: Done) -> Done:
        """The end of the answer, as it is for the request and not only for the last attempt at it."""
        if not self.spent.lost or self.spent.cached_tok is None:
            return done
        return msgspec.structs.replace(
            done,
            cached_tok=min(self.spent.cached_tok, done.cached_tok),
            prefill_us=done.prefill_us + self.spent.prefill_us,
            decode_us=done.decode_us + self.spent.decode_us,
        )

    def start_over(self) -> None:
        """Start over: of the lost attempt only the fact that it happened still counts."""
        self.continuing = False
        self.completion_tok = self.prompt_tok = self.cached_tok = 0
        self.first_s = None
        self.gaps_us.clear()
        self.made.clear()
