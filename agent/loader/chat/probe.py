"""Finds out, when a model is loaded, what its chat template accepts and how it writes calls and reasoning. Pure.

A dozen shapes of conversation are rendered with words that stand nowhere else. A shape that is refused, or that loses
or doubles a word, is changed until the template takes it whole.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple, Protocol

from agent.loader.chat.calls import (
    OWN,
    CallFormat,
    CallParser,
    Probe,
    common_begin,
    common_end,
    learnt,
    marked,
    pieces,
    read,
)
from agent.loader.chat.efforts import Switch, efforts_of, quiet_word, switch_of
from agent.loader.chat.harmony import HARMONY, is_harmony
from agent.loader.chat.turns import Ids, Manner, Turn, tool_objects, turns
from agent.wire.frames import Message, ToolCall


class Render(Protocol):
    """A chat template. Raises whatever the template raises."""

    def __call__(
        self, turns: Sequence[Turn], tools: Sequence[Turn] | None, variables: Mapping[str, Any], *, begin_answer: bool
    ) -> str:
        """The conversation as text, with the beginning of an answer if wanted."""


class Traits(NamedTuple):
    """What is known of a model besides its template. ``tokens`` are the texts of its added tokens, ``ends`` of those
    that end an answer; ``variables`` the template's own; ``source`` its text; ``parsers`` are (begin, end, parser) of
    formats that cannot be learnt; ``thinking`` the markers of reasoning by the vocabulary, or None; ``structure``
    are texts around an answer that are no part of it."""

    tokens: frozenset[str] = frozenset()
    ends: tuple[str, ...] = ()
    variables: frozenset[str] = frozenset()
    source: str = ""
    parsers: tuple[tuple[str, str, CallParser], ...] = ()
    thinking: tuple[str, str] | None = None
    structure: tuple[str, ...] = ()


class Conversation(NamedTuple):
    """How a model converses. ``native``: the template gets the tools. ``reasoning`` are the texts around it; ``silent``
    tokens around an answer are no part of it. ``efforts``: variable and accepted values; ``switch``: what switches
    reasoning; ``quiet`` is a word in the system message that switches it off.
    ``channels``: every message has a header (gpt-oss). ``lost`` says what the template leaves out."""

    manner: Manner = Manner()
    form: CallFormat = OWN
    native: bool = False
    reasoning: tuple[str, str] | None = None
    silent: tuple[str, ...] = ()
    efforts: tuple[str, tuple[str, ...]] | None = None
    switch: Switch | None = None
    quiet: str = ""
    lost: tuple[str, ...] = ()
    channels: bool = False

    @property
    def reasons(self) -> bool:
        """Whether an effort of reasoning can be asked for."""
        return self.channels or self.reasoning is not None or self.efforts is not None or self.switch is not None


_TOOL = (
    '{"name": "%s", "description": "looks it up", "parameters": {"type": "object", "properties": '
    '{"qcity": {"type": "string"}, "qunit": {"type": "string"}}, "required": ["qcity"]}}'
)
ONE = Probe("lookup_alpha", {"qcity": "qvalueone", "qunit": "qvaluetwo"}, "call_qprobe0000000000000one")
TWO = Probe("lookup_beta", {"qcity": "qvaluethree", "qunit": "qvaluefour"}, "call_qprobe0000000000000two")
TOOLS = (_TOOL % ONE.name, _TOOL % TWO.name)
_REASON, _ANSWER = "qreasonword", "qanswerword"
_KEYS = ("reasoning_content", "reasoning", "thinking")
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("<|thought_start|>", "<|thought_end|>"),
    ("Here is my thought process:", "Here is my response:"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Marks of reasoning by vocabulary or template, for templates that leave reasoning out of earlier turns."""
_THOUGHT_TAG = re.compile(r"<((?:\w+:)?\w*(?:think|thought|reason)[\w:.-]*)>")
_ANNOUNCED = (
    CallFormat("<|tool_call|>[", '{"name": "', '", "arguments": ', "}", ", ", "]", "<|tool_call|>"),
    CallFormat("<TOOLCALL>[", '{"name": "', '", "arguments": ', "}", ", ", "]", "<TOOLCALL>", "</TOOLCALL>"),
    CallFormat("functools[", '{"name": "', '", "arguments": ', "}", ", ", "]", "functools["),
    CallFormat("[TOOL_CALLS][", '{"name": "', '", "arguments": ', "}", ", ", "]", "[TOOL_CALLS]"),
)
"""Formats that some templates only announce: they leave calls out of earlier turns."""
_WRAPS = (("<response>", "</response>"), ("<answer>", "</answer>"))
"""What some models write around the answer after their reasoning."""


def _said(role: str, number: int) -> Message:
    return Message(role=role, content=f"qword{number:03d}")


def _called(*probes: Probe, content: str = "", reasoning: str = "") -> Message:
    return Message(role="assistant", content=content, reasoning=reasoning, calls=tuple(_wire(p) for p in probes))


def _wire(probe: Probe) -> ToolCall:
    return ToolCall(id=probe.id, name=probe.name, arguments=json.dumps(probe.arguments))


def _result(probe: Probe, number: int) -> Message:
    return Message(role="tool", content=f"qword{number:03d}", call_id=probe.id)


def probed(render: Render, traits: Traits) -> Conversation:
    """How a model converses. Raises nothing: what cannot be found out is done in the plainest way."""
    talk = _Talk(render, traits)
    talk.orders()
    talk.reasonings()
    talk.calls()
    return talk.found()


class _Talk:
    """A conversation with a template, to find out its manner."""

    def __init__(self, render: Render, traits: Traits) -> None:
        self._render, self._traits = render, traits
        self._manner = Manner()
        self._form, self._native = OWN, False
        self._lost: list[str] = []
        self._reasoning: tuple[str, str] | None = None
        self._silent: tuple[str, ...] = ()
        self._channels = False

    @cached_property
    def _switch(self) -> Switch | None:
        return switch_of(self._text, self._traits.variables)

    def found(self) -> Conversation:
        """What was found."""
        variables = self._traits.variables
        efforts, switch = efforts_of(self._text, variables), self._switch
        return Conversation(
            manner=self._manner,
            form=self._form,
            native=self._native,
            reasoning=self._reasoning,
            silent=self._silent,
            efforts=efforts,
            switch=switch,
            quiet="" if switch else quiet_word(self._text, self._traits.source),
            lost=tuple(self._lost),
            channels=self._channels,
        )

    def orders(self) -> None:
        """What orders of roles it takes."""
        user, other, more = _said("user", 1), _said("user", 2), _said("user", 3)
        system, also = _said("system", 4), _said("system", 5)
        first, second = _said("assistant", 6), _said("assistant", 7)
        self._choose(
            "two messages of one role", "neighbours", ["native", "joined"], [user, other], [user, first, second, more]
        )
        self._choose("the system message", "system", ["native", "folded"], [system, user], [system, user, first, other])
        self._choose("several system messages", "systems", ["native", "joined"], [system, also, user])
        later = [user, first, system, other], [also, user, first, system, other]
        self._choose("later system messages", "later", ["native", "user", "moved"], *later)
        starts: list[Any] = [None, "", " ", ".", "Hello."]
        self._choose("an assistant's first message", "start", starts, [first, user], [system, first, user])
        nothing = Message(role="assistant", content="")
        self._choose("an empty assistant's message", "empty", ["native", "dropped"], [user, nothing, other])

    def reasonings(self) -> None:
        """How it marks reasoning, and where it keeps it in earlier turns."""
        source, tokens = self._traits.source, self._traits.tokens
        told = (t for t in _THOUGHTS if all(mark in source for mark in t))
        known = next((t for t in _THOUGHTS if set(t) <= tokens), None) or self._opened() or next(told, None)
        self._reasoning = self._traits.thinking or known
        said = [_said("user", 1), Message(role="assistant", content=_ANSWER, reasoning=_REASON)]
        answered = Message(role="assistant", content=_ANSWER)
        plain = self._shape([said[0], answered])
        for key in _KEYS:
            text = self._shape(said, self._manner._replace(reasoning=key))
            if text is not None and _REASON in text and _ANSWER in text:
                self._manner = self._manner._replace(reasoning=key)
                self._reasoning = self._reasoning or _around(text, plain or "", self._traits.tokens)
                break
        if plain is not None and is_harmony(plain):
            self._channels, self._reasoning = True, None
        elif self._traits.structure:
            self._silent = self._traits.structure
        elif plain is not None:
            if self._reasoning is None and self._switch is not None:
                self._reasoning = _THOUGHTS[0]  # the template only switches it
            wraps = (tag for pair in _WRAPS if self._reasoning and all(t in source for t in pair) for tag in pair)
            with_tools = self._shape([said[0], answered], tools=TOOLS) or ""
            around = [*self._around_answer(plain), *self._around_answer(with_tools, TOOLS), *wraps]
            self._silent = tuple(dict.fromkeys(around))

    def _opened(self) -> tuple[str, str] | None:
        """Tags around reasoning by the one that the beginning of an answer opens or closes."""
        asked = _said("user", 1)
        prompt = self._shape([asked], begin_answer=True) or ""
        tags = _THOUGHT_TAG.findall(prompt.rpartition(asked.content)[2])
        return (f"<{tags[-1]}>", f"</{tags[-1]}>") if tags else None

    def _around_answer(self, plain: str, tools: Sequence[str] = ()) -> tuple[str, ...]:
        """Tokens that the template puts around an answer, which are no part of it."""
        lead, _, tail = self._behind([plain], tools)[0].partition(_ANSWER)
        known, tail = set(self._reasoning or ()) | set(self._traits.ends), _before(tail, self._traits.ends)
        found = (token for token in self._traits.tokens - known if token.strip() and (token in lead or token in tail))
        return tuple(sorted(found, key=lambda one: (-len(one), one)))

    def _behind(self, texts: Sequence[str], tools: Sequence[str] = ()) -> list[str]:
        """What stands in each text behind the first question and the header of its answer."""
        asked = _said("user", 1)
        header = (self._shape([asked], tools=tools, begin_answer=True) or "").rpartition(asked.content)[2]
        rests = [text.rpartition(asked.content)[2] for text in texts]
        for rest in rests:
            header = self._shared(header, rest)
        return [rest[len(header) :] for rest in rests]

    def _shared(self, one: str, other: str) -> str:
        """The longest common beginning that cuts no token."""
        return common_begin(pieces(one, self._traits.tokens), pieces(other, self._traits.tokens))

    def calls(self) -> None:
        """How it writes calls, or that it gets our own instructions."""
        self._native = self._describes()
        form, told = self._learnt(), self._announced() if self._native else None
        if form is None or (form.bare and told in _ANNOUNCED):
            form = told
        if form is None:
            self._native, self._manner = False, self._manner._replace(calls="text")
            return
        self._form = form
        if self._native:
            self._choose_described()
        call, result, answer, also = _called(ONE), _result(ONE, 8), _said("assistant", 6), _said("user", 2)
        user, parts = _said("user", 1), [ONE.name, *ONE.arguments.values()]
        if not self._whole([user, call, result, answer, also], tools=TOOLS, words=parts):
            self._manner = self._manner._replace(calls="text")
            return
        beside = [[user, _called(ONE, content="qword009", reasoning=one), result] for one in ("", _REASON)]
        self._choose("text beside a call", "beside", ["native", "apart", "lost"], *beside, tools=TOOLS, words=parts)
        both = [user, _called(ONE, TWO), _result(ONE, 8), _result(TWO, 10), answer]
        every = [*parts, TWO.name, *TWO.arguments.values()]
        self._choose("parallel calls", "parallel", ["native", "split"], both, tools=TOOLS, words=every)
        if self._manner.parallel == "split":
            self._form = self._form._replace(several=False)

    def _choose_described(self) -> None:
        bare = tuple(re.sub(r'"description": "[^"]*", ', "", tool) for tool in TOOLS)
        if self._shape([_said("user", 1)], tools=bare, begin_answer=True) is None:
            self._manner = self._manner._replace(described=True)

    def _describes(self) -> bool:
        """Whether the template describes tools."""
        shown = self._shape([_said("user", 1)], tools=TOOLS, begin_answer=True)
        return shown is not None and ONE.name in shown and TWO.name in shown

    def _learnt(self) -> CallFormat | None:
        """The format of a rendered call, if what it renders can be read back."""
        rendered = []
        for arguments, ids in product(("object", "text"), ("native", "short", "numbered")):
            manner = self._manner._replace(arguments=arguments, ids=ids)  # type: ignore[arg-type]
            shape = [_said("user", 1), _called(ONE), _result(ONE, 8)]
            if self._shape(shape, manner, TOOLS, begin_answer=True) is None:
                continue
            rendered.append(manner)
            if (form := self._read_back(manner)) is not None:
                self._manner = manner
                return form
        self._manner = rendered[0] if rendered else self._manner
        return None

    def _read_back(self, manner: Manner) -> CallFormat | None:
        user = _said("user", 1)
        plain = self._shape([user, Message(role="assistant", content=_ANSWER)], manner, TOOLS) or ""
        one = self._shape([user, _called(ONE)], manner, TOOLS)
        two = self._shape([user, _called(ONE, TWO)], manner, TOOLS)
        if one is None:
            return None
        if is_harmony(one):
            return HARMONY
        both = [two] if two is not None and TWO.arguments["qcity"] in two else []
        single, usual, *pair = self._behind([one, plain, *both], TOOLS)
        single, double = self._cut(single, usual), self._cut(pair[0], usual) if pair else None
        ids = Ids(manner.ids)
        first, second = (probe._replace(id=ids.of(_wire(probe))) for probe in (ONE, TWO))
        found = learnt(single, double, first, second, self._traits.tokens - set(self._silent))
        # where both can read it, the library's parser knows more of a format without JSON
        candidates = [found, self._library(single)] if found and found.constrained else [self._library(single), found]
        described = tool_objects(TOOLS, manner)
        for form in candidates:
            if form is None or not _announces(form):
                continue
            form = self._unwrapped(form, manner)
            if read(form, _inside(form, single), described) == [(ONE.name, ONE.arguments)]:
                return form
        return None

    def _unwrapped(self, form: CallFormat, manner: Manner) -> CallFormat:
        """A format without tokens around the text beside a call, which a template writes around none as well."""
        beside = self._shape([_said("user", 1), _called(ONE, content=_ANSWER)], manner, TOOLS) or ""
        around = tuple(pieces(form.begin + form.open, self._traits.tokens)[:2])
        if len(around) < 2 or not set(around) <= self._traits.tokens or _ANSWER.join(around) not in beside:
            return form
        self._silent = tuple(dict.fromkeys([*self._silent, *around]))
        begin, start = (part.removeprefix("".join(around)) for part in (form.begin, form.open))
        return marked(form._replace(begin=begin, open=start), self._traits.tokens)

    def _cut(self, body: str, plain: str) -> str:
        """An assistant's turn as the model writes it: without what the template puts before and after any answer."""
        lead, _, tail = plain.partition(_ANSWER)
        if lead.strip():
            body = body.removeprefix(lead)
        tokens = self._traits.tokens
        body = body[: len(body) - len(common_end(pieces(tail, tokens), pieces(body, tokens)))]
        body = _before(body, self._traits.ends)
        around = [*(self._reasoning or ()), *self._silent]
        while (begun := next((t for t in around if body.lstrip().startswith(t)), None)) is not None:
            body = body.lstrip().removeprefix(begun)
        return html.unescape(body) if "&#34;" in body else body

    def _library(self, text: str) -> CallFormat | None:
        """A format that is known by its markers."""
        for begin, end, parser in self._traits.parsers:
            if begin and begin in text:
                return CallFormat(marker=begin, stop=end, parser=parser)
        return None

    def _announced(self) -> CallFormat | None:
        """A format that the template shows to the model, but does not render."""
        shown = self._shape([_said("user", 1)], tools=TOOLS, begin_answer=True) or ""
        without = self._shape([_said("user", 1)], begin_answer=True) or ""
        if re.search(r"<tool_call>\s*\{", shown):
            return OWN
        parsers = dict.fromkeys(self._traits.parsers)
        begins = [begin for begin, _, _ in parsers]
        called = self._shape([_said("user", 1), _called(ONE)], tools=TOOLS) or ""
        # a parser that does not read what the template renders, does not read what the model writes
        untried = [] if ONE.arguments["qcity"] in called else [one for one in parsers if begins.count(one[0]) == 1]
        others = [CallFormat(marker=begin, stop=end, parser=parser) for begin, end, parser in untried]
        told = (f for f in [*_ANNOUNCED, *others] if f.marker in shown and f.marker not in without)
        return next(told, None) or next((f for f in others if f.marker in self._traits.tokens), None)

    def _choose(
        self,
        what: str,
        field: str,
        options: Sequence[Any],
        *shapes: Sequence[Message],
        tools: Sequence[str] = (),
        words: Sequence[str] = (),
    ) -> None:
        """The first option with which the template takes all shapes whole; if there is none, what gets lost is kept."""
        for option in options:
            manner = self._manner._replace(**{field: option})
            if all(self._whole(shape, manner, tools, words) for shape in shapes):
                self._manner = manner
                return
        self._lost.append(what)

    def _whole(
        self,
        shape: Sequence[Message],
        manner: Manner | None = None,
        tools: Sequence[str] = (),
        words: Sequence[str] = (),
    ) -> bool:
        """Whether every word of a conversation is rendered, and once."""
        text = self._shape(shape, manner, tools, begin_answer=True)
        contents = [one.content for one in shape if one.content]
        return text is not None and all(text.count(word) == 1 for word in contents) and all(w in text for w in words)

    def _shape(
        self,
        shape: Sequence[Message],
        manner: Manner | None = None,
        tools: Sequence[str] = (),
        *,
        begin_answer: bool = False,
    ) -> str | None:
        """A rendered conversation, None if the template refuses it."""
        manner = manner or self._manner
        given = tool_objects(tools, manner) if tools else None
        return self._text(turns(shape, manner, self._form), given, {}, begin_answer)

    def _text(
        self, given: Sequence[Turn], tools: Sequence[Turn] | None, variables: Mapping[str, Any], begin_answer: bool
    ) -> str | None:
        try:
            return self._render(given, tools, variables, begin_answer=begin_answer)
        except Exception:  # noqa: BLE001  # a template may raise anything
            return None


def _around(text: str, plain: str, tokens: Iterable[str]) -> tuple[str, str] | None:
    """The texts around reasoning, from a turn with reasoning and one without."""
    before, _, rest = text.partition(_REASON)
    end = rest.partition(_ANSWER)[0].strip()
    head = before[len(common_begin(pieces(before, tokens), pieces(plain, tokens))) :].strip()
    return (head, end) if head and end and head != end else None


def _announces(form: CallFormat) -> bool:
    """Whether a call can be told from text."""
    return form.parser is not None or bool((form.begin + form.open).strip())


def _inside(form: CallFormat, text: str) -> str:
    """The part of a text that holds calls."""
    if form.marker:
        text = text.partition(form.marker)[2]
    return text.partition(form.stop)[0] if form.stop else text


def _before(text: str, ends: Sequence[str]) -> str:
    """A text up to the first token that ends an answer."""
    return text[: min((at for at in (text.find(end) for end in ends if end) if at >= 0), default=len(text))]
