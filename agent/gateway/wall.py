"""The wall: every client's request is decided here before it is routed, and again before it leaves the premises. What
is decided is in agent/policy; this module asks what it has to know, and carries the decision out."""

import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import NamedTuple

import msgspec

from agent.audit.log import AuditLog
from agent.gateway.admission import priority_of
from agent.gateway.allowances import Allowances
from agent.gateway.analysis import Analysis
from agent.gateway.asking import prompt_bytes, texts_of
from agent.gateway.describing import answer_tok, answers_of, features, prompt_tok, turns
from agent.gateway.passage import Passage
from agent.gateway.recorded import decided_entry, ended_entry
from agent.gateway.taints import Taints
from agent.policy.classes import NOTHING, Declared, TaskClass
from agent.policy.classing import class_of
from agent.policy.deciding import Decision, Place, Refuse, decide, models_of, sensitive_by
from agent.policy.facts import UNSURE, Facts, Reason
from agent.policy.guess import guess
from agent.policy.rates import Rate
from agent.policy.rules import DEFAULT, Rules, of_key
from agent.wire.frames import Embed, Generate, Message, Tokens, ToolCall
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

log = get_logger("agent.wall")


class Asked(NamedTuple):
    """A client's request as the API read it: what its header and its body declare; ``prompts`` are those of a text
    completion, ``answers`` to each."""

    request_id: str
    key_id: str
    ask: Generate | Embed
    header: Declared = NOTHING
    body: Declared = NOTHING
    prompts: tuple[str, ...] = ()
    answers: int = 1
    stream: bool = False


class Guards(NamedTuple):
    """What the wall asks. ``rules`` gives those in force, ``rate`` the rack's price of a model, ``serves`` whether a
    node can take requests for a model or soon will, ``aliases`` further names of the same models."""

    rules: Callable[[], Rules]
    serves: Callable[[str], bool]
    aliases: Callable[[Sequence[str]], tuple[str, ...]]
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
        if tainted := await self._guards.taints.look(_messages(asked)):
            facts = _also(facts, tainted)
        elif rules.sensitive != DEFAULT.sensitive and not facts.sensitive:
            facts = await self._detected(asked, facts)
        passage = self._passage(asked, facts, rules, decide(facts, rules))
        try:
            if isinstance(passage.decision, Refuse):
                refuse = passage.decision
                raise Refused(refuse.message, code=refuse.code, param=refuse.param)
            self._reserve(passage, asked)
            if passage.private:
                await self._kept(passage, asked)
        except BaseException as error:  # its client may leave, too
            passage.code = error.code if isinstance(error, RackError) else ""
            self.close(passage)
            raise
        return passage

    async def leaves(self, passage: Passage, place: Place, ask: Generate | Embed) -> None:
        """Whether it may still go to a place: what only an analysis of its text can tell is asked now, and the decision
        is on the disk before a byte leaves. Raises Refused and Retryable."""
        if not passage.private and not passage.checked:
            asked = Asked(passage.request_id, passage.facts.key_id, ask)
            is_outside = place.category == "outside"
            facts = await self._detected(asked, passage.facts) if is_outside else passage.facts
            if tainted := await self._guards.taints.look(_messages(asked)):  # since it came in
                facts = _also(facts, tainted)
            passage.checked = is_outside
            if facts != passage.facts:
                passage.facts, passage.decision = facts, decide(facts, passage.rules)
                passage.places = _places(passage.decision, passage.model)
                await self._kept(passage, asked)
        if place not in passage.places:
            raise Refused("it is SENSITIVE, and stays on the premises", code="sensitive")
        await self._recorded(passage)
        if not _permits(self._guards.rules(), passage, place):
            raise Refused("not sent: the policy has changed, and does not permit it", code="provider_not_allowed")

    def close(self, passage: Passage, status: int = 0) -> None:
        """Settle what was reserved and write the audit entry: once, whatever the outcome."""
        calls, reservation = passage.calls, passage.reservation
        began = passage.at is not None or any(call.worker or call.completion_tok for call in calls)
        if reservation is not None and (began or passage.usd):
            prompt = sum(call.prompt_tok for call in calls if call.turn == 0)
            # what another place charges was reserved and settled there
            usd = None if passage.at is None else Decimal(0)
            reservation.settle(prompt, sum(call.completion_tok for call in calls), usd)
        elif reservation is not None:
            reservation.release()
        if passage.said:  # its client has left in the middle of the answer
            self._guards.taints.note([_answer(said) for said in passage.said.values()])
        self._guards.audit.write(ended_entry(passage, self._node, self._wall_ms(), self._clock(), status))

    async def _told(self, passage: Passage, part: int) -> None:
        """An answer to a SENSITIVE request is complete: mark it before its client can send it back."""
        await self._guards.taints.add([_answer(passage.said.get(part, []))], passage.facts.sensitive)
        passage.said.pop(part, None)

    # ---- what is decided on ----

    def _facts(self, asked: Asked, rules: Rules) -> Facts:
        ask, key_id = asked.ask, asked.key_id
        stated = class_of(asked.header, asked.body, ask.model, key_id, rules, lambda: _guessed(asked))
        answers = answers_of(asked.answers, asked.prompts)
        facts = Facts(
            key_id=key_id,
            model=ask.model,
            task_class=stated.task_class,
            class_from=stated.class_from,
            sensitive=("label",) if stated.sensitive else (),
            prompt_tok=prompt_tok(ask, asked.prompts),
            answer_tok=answer_tok(ask, answers),
            features=features(ask, n=answers, prompts=asked.prompts),
            day=time.strftime("%Y-%m-%d", time.gmtime(self._wall_ms() / 1000)),
        )
        if rules is DEFAULT:
            return facts
        facts = msgspec.structs.replace(facts, aliases=self._guards.aliases(models_of(facts, rules)))
        return msgspec.structs.replace(facts, sensitive=sensitive_by(facts, rules))

    async def _detected(self, asked: Asked, facts: Facts) -> Facts:
        """With what the detectors find; one that fails or is not ready has found something."""
        try:
            found = await self._guards.analysis.sensitive(list(texts_of(asked.ask, asked.prompts)))
        except Retryable:
            return _also(facts, "detector_failed")
        return _also(facts, "detector") if found else facts

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
            priority=priority_of(facts.task_class, facts.class_from, rules.admission),
        )

    def _reserve(self, passage: Passage, asked: Asked) -> None:
        facts = passage.facts
        passage.reservation = self._guards.allowances.reserve(
            of_key(passage.rules, facts.key_id),
            prompt_bytes(asked.ask, asked.prompts),
            facts.answer_tok,
            self._guards.rate(passage.model),
            key_id=facts.key_id,
        )

    async def _kept(self, passage: Passage, asked: Asked) -> None:
        """A SENSITIVE request is recorded, and all nodes know its texts, before it is worked on. One that counts as
        such only because marks are incomplete, and could not leave anyway, waits for no disk. Raises Retryable."""
        if passage.elsewhere or not UNSURE.issuperset(passage.facts.sensitive):
            await self._recorded(passage)
        passage.told = partial(self._told, passage)
        await self._guards.taints.add(_messages(asked), passage.facts.sensitive)

    async def _recorded(self, passage: Passage) -> None:
        """The decision is on the disk before the work begins. Raises Retryable."""
        await self._guards.audit.write_first(decided_entry(passage, self._node, self._wall_ms()))


def _places(decision: Decision, model: str) -> tuple[Place, ...]:
    """Of several models of the rack, the one that was chosen."""
    if isinstance(decision, Refuse):
        return ()
    return tuple(one for one in decision.places if one.category != "rack" or one.model == model)


def _permits(rules: Rules, passage: Passage, place: Place) -> bool:
    """Whether the rules that are in force by now still permit a place; it may have waited long for it."""
    if rules is passage.rules:
        return True
    decision = decide(passage.facts, rules)
    which = (place.category, place.provider, place.model)
    places = () if isinstance(decision, Refuse) else decision.places
    return any((one.category, one.provider, one.model) == which for one in places)


def _messages(asked: Asked) -> Sequence[Message]:
    """What a taint is of: turns; a text to continue and texts to embed are turns of a user."""
    if isinstance(asked.ask, Generate) and not asked.prompts and asked.ask.prompt is None:
        return asked.ask.messages
    return [Message(role="user", content=text) for text in texts_of(asked.ask, asked.prompts)]


def _also(facts: Facts, reason: Reason) -> Facts:
    return msgspec.structs.replace(facts, sensitive=(*facts.sensitive, reason))


def _answer(said: Sequence[Tokens]) -> Message:
    """What was answered, as a client sends it back in its next request."""
    calls = tuple(ToolCall(id=c.id, name=c.name, arguments=c.arguments) for one in said for c in one.calls)
    reasoning = "".join(one.reasoning for one in said)
    return Message(role="assistant", content="".join(one.text for one in said), reasoning=reasoning, calls=calls)


def _guessed(asked: Asked) -> TaskClass:
    ask = asked.ask
    if isinstance(ask, Embed):
        return "ROUTINE"
    some = turns(ask, asked.prompts)
    return guess(some, has_tools=bool(ask.tools), has_schema=ask.schema is not None, max_tokens=ask.max_tokens)
