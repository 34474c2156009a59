"""The cells of the matrix of model families: each runs one kind of request through prompt, grammar and parser."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from agent.loader.chat.calls import OWN, CallFormat, Found, written
from agent.loader.chat.speech import Markers, Said, Speech
from agent.loader.mlx.prompt import Prompt, TemplateRefused
from agent.wire.frames import Generate, Message, ToolCall
from tests.families import Family, Masked, Wrong

PARIS: Found = ("get_weather", {"city": "Paris"})
LONDON: Found = ("get_weather", {"city": "London"})
TOOLS = tuple(
    json.dumps({"name": name, "description": f"{name} does it", "parameters": parameters})
    for name, parameters in {
        "get_weather": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "book": {"type": "object", "properties": {"nights": {"type": "integer"}}, "required": ["nights"]},
    }.items()
)
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
PROSE = 'The {braces}, the <tags> and "quotes" stay.'


class Limit(Exception):
    """The model's own limit, as a sentence."""


class Cell(NamedTuple):
    """What came out: ``ok``, ``limit`` or ``WRONG``, and why."""

    state: str
    note: str = ""


def cell(family: Family, name: str) -> Cell:
    """One cell. Raises nothing."""
    try:
        return Cell("ok", CELLS[name](family) or "")
    except Limit as limit:
        return Cell("limit", str(limit))
    except TemplateRefused as refused:
        return Cell("WRONG" if _takes_anything(family) else "limit", str(refused))
    except Exception as error:  # noqa: BLE001  # whatever it is, the cell is wrong
        return Cell("WRONG", f"{type(error).__name__}: {error}")


def _takes_anything(family: Family) -> bool:
    """Whether the bare template takes a question, an answer and a question."""
    plainest = [{"role": role, "content": "text"} for role in ("user", "assistant", "user")]
    try:
        return bool(family.template.render(plainest, None, {}, begin_answer=True))
    except Exception:  # noqa: BLE001  # a template may raise anything
        return False


# ---- conversations ----


def said(role: str, number: int, **more: Any) -> Message:
    """A message whose text stands nowhere else."""
    return Message(role=role, content=f"text {number:02d} of the {role}", **more)


def called(*calls: Found, ids: Sequence[str] = ("call_0001", "call_0002"), **more: Any) -> Message:
    """An assistant's message with calls."""
    made = (
        ToolCall(id=i, name=n, arguments=a if isinstance(a, str) else json.dumps(a))
        for i, (n, a) in zip(ids, calls, strict=False)
    )
    return Message(role="assistant", content=more.pop("content", ""), calls=tuple(made), **more)


def ask(*messages: Message, **more: Any) -> Generate:
    """A request."""
    return Generate(id=1, model="m", max_tokens=9, messages=messages or (said("user", 1),), **more)


def _holds(family: Family, request: Generate, lost: str, *words: str) -> str:
    """The prompt's text, which holds every message once, and the words. Raises Wrong, or Limit for what the probe knows
    to be ``lost``."""
    text = family.text(family.prompts.write(request).tokens)
    contents = {one.content: text.count(one.content) for one in request.messages if one.content}
    odd = [f"{count} times {content!r}" for content, count in contents.items() if count != 1]
    odd += [f"without {word!r}" for word in words if word not in text]
    if odd and lost in family.talk.lost:
        raise Limit(f"the template leaves out {lost}")
    if odd:
        raise Wrong(f"the prompt has {', '.join(odd)}")
    return text


def plain(family: Family) -> str | None:
    """A question, a second one, and the answer."""
    first, answer, second = said("user", 1), said("assistant", 2), said("user", 3)
    _holds(family, ask(first), "")
    _holds(family, ask(first, answer, second), "")
    request = _with(family, {"plain": family.writes.vars}, "plain")
    prompt = family.prompts.write(request)
    _expect(family.answer(request, prompt, _led(family, prompt, family.writes.plain)), text=family.writes.plain_text)
    return None


def system(family: Family) -> str | None:
    """A system message."""
    lost = "the system message"
    _holds(family, ask(said("system", 1), said("user", 2)), lost)
    _holds(family, ask(said("system", 1), said("user", 2), said("assistant", 3), said("user", 4)), lost)
    _holds(family, ask(said("system", 1), said("user", 2), tools=TOOLS), lost, "get_weather", "book")
    return "in the first question" if family.talk.manner.system == "folded" else None


def two_systems(family: Family) -> str | None:
    """Two system messages at the beginning."""
    _holds(family, ask(said("system", 1), said("system", 2), said("user", 3)), "several system messages")
    return "joined" if "joined" in (family.talk.manner.systems,) or family.talk.manner.system == "folded" else None


def later_system(family: Family) -> str | None:
    """A system message in the middle."""
    turns = (said("system", 1), said("user", 2), said("assistant", 3), said("system", 4), said("user", 5))
    _holds(family, ask(*turns), "later system messages")
    return {"user": "as a user's", "moved": "at the beginning"}.get(family.talk.manner.later)


def neighbours(family: Family) -> str | None:
    """Users in a row, and assistants."""
    lost = "two messages of one role"
    _holds(family, ask(said("user", 1), said("user", 2)), lost)
    _holds(family, ask(said("user", 1), said("assistant", 2), said("assistant", 3), said("user", 4)), lost)
    return "joined" if family.talk.manner.neighbours == "joined" else None


def assistant_first(family: Family) -> str | None:
    """An assistant's message at the beginning."""
    _holds(family, ask(said("assistant", 1), said("user", 2)), "an assistant's first message")
    return "after an empty question" if family.talk.manner.start is not None else None


# ---- calls ----


def auto(family: Family) -> str | None:
    """Tools that the model may call: prose stays prose, a call is constrained and read."""
    request = _with(family, {"call": family.writes.vars}, "call", tools=TOOLS)
    prompt = family.prompts.write(request)
    text = family.text(prompt.tokens)
    if not all(name in text for name in ("get_weather", "book")):
        raise Wrong("the prompt does not describe the tools")
    sample = _sample(family, prompt, [PARIS])
    _expect(family.answer(request, prompt, sample), calls=[PARIS])
    _expect(family.answer(request, prompt, _opened(family, prompt) + _spoken(family, PROSE)), text=PROSE)
    return _constrained(family, request, prompt, sample)


def required(family: Family) -> str | None:
    """A call that must be made."""
    return _must(family, "")


def named(family: Family) -> str | None:
    """One function that must be called."""
    note = _must(family, "get_weather")
    request = ask(tools=TOOLS, must_call="get_weather")
    prompt = family.prompts.write(request)
    other = _bare(family, _sample(family, prompt, [PARIS], forced=True)).replace("get_weather", "book")
    if not _masks(family, request, prompt, _opened(family, prompt) + other):
        raise Wrong("another function can be called")
    return note


def _must(family: Family, name: str) -> str | None:
    request = ask(tools=TOOLS, must_call=name)
    prompt = family.prompts.write(request)
    sample = _opened(family, prompt) + _bare(family, _sample(family, prompt, [PARIS], forced=True))
    if _masks(family, request, prompt, sample):  # the grammar has the white space of the template
        form = prompt.form if prompt.form.constrained else OWN
        sample = _opened(family, prompt) + written(form, [PARIS])
    _expect(family.answer(request, prompt, sample), calls=[PARIS])
    if not _masks(family, request, prompt, _opened(family, prompt) + _spoken(family, "Sorry, no.")):
        raise Wrong("it can be left out")
    return _constrained(family, request, prompt, sample)


def parallel(family: Family) -> str | None:
    """Two calls in one turn, whole and in the history."""
    both = called(PARIS, LONDON)
    results = (said("tool", 3, call_id="call_0001"), said("tool", 4, call_id="call_0002"))
    _holds(family, ask(said("user", 1), both, *results, tools=TOOLS), "parallel calls", "Paris", "London")
    request = _with(family, {"call": family.writes.vars}, "call", tools=TOOLS)
    prompt = family.prompts.write(request)
    if not prompt.form.several and (family.talk.channels or family.talk.manner.parallel == "split"):
        raise Limit("one call in a turn")
    if family.writes.call and not family.writes.two_calls and family.talk.native:
        return None  # nobody knows what it writes
    sample = _sample(family, prompt, [PARIS, LONDON])
    _expect(family.answer(request, prompt, sample), calls=[PARIS, LONDON])
    return None


def result(family: Family) -> str | None:
    """A call's result, and the conversation after it."""
    turns = (said("user", 1), called(PARIS), said("tool", 3, call_id="call_0001"))
    _holds(family, ask(*turns, tools=TOOLS), "", "Paris", "get_weather")
    _holds(family, ask(*turns, said("assistant", 4), said("user", 5), tools=TOOLS), "", "Paris")
    _holds(family, ask(*turns, said("assistant", 4), said("user", 5)), "", "Paris")
    return "as text" if family.talk.manner.calls == "text" else None


def beside(family: Family) -> str | None:
    """Text beside a call, with reasoning and without."""
    lost = "text beside a call"
    for reasoning in ("", "a thought"):
        turn = called(PARIS, content="text beside", reasoning=reasoning)
        _holds(family, ask(said("user", 1), turn, said("tool", 3, call_id="call_0001"), tools=TOOLS), lost, "Paris")
    return "a turn of its own" if family.talk.manner.beside == "apart" else None


def echo(family: Family) -> str | None:
    """An own answer, a call and then text, as the history of the next request."""
    request = _with(family, {"call": family.writes.vars}, "call", tools=TOOLS)
    prompt = family.prompts.write(request)
    answered = family.answer(request, prompt, _sample(family, prompt, [PARIS]))
    turn = Message(role="assistant", content=answered.text, reasoning=answered.reasoning, calls=answered.calls)
    back = said("tool", 3, call_id=answered.calls[0].id)
    spoken = family.answer(request, prompt, _opened(family, prompt) + _spoken(family, "It is text 04, warm."))
    last = Message(role="assistant", content=spoken.text, reasoning=spoken.reasoning)
    _holds(family, ask(said("user", 1), turn, back, last, said("user", 5), tools=TOOLS), "", "Paris")
    return None


def broken(family: Family) -> str | None:
    """Calls in the history whose arguments are missing, cut off, or no object."""
    texts = ("", '{"city": "Cut', '"Only a Text"', '[1, "List"]')
    turns: list[Message] = []
    for number, text in enumerate(texts):
        turns += [said("user", 10 + number), called(("get_weather", text), ids=[f"call_{number:04d}"])]
        turns += [said("tool", 20 + number, call_id=f"call_{number:04d}"), said("assistant", 30 + number)]
    _holds(family, ask(*turns, said("user", 5), tools=TOOLS), "", "Cut", "Only a Text", "List")
    return None


def foreign_ids(family: Family) -> str | None:
    """Ids of other servers, one of them twice."""
    turns = [said("user", 1)]
    for number, one in enumerate(("toolu_01A09q90qw90lq917835lq9", "functions.book:0", "a b/é", "c", "c")):
        call = called(("book", {"nights": 7000 + number}), ids=[one])
        turns += [call, said("tool", 10 + number, call_id=one)]
    _holds(family, ask(*turns, tools=TOOLS), "", *(f"700{number}" for number in range(5)))
    return None


# ---- reasoning, schema, stream ----


def reasoning_on(family: Family) -> str | None:
    """Reasoning apart from the answer, and from a call."""
    writes = family.writes
    if writes.reasoning is None and not family.talk.reasons:
        raise Limit("does not reason")
    if not family.talk.reasons:
        raise Wrong(f"it reasons, which was not found: {writes.reasoning!r}")
    request = ask(reasoning_effort="high")
    if writes.reasoning_vars and family.talk.efforts is None:
        wanted = ask(template_args=json.dumps(writes.reasoning_vars))
        if family.prompts.write(request).tokens != family.prompts.write(wanted).tokens:
            raise Wrong(f"effort high does not do what {sorted(writes.reasoning_vars)} does")
    prompt = family.prompts.write(request)
    for sample in filter(None, (writes.reasoning, None if writes.reasoning else _thought(family, prompt, "A"))):
        _expect(family.answer(request, prompt, sample), text="A", reasoning="R")
    if writes.call_with_reasoning and family.talk.form is not OWN:
        called_for = ask(tools=TOOLS, reasoning_effort="high")
        found = family.answer(called_for, family.prompts.write(called_for), writes.call_with_reasoning)
        _expect(found, calls=[PARIS], reasoning="R")
    return None


def reasoning_off(family: Family) -> str | None:
    """No reasoning."""
    if not family.talk.reasons:
        raise Limit("does not reason")
    off, on = (family.prompts.write(ask(reasoning_effort=effort)) for effort in ("none", "high"))
    if off.tokens == on.tokens:
        raise Limit("its reasoning cannot be switched off")
    if off.inside:
        raise Wrong("the prompt opens the reasoning that is switched off")
    if family.talk.switch is None and not family.talk.quiet:
        return "as little as it can"
    return None


def reasoning_low(family: Family) -> str | None:
    """Little reasoning."""
    if not family.talk.reasons:
        raise Limit("does not reason")
    if family.talk.efforts is None:
        raise Limit("its effort has no levels")
    low, high = (family.prompts.write(ask(reasoning_effort=effort)).tokens for effort in ("low", "high"))
    if low == high:
        raise Limit("its effort has no levels")
    return None


def schema(family: Family) -> str | None:
    """An answer that follows a schema, and one that may be a call as well."""
    for tools in ((), TOOLS):
        request = ask(schema=SCHEMA, tools=tools)
        prompt = family.prompts.write(request)
        lead = _opened(family, prompt)
        _expect(family.answer(request, prompt, lead + _final(family, '{"a": 5}')), text='{"a": 5}')
        for bad in ('{"a": "x"}', "prose", "{}"):
            if not _masks(family, request, prompt, lead + _final(family, bad)):
                raise Wrong(f"{bad} is allowed")
    return None


def streamed(family: Family) -> str | None:
    """Each sample in two pieces, cut anywhere, and in single characters."""
    for request, sample in _samples(family):
        prompt = family.prompts.write(request)
        markers = family.planned(request, prompt).markers
        parsed = partial(_parsed, markers, request.tools, prompt.inside)
        whole = parsed([sample])
        cuts = [[sample[:at], sample[at:]] for at in range(1, len(sample))]
        for pieces in [*cuts, list(sample)]:
            if parsed(pieces) != whole:
                raise Wrong(f"differs when cut as {pieces[0][-30:]!r}, {pieces[1][:30]!r}")
    return None


CELLS: dict[str, Callable[[Family], str | None]] = {
    "plain": plain,
    "system": system,
    "two systems": two_systems,
    "later system": later_system,
    "users in a row": neighbours,
    "assistant first": assistant_first,
    "tools: auto": auto,
    "required": required,
    "named": named,
    "parallel": parallel,
    "tool result": result,
    "text beside a call": beside,
    "echo": echo,
    "broken arguments": broken,
    "foreign ids": foreign_ids,
    "reasoning on": reasoning_on,
    "off": reasoning_off,
    "low": reasoning_low,
    "schema": schema,
    "streamed": streamed,
}
"""Columns by name."""


# ---- samples ----


def _with(family: Family, variables: dict[str, dict[str, Any]], kind: str, **more: Any) -> Generate:
    held = variables[kind]
    return ask(template_args=json.dumps(held) if held else None, **more)


def _sample(family: Family, prompt: Prompt, calls: list[Found], *, forced: bool = False) -> str:
    """What the model writes to make calls: its own sample where the prompt asks for its own format."""
    form, talk = prompt.form, family.talk
    known = family.writes.call if len(calls) == 1 else family.writes.two_calls
    if (
        known is not None
        and form == talk.form
        and (talk.native or form is not OWN)
        and (form.constrained or not forced)
    ):
        return _led(family, prompt, known)
    return _led(family, prompt, written(form, calls))


def _led(family: Family, prompt: Prompt, sample: str) -> str:
    """A sample that ends the reasoning first, where the prompt has opened it."""
    reasoning = family.talk.reasoning
    return sample if reasoning is not None and reasoning[1] in sample else _opened(family, prompt) + sample


def _bare(family: Family, sample: str) -> str:
    """A sample without its reasoning."""
    end = family.talk.reasoning[1] if family.talk.reasoning else None
    return sample.partition(end)[2].lstrip() if end is not None and end in sample else sample


def _opened(family: Family, prompt: Prompt) -> str:
    """The end of the reasoning that the prompt has opened."""
    assert not prompt.inside or family.talk.reasoning is not None
    return f"R{family.talk.reasoning[1]}" if prompt.inside and family.talk.reasoning else ""


def _thought(family: Family, prompt: Prompt, text: str) -> str:
    if family.talk.reasoning is None:
        return ""
    begin, end = family.talk.reasoning
    return f"{'' if prompt.inside else begin}R{end}{text}"


def _spoken(family: Family, text: str) -> str:
    """Text as the model writes it."""
    return _bare(family, family.writes.plain).replace(family.writes.plain_text, text)


def _final(family: Family, text: str) -> str:
    """An answer as the grammar of a schema wants it."""
    return f"<|channel|>final<|message|>{text}" if family.talk.channels else text


def _samples(family: Family) -> Iterator[tuple[Generate, str]]:
    writes = family.writes
    request = _with(family, {"call": writes.vars}, "call", tools=TOOLS)
    prompt = family.prompts.write(request)
    yield request, _sample(family, prompt, [PARIS])
    if prompt.form.several and not (family.writes.call and not family.writes.two_calls):
        yield request, _sample(family, prompt, [PARIS, LONDON])
    yield request, _opened(family, prompt) + _spoken(family, PROSE)
    if writes.reasoning is not None:
        yield _with(family, {"call": writes.reasoning_vars}, "call"), writes.reasoning


# ---- what is expected ----


def _parsed(markers: Markers, tools: Sequence[str], inside: bool, pieces: Sequence[str]) -> tuple[Any, ...]:
    speech = Speech(markers, tools, reasoning=inside)
    found = Said()
    for piece in pieces:
        found += speech.feed(piece)
    return _shown(found + speech.finish())


def _shown(found: Said) -> tuple[Any, ...]:
    calls = [(call.name, json.loads(call.arguments)) for call in found.calls]
    return found.text.strip(), found.reasoning.strip(), calls


def _expect(found: Said, *, text: str = "", reasoning: str | None = None, calls: Sequence[Found] = ()) -> None:
    shown = _shown(found)
    wanted = (text, shown[1] if reasoning is None else reasoning, list(calls))
    if shown != wanted:
        raise Wrong(f"expected {wanted}, got {shown}")


def _masks(family: Family, request: Generate, prompt: Prompt, text: str) -> bool:
    try:
        family.answer(request, prompt, text)
    except Masked:
        return True
    return False


def _constrained(family: Family, request: Generate, prompt: Prompt, sample: str) -> str | None:
    """That an argument of a wrong type is masked, or else named after the answer."""
    planned, notes = family.planned(request, prompt), []
    if '"Paris"' in sample and (planned.plan.whole or planned.plan.announced):
        if not _masks(family, request, prompt, sample.replace('"Paris"', "7")):
            raise Wrong("an argument of a wrong type is allowed")
    elif planned.unmet is None or planned.unmet("get_weather", '{"city": 7}') is None:
        raise Wrong("an argument of a wrong type is neither masked nor named")
    else:
        notes.append("arguments are checked, not constrained")
    if _told(family, prompt.form):
        notes.append("in our own format")
    return "; ".join(notes) or None


def _told(family: Family, form: CallFormat) -> bool:
    return not family.talk.native and form is OWN
