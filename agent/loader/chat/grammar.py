"""The grammar that constrains an answer: a schema, or calls as this model writes them. Pure.

Free text is not constrained at all. Where it announces a call, the rest of the call is: the grammar begins behind the
marker, and ends with the call.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from agent.loader.chat import harmony
from agent.loader.chat.calls import ID, NUMBER, OWN, CallFormat

Spell = Callable[[str], str]
"""A literal as Lark: strings, and the tokens that llguidance does not take as text."""
SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""JSON formatted as in most training data, without unbounded white space."""
_ANY_SPACING = {"whitespace_flexible": True, "whitespace_pattern": "[ \\t\\n]{0,16}"}
"""JSON as a model likes it, for calls that it makes of its own accord."""
_SPACE = "SPACE: /[ \\t\\n]{1,16}/\n"
_LARK = {ID: "/[a-zA-Z0-9]{9}/", NUMBER: "/[0-9]{1,3}/"}
_ANY_ID = "/[a-zA-Z0-9_-]{1,64}/"
_PIECE = re.compile(r'<[^<>\s"]+>|\[/?[A-Z_]+\]|"[^"]*"|[{}\[\]]|[:,] ?|\s+|[^"{}\[\],:\s<]+|["<]')
"""Control words, the tokens of JSON, white space, and words."""
_KEYS = ('"arguments"', '"parameters"')


class Arguments(NamedTuple):
    """A tool's name and the schema of its arguments, ready for the grammar."""

    name: str
    schema: Any


class Plan(NamedTuple):
    """What constrains an answer. ``whole`` is the grammar of all of it, None for free text; ``call`` makes the grammar
    of what follows the announcement of a call, which ``announced`` finds in the free text; None for any text."""

    whole: str | None = None
    announced: re.Pattern[str] | None = None
    call: Callable[[re.Match[str]], str | None] | None = None
    example: str = ""

    def trial(self) -> str | None:
        """The grammar of a call that is announced in the usual way, to find out whether it compiles."""
        found = self.announced.search(self.example) if self.announced is not None else None
        return None if found is None or self.call is None else self.call(found)


def schema_grammar(schema: Any, form: CallFormat, spell: Spell) -> str:
    """The grammar of an answer that follows a schema."""
    return f"start: {_answer(form, spell)}\nanswer: {_json(schema)}\n{_lead(spell) if form.channels else ''}"


def call_grammar(tools: Sequence[Arguments], form: CallFormat, spell: Spell, schema: Any = None) -> str:
    """The grammar of an answer that is a call, or, with a schema, follows that."""
    form = form if form.constrained else OWN
    rules = "".join(f"a{n}: {_json(tool.schema)}\n" for n, tool in enumerate(tools))
    head = f"lead? {_literal(form.open, spell)}" if form.channels else _literal(form.begin + form.open, spell)
    tail = _literal(form.close + form.end, spell)
    written = f"call: {head} ( {_named(tools, form, spell)} ) {tail}\n{rules}"
    lead = _lead(spell) if form.channels else ""
    if schema is None:
        return f"start: call\n{written}{lead}"
    if form.bare:  # the lexer does not go back where an answer begins as a call does
        written = f"call: {_apart(tools, form, spell)}\n{rules}"
    return f"start: call | {_answer(form, spell)}\nanswer: {_json(schema)}\n{written}{lead}"


def announced(tools: Sequence[Arguments], form: CallFormat, spell: Spell) -> Plan:
    """Free text in which every call follows its tool's schema."""
    if not form.constrained:
        return Plan()
    if form.channels:
        name = tools[0].name if tools else ""
        header = form.open + name + form.sep
        return Plan(announced=harmony.CALL_HEADER, call=_after_header(tools, form, spell), example=header)
    begin = form.begin + form.open
    marker = form.marker or begin.rstrip()
    pattern = (r"\A\s*" if form.bare else "") + re.escape(marker)
    if form.optional:
        pattern = rf"(?P<code>{pattern})|\A\s*{re.escape(form.open.strip())}"
    call = _after_marker(tools, form, spell, begin.partition(marker)[2])
    return Plan(announced=re.compile(pattern), call=call, example=marker)


def _after_marker(
    tools: Sequence[Arguments], form: CallFormat, spell: Spell, begin: str
) -> Callable[[re.Match[str]], str | None]:
    def call(found: re.Match[str]) -> str | None:
        marked = not form.optional or found["code"] is not None
        lead = begin if marked else ""  # what announced it is the whole beginning
        rules = "".join(f"a{n}: {_json(tool.schema, _ANY_SPACING)}\n" for n, tool in enumerate(tools))
        first = _loose_calls(lead, tools, form, spell)
        more = _loose_calls(form.between + form.open, tools, form, spell)
        more = f"( {more} )*" if form.several and form.begin else ""
        end = _loose(form.end, spell, as_json=False).removesuffix("SPACE?")
        return f"start: SPACE? ( {first} ) {more} {end}\n{rules}{_SPACE}"

    return call


def _after_header(tools: Sequence[Arguments], form: CallFormat, spell: Spell) -> Callable[[re.Match[str]], str | None]:
    known = {tool.name: tool.schema for tool in tools}

    def call(found: re.Match[str]) -> str | None:
        if (schema := known.get(found[1])) is None:
            return None
        return f"start: {_json(schema)} {_literal(form.close, spell)}\n"

    return call


def _named(tools: Sequence[Arguments], form: CallFormat, spell: Spell) -> str:
    sep = _literal(form.sep, spell)
    return " | ".join(f"{_literal(tool.name, spell)} {sep} a{n}" for n, tool in enumerate(tools))


def _apart(tools: Sequence[Arguments], form: CallFormat, spell: Spell) -> str:
    """Calls token by token of their JSON."""

    def apart(text: str) -> str:
        return " ".join(_literal(piece, spell) for piece in _PIECE.findall(text))

    head, tail = form.begin + form.open, apart(form.close + form.end)
    return " | ".join(f"{apart(head + tool.name + form.sep)} a{n} {tail}" for n, tool in enumerate(tools))


def _loose_calls(lead: str, tools: Sequence[Arguments], form: CallFormat, spell: Spell) -> str:
    """Calls behind ``lead``, which ends where the name begins, in any white space. Where they are JSON, name and
    arguments are enough: a template may render earlier calls with more."""
    as_json = form.sep.startswith('"')
    every = []
    for n, tool in enumerate(tools):
        written = [(lead + tool.name + form.sep, form.close)]
        if as_json and "{" in lead:
            plain = f'{lead.partition("{")[0]}{{"name": "{tool.name}", "arguments": '
            written.append((plain, "}" + form.close.rpartition("}")[2]))
        for head, close in dict.fromkeys(written):
            begin, end = (_loose(part, spell, as_json=as_json) for part in (head, close))
            every.append(f"{begin} a{n} {end.removesuffix('SPACE?')}")
    return " | ".join(every)


def _loose(text: str, spell: Spell, *, as_json: bool) -> str:
    """A literal in which white space is any, around the marks of JSON too, and a call's id as well."""
    shown = []
    for piece in _PIECE.findall(text) if as_json else re.findall(r"\s+|\S+", text):
        if piece.isspace():
            shown.append("SPACE?")
        elif as_json and piece in _KEYS:
            shown.append("( " + " | ".join(map(literal, _KEYS)) + " )")
        else:
            around = "SPACE? " if as_json and piece.strip() in tuple("{}[],:") else ""
            shown.append(f"{around}{_literal(piece.strip(), spell)} {around}".strip())
    found = re.sub(r"(SPACE\? )+(?=SPACE\?)", "", " ".join(shown))
    return found.replace(_LARK[ID], _ANY_ID)


def _answer(form: CallFormat, spell: Spell) -> str:
    return f"lead? {_literal(harmony.FINAL, spell)} answer" if form.channels else "answer"


def _lead(spell: Spell) -> str:
    begin, end = (_literal(part, spell) for part in harmony.ANALYSIS)
    return f"lead: {begin} TEXT {end}\nTEXT: /(.|\\n)*/\n"


def literal(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str, spell: Spell) -> str:
    """A literal of a format as Lark."""
    pieces = re.split(f"([{ID}{NUMBER}])", text)
    return " ".join(_LARK.get(piece) or spell(piece) for piece in pieces if piece)


def _json(schema: Any, spacing: Mapping[str, Any] = SPACING) -> str:
    # llguidance takes its settings out and moves the last key into their place: behind them the order stays
    return "%json " + json.dumps({**schema, "x-guidance": spacing} if isinstance(schema, dict) else schema)
