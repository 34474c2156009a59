"""The wall: every client's request is decided here before it is routed, and again before it leaves the premises. What
is decided is in agent/policy; this module asks what it has to know, and carries the decision out."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from agent.audit.log import AuditLog
from agent.gateway.allowances import Allowances
from agent.gateway.analysis import Analysis
from agent.gateway.asking import BYTES_PER_TOK, answer_tok, features, prompt_bytes, texts_of
from agent.gateway.passage import Passage
from agent.gateway.recorded import decided_entry, ended_entry
from agent.gateway.taints import Taints
from agent.policy import classes, guess
from agent.policy.classes import Declared, TaskClass
from agent.policy.deciding import Decision, Place, Refuse, decide
from agent.policy.facts import ClassFrom, Facts, Reason
from agent.policy.limits import Rate
from agent.policy.rules import Rules, of_key, of_model
from agent.wire.frames import Embed, Generate, Message
from shared.errors import Refused, Retryable
from shared.logs import get_logger

log = get_logger("agent.wall")


class Asked(NamedTuple):
    """A client's request as the API read it; ``prompts`` are those of a text completion, ``answers`` to each."""

    request_id: str
    key_id: str
    declared: Declared
    source: ClassFrom
    ask: Generate | Embed
    prompts: tuple[str, ...] = ()
    answers: int = 1
    stream: bool = False


class Guards(NamedTuple):
    """What the wall asks. ``rules`` gives those in force, ``rate`` the rack's price of a model, ``serves`` whether a
    node can take requests for a model or soon will."""

    rules: Callable[[], Rules]
    serves: Callable[[str], bool]
    rate: Callable[[str], Rate | None]
    taints: Taints
    analysis: Analysis
    audit: AuditLog
    allowances: Allowances


class Wall:
    """``clock`` is monotonic seconds, ``wall_ms`` the time of day."""

    def __init__(
        self,
        node: str,
        guards: Guards,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._node, self._guards, self._clock, self._wall_ms = node, guards, clock, wall_ms

    @property
    def rules(self) -> Rules:
        """Those in force."""
        return self._guards.rules()

    async def enter(self, asked: Asked) -> Passage:
        """Decide a request and reserve what it may cost; close what is returned. Raises Refused and Retryable: for a
        key that may not do this, a limit, or a SENSITIVE request that cannot be recorded."""
        rules = self._guards.rules()
        facts = self._facts(asked, rules)
        if rules.sensitive != Rules().sensitive and not facts.sensitive:
            facts = await self._detected(asked, facts)
        passage = self._passage(asked, facts, rules, decide(facts, rules))
        try:
            if isinstance(passage.decision, Refuse):
                refuse = passage.decision
                raise Refused(refuse.message, code=refuse.code, param=refuse.param)
            self._reserve(passage, asked)
            if passage.private:
                await self._recorded(passage)
                await self._guards.taints.add(_messages(asked))
        except (Refused, Retryable) as error:
            passage.code = error.code
            self.close(passage)
            raise
        return passage

    async def leaves(self, passage: Passage, place: Place, ask: Generate | Embed) -> None:
        """Whether it may still go to a place: what only an analysis of its text can tell is asked now, and the decision
        is on the disk before a byte leaves. Raises Refused and Retryable."""
        if place.category == "outside" and not passage.checked:
            asked = Asked(passage.request_id, passage.facts.key_id, classes.NOTHING, "guess", ask)
            facts = await self._detected(asked, passage.facts)
            if tainted := self._guards.taints.seen(_messages(asked)):  # since it came in
                facts = msgspec.structs.replace(facts, sensitive=(*facts.sensitive, tainted))
            passage.checked = True
            if facts != passage.facts:
                passage.facts, passage.decision = facts, decide(facts, passage.rules)
                passage.places = _places(passage.decision, passage.model)
                if passage.private:
                    await self._guards.taints.add(_messages(asked))
        if place not in passage.places:
            raise Refused("it is SENSITIVE, and stays on the premises", code="sensitive")
        await self._recorded(passage)

    def counted(self, passage: Passage, prompt_tok: int) -> None:
        """The worker has counted the prompt."""
        if passage.reservation is not None:
            passage.reservation.counted(prompt_tok)

    def close(self, passage: Passage, status: int = 0) -> None:
        """Settle what was reserved and write the audit entry: once, whatever the outcome."""
        prompt = sum(call.prompt_tok for call in passage.calls if call.turn == 0)
        answer = sum(call.completion_tok for call in passage.calls)
        if passage.reservation is not None:
            passage.reservation.settle(prompt, answer, passage.usd)
        if passage.private:
            for text in passage.said:
                self._guards.taints.add_text(text)
        self._guards.audit.write(ended_entry(passage, self._node, self._wall_ms(), self._clock(), status))

    # ---- what is decided on ----

    def _facts(self, asked: Asked, rules: Rules) -> Facts:
        task_class, source = self._class(asked, rules)
        size, answers = prompt_bytes(asked.ask, asked.prompts), asked.answers * max(1, len(asked.prompts))
        return Facts(
            key_id=asked.key_id,
            model=asked.ask.model,
            task_class=task_class,
            class_from=source,
            sensitive=self._reasons(asked, rules),
            prompt_tok=size // BYTES_PER_TOK + 1,
            answer_tok=answer_tok(asked.ask, answers),
            features=features(asked.ask, answers=answers, prompts=asked.prompts),
            day=time.strftime("%Y-%m-%d", time.gmtime(self._wall_ms() / 1000)),
        )

    def _class(self, asked: Asked, rules: Rules) -> tuple[TaskClass, ClassFrom]:
        if asked.declared.task_class is not None:
            return asked.declared.task_class, asked.source
        if (named := classes.of_model(asked.ask.model)) is not None:
            return named, "model"
        if (of := of_key(rules, asked.key_id).task_class) is not None:
            return of, "key"
        if (of := of_model(rules, asked.ask.model).task_class) is not None:
            return of, "model"
        return _guessed(asked), "guess"

    def _reasons(self, asked: Asked, rules: Rules) -> tuple[Reason, ...]:
        tainted = self._guards.taints.seen(_messages(asked))
        found: dict[Reason, bool] = {
            "label": asked.declared.sensitive,
            "key": of_key(rules, asked.key_id).sensitive,
            "model": of_model(rules, asked.ask.model).sensitive,
        }
        return (*(reason for reason, there in found.items() if there), *([tainted] if tainted else ()))

    async def _detected(self, asked: Asked, facts: Facts) -> Facts:
        """With what the detectors find; one that fails or is not ready has found something."""
        try:
            found = await self._guards.analysis.sensitive(list(texts_of(asked.ask, asked.prompts)))
            reason: Reason | None = "detector" if found else None
        except Retryable:
            reason = "detector_failed"
        if reason is None:
            return facts
        return msgspec.structs.replace(facts, sensitive=(*facts.sensitive, reason))

    # ---- what is done about it ----

    def _passage(self, asked: Asked, facts: Facts, rules: Rules, decision: Decision) -> Passage:
        named = [] if isinstance(decision, Refuse) else [p.model for p in decision.places if p.category == "rack"]
        model = next((name for name in named if self._guards.serves(name)), named[0] if named else "")
        return Passage(
            request_id=asked.request_id,
            t_ms=self._wall_ms(),
            began_s=self._clock(),
            stream=asked.stream,
            facts=facts,
            rules=rules,
            decision=decision,
            places=_places(decision, model),
            model=model,
            rank=classes.rank_of(facts.task_class, facts.class_from),
        )

    def _reserve(self, passage: Passage, asked: Asked) -> None:
        facts = passage.facts
        passage.reservation = self._guards.allowances.reserve(
            of_key(passage.rules, facts.key_id),
            prompt_bytes(asked.ask, asked.prompts),
            facts.answer_tok,
            self._guards.rate(passage.model),
        )

    async def _recorded(self, passage: Passage) -> None:
        """The decision is on the disk before the work begins. Raises Retryable."""
        audit = self._guards.audit
        audit.write(decided_entry(passage, self._node, self._wall_ms()))
        await audit.durable()
        if not audit.ok:
            why = "this request has to be recorded before it is worked on, and the audit cannot be written"
            raise Retryable(f"{why}: {audit.problem}", code="audit_unavailable", retry_after_s=5)


def _places(decision: Decision, model: str) -> tuple[Place, ...]:
    """Of several models of the rack, the one that was chosen."""
    if isinstance(decision, Refuse):
        return ()
    return tuple(one for one in decision.places if one.category != "rack" or one.model == model)


def _messages(asked: Asked) -> Sequence[Message]:
    """What a taint is of: turns; a text to continue and texts to embed are turns of a user."""
    if isinstance(asked.ask, Generate) and not asked.prompts and asked.ask.prompt is None:
        return asked.ask.messages
    return [Message(role="user", content=text) for text in texts_of(asked.ask, asked.prompts)]


def _guessed(asked: Asked) -> TaskClass:
    ask = asked.ask
    if isinstance(ask, Embed):
        return "ROUTINE"
    turns = [(message.role, message.content) for message in ask.messages] or [("user", text) for text in asked.prompts]
    return guess.guess(turns, has_tools=bool(ask.tools), has_schema=ask.schema is not None, max_tokens=ask.max_tokens)
