"""A request's prompt: its conversation, changed as the model's template needs it, rendered and tokenized."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from msgspec.structs import replace

from agent.loader.chat.calls import OWN, CallFormat, common_begin
from agent.loader.chat.probe import Conversation
from agent.loader.chat.speech import THINK
from agent.loader.chat.turns import PLAIN, Manner, arguments_of, instructions, plain_text, tool_objects, turns
from agent.loader.generation import Advance, nothing
from agent.loader.lengths import exceeds
from agent.loader.mlx.template import ChatTemplate
from agent.wire.frames import EFFORTS, Generate, Message, ToolCall

EFFORTS_OFF = ("none", "minimal")


class Prompt(NamedTuple):
    """Token ids; whether the answer begins ``inside`` the reasoning; the format in which the prompt asks for calls."""

    tokens: list[int]
    inside: bool
    form: CallFormat


class TemplateRefused(Exception):
    """The template takes no form of the conversation; the text names the turn and the reason."""


class TooLong(Exception):
    """The prompt has ``least_tok`` tokens or more, which do not fit."""

    def __init__(self, least_tok: int) -> None:
        self.least_tok = least_tok


class _Rendered(NamedTuple):
    """A prompt as text, in which ``mark`` breaks the control words of users."""

    text: str
    mark: str
    inside: bool
    form: CallFormat

    @property
    def plain(self) -> str:
        """The text without the marks."""
        return self.text.replace(self.mark, "") if self.mark else self.text


@dataclass(frozen=True)
class _Attempt:
    manner: Manner
    form: CallFormat
    native: bool


class PromptWriter:
    """Writes the prompts of one model. ``talk`` is what the probe found."""

    def __init__(self, template: ChatTemplate, talk: Conversation) -> None:
        self._template, self._talk = template, talk

    def write(
        self, request: Generate, limit_tok: int = sys.maxsize, advance: Advance = nothing, *, known_chars: int = 0
    ) -> Prompt:
        """The prompt of a conversation. Raises TemplateRefused, and TooLong where it surely exceeds ``limit_tok``; of
        its texts ``known_chars`` were found to fit before."""
        rendered = self._written(request, advance)
        if least := exceeds([rendered.text], limit_tok, self._count, advance, known_chars=known_chars):
            raise TooLong(least)
        advance()
        tokens = self._template.shielded_tokens(rendered.text, rendered.mark)
        return Prompt(tokens, rendered.inside, rendered.form)

    def _count(self, part: str) -> int:
        return len(self._template.tokens(part))

    def _written(self, request: Generate, advance: Advance) -> _Rendered:
        messages = [self._parted(message) for message in request.messages]
        if not self._template.exists:
            told = instructions(request.tools, OWN) if request.tools else ""
            given, mark = self._template.shield(turns(messages, PLAIN._replace(system="native"), OWN, told))
            return _Rendered(plain_text(given), mark, False, OWN)
        first: Exception | None = None
        kept: _Rendered | None = None
        for attempt in self._attempts(messages, request):
            advance()
            try:
                rendered = self._rendered(messages, request, attempt)
            except Exception as error:  # noqa: BLE001  # a template may raise anything
                first = first or error
                continue
            kept = kept or rendered
            beside = "text beside a call" not in self._talk.lost
            if not _lost(messages, rendered.plain, beside=beside, marks=(*THINK, *(self._talk.reasoning or ()))):
                return rendered
        if kept is None:
            assert first is not None
            raise TemplateRefused(self._reason(messages, request, first))
        return kept

    def _attempts(self, messages: Sequence[Message], request: Generate) -> Iterator[_Attempt]:
        """As the probe found it; then with calls as text; then in the form that every template takes."""
        talk = self._talk
        calls = any(message.calls or message.role == "tool" for message in messages)
        yield _Attempt(talk.manner, talk.form, talk.native)
        if calls:
            yield _Attempt(talk.manner._replace(calls="text"), talk.form, talk.native)
        yield _Attempt(PLAIN, talk.form if talk.native and not calls else OWN, talk.native and not calls)
        if request.tools or calls:
            yield _Attempt(PLAIN, OWN, native=False)

    def _rendered(self, messages: list[Message], request: Generate, attempt: _Attempt) -> _Rendered:
        told = instructions(request.tools, attempt.form) if request.tools and not attempt.native else ""
        if self._talk.quiet and _off(request):
            told = f"{self._talk.quiet}\n\n{told}".strip()
        given = turns(messages, attempt.manner, attempt.form, told)
        tools = tool_objects(request.tools, attempt.manner) if request.tools and attempt.native else []
        # documents for the template come as variables
        (given, tools, variables), mark = self._template.shield((given, tools, self.variables(request)))
        text = self._template.render(given, tools, variables, begin_answer=True)
        if not text:
            raise ValueError("an empty prompt")
        if self._talk.reasoning is None:
            return _Rendered(text, mark, False, attempt.form)
        before = self._template.render(given, tools, variables, begin_answer=False)
        return _Rendered(text, mark, _inside(text, before, self._talk.reasoning), attempt.form)

    def variables(self, request: Generate) -> dict[str, Any]:
        """The template's variables."""
        talk = self._talk
        found: dict[str, Any] = {}
        effort = request.reasoning_effort
        if effort is not None and talk.efforts is not None:
            found[talk.efforts[0]] = nearest(effort, talk.efforts[1])
        if talk.switch is not None and (effort is not None or _off(request)):
            value = talk.switch.off if _off(request) else talk.switch.on
            found |= {} if value is None else {talk.switch.variable: value}
        return found | (json.loads(request.template_args) if request.template_args else {})

    def _parted(self, message: Message) -> Message:
        """An earlier answer with its reasoning apart, which some clients keep in its content."""
        marks = self._talk.reasoning
        if marks is None or message.role != "assistant" or message.reasoning or marks[1] not in message.content:
            return message
        before, _, content = message.content.partition(marks[1])
        if before.lstrip()[: len(marks[0])] != marks[0]:
            return message
        return replace(message, reasoning=before.lstrip().removeprefix(marks[0]).strip(), content=content.lstrip())

    def _reason(self, messages: Sequence[Message], request: Generate, error: Exception) -> str:
        """Which turn is refused and why; the template's own words only where they quote nothing."""
        attempt = _Attempt(PLAIN, OWN, native=False)
        taken, refused = 0, len(messages)
        while refused - taken > 1:  # bisected: there may be thousands of turns
            count = (taken + refused) // 2
            try:
                self._rendered(list(messages[:count]), replace(request, tools=()), attempt)
                taken = count
            except Exception:  # noqa: BLE001  # as before
                refused = count
        turn = refused - 1
        said = str(error)
        fixed = said if 0 < len(said) < 200 and said in self._template.source else type(error).__name__
        return f"messages[{turn}]: the model's chat template refused this {messages[turn].role} message: {fixed}"


def unabridged(messages: Sequence[Message]) -> list[str]:
    """The texts of a conversation that stand whole in every prompt of it: of earlier answers, templates leave out what
    they take for reasoning."""
    return [message.content.strip() for message in messages if message.role != "assistant"]


def _inside(prompt: str, before: str, marks: tuple[str, str]) -> bool:
    """Whether the template itself has opened the reasoning, after the last message; text from users does not count."""
    added = prompt[len(common_begin(before, prompt)) :]
    return added.rfind(marks[0]) > added.rfind(marks[1])


def nearest(effort: str, taken: Sequence[str]) -> str:
    """The effort of those that a template takes that is next to the wanted one, the smaller of two."""
    at = EFFORTS.index(effort)
    return min(taken, key=lambda one: (abs(EFFORTS.index(one) - at), EFFORTS.index(one)))


def _off(request: Generate) -> bool:
    """Whether the model is not to reason."""
    if request.reasoning_effort is not None:
        return request.reasoning_effort in EFFORTS_OFF
    return request.must_call is not None or request.schema is not None


def _lost(messages: Sequence[Message], text: str, *, beside: bool, marks: Sequence[str]) -> bool:
    """Whether a text or a call of a message is missing in a prompt. Answers are not looked for if they hold ``marks``
    of reasoning, where templates cut them, nor text beside calls unless ``beside``."""
    squeezed: str | None = None
    for message in messages:
        if any(word not in text for call in message.calls for word in _words(call)):
            return True
        content = message.content.strip() if beside or not message.calls else ""
        if not content or (message.role == "assistant" and any(mark in content for mark in marks)) or content in text:
            continue
        if json.dumps(content, ensure_ascii=False)[1:-1] in text:
            continue
        if squeezed is None:
            squeezed = re.sub(r"\s+", "", text)
        if re.sub(r"\s+", "", content) not in squeezed:
            return True
    return False


def _words(call: ToolCall) -> list[str]:
    """A call's name, and those of its arguments that every template writes alike."""
    texts = [value for value in arguments_of(call.arguments).values() if isinstance(value, str)]
    return [call.name, *(one for one in texts if one.isascii() and one.isalnum())]
