"""How a model writes its tool calls, learnt from what its own chat template renders. Pure.

A template renders the calls of earlier turns exactly as the model was trained to write them. So a call with a known
name and known arguments is rendered, and the text around the two is the format: for prompt, parser and grammar alike.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Found = tuple[str, Any]
"""A call as (name, arguments), the arguments as an object or as JSON text."""
CallParser = Callable[[str, Any], Any]
"""(text between the markers, tools) -> one call or several, as {"name", "arguments"}; mlx-lm's format."""

ID, NUMBER = "\0", "\1"
"""In a format's literals: any call id, any number."""
_NAMES = ("name", "tool_name", "function_name", "function", "recipient_name", "api")
_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
_SHORT_ID = 9
"""Some templates keep this much of an id."""


class Probe(NamedTuple):
    """A call to look for in rendered text."""

    name: str
    arguments: dict[str, str]
    id: str


class CallFormat(NamedTuple):
    """``begin (open NAME sep ARGUMENTS close) between (...) end``; ARGUMENTS is a JSON object, or, where ``key`` is
    set, each argument is ``key[0] KEY key[1] VALUE key[2]``. ``marker`` is the text that announces calls, "" when an
    answer that begins like a call is one; ``stop`` ends the part that holds calls, "" for the end of the answer.
    ``parser`` reads it instead, for a format without a grammar. ``several`` calls may be made in one turn.
    ``channels``: it is a message of the channel protocol, announced by its header."""

    begin: str = ""
    open: str = ""
    sep: str = ""
    close: str = ""
    between: str = ""
    end: str = ""
    marker: str = ""
    stop: str = ""
    several: bool = True
    key: tuple[str, str, str] | None = None
    parser: CallParser | None = None
    channels: bool = False

    @property
    def constrained(self) -> bool:
        """Whether arguments can be constrained to a schema while they are written."""
        return self.parser is None and self.key is None

    @property
    def in_json(self) -> bool:
        """Whether a call is one JSON object, its name included."""
        return self.constrained and '"' in self.open

    @property
    def bare(self) -> bool:
        """Whether nothing but its own beginning announces a call."""
        return not self.marker

    @property
    def optional(self) -> bool:
        """Whether the marker announces code in general: models leave it out before a call in JSON (Llama 4)."""
        return self.in_json and bool(self.marker) and not re.search("tool|call|func|action", self.marker, re.IGNORECASE)


OWN = CallFormat(
    open='<tool_call>\n{"name": "',
    sep='", "arguments": ',
    close="}\n</tool_call>",
    between="\n",
    marker="<tool_call>",
    stop="</tool_call>",
)
"""For models whose templates have no tools, or none that can be read back: what most open models were trained on."""


def written(form: CallFormat, calls: Sequence[Found]) -> str:
    """Calls as text, as the model would write them; in our own format if this one cannot be written."""
    if not form.constrained:
        form = OWN
    units = [f"{form.open}{name}{form.sep}{_json(arguments)}{form.close}" for name, arguments in calls]
    whole = form.begin + form.between.join(units) + form.end
    return whole.replace(ID, "abcdefghi").replace(NUMBER, "0")


def read(form: CallFormat, text: str, tools: Any) -> list[Found]:
    """The calls in a text between marker and stop; [] for a text that holds none. Raises nothing."""
    try:
        if form.parser is not None:
            found = form.parser(text, tools)
            return [(str(one["name"]), one["arguments"]) for one in (found if isinstance(found, list) else [found])]
        if form.key is not None:
            return list(_keyed(form, text, tools))
        return list(_headed(form, text)) if _is_header(form) else list(_objects(text))
    except Exception:  # noqa: BLE001  # a parser may raise anything for a model's output
        return []


def learnt(one: str, two: str | None, first: Probe, second: Probe, tokens: Iterable[str]) -> CallFormat | None:
    """The format in the text of an assistant's turn with one call, and of one with two where the template takes two;
    None if its arguments are neither JSON nor keyed texts. ``tokens`` are the tokenizer's added tokens."""
    if (single := _split(one, first)) is None:
        return _learnt_keys(one, first, tokens)
    before, sep, after = single
    pair = None if two is None else _pair(two, first, second)
    if pair is None:
        before, sep, after = (_numbered(part) for part in single)
        opening = _json_start(before)
        begin, start = before[:opening], before[opening:]
        return marked(CallFormat(begin=begin, open=start, sep=sep, close=after, several=False), tokens)
    head, middle, tail, sep = (_numbered(part) for part in pair)
    start = common_end(pieces(head, tokens), pieces(middle, tokens))
    rest = middle[: len(middle) - len(start)]
    close = common_begin(pieces(rest, tokens), pieces(tail, tokens))
    return marked(
        CallFormat(
            begin=head[: len(head) - len(start)],
            open=start,
            sep=sep,
            close=close,
            between=rest[len(close) :],
            end=tail[len(close) :],
        ),
        tokens,
    )


def _numbered(text: str) -> str:
    """A literal in which numbers that stand alone may be any."""
    return re.sub(r"(?<![\w.-])\d+(?![\w.-])", NUMBER, text)


def marked(form: CallFormat, tokens: Iterable[str]) -> CallFormat:
    """A format with its marker and its stop."""
    head = (form.begin + form.open).lstrip()
    lead = form._replace(begin=form.begin.lstrip()) if form.begin.strip() else form._replace(open=form.open.lstrip())
    form = lead if form.begin.strip() or not form.begin else lead._replace(begin="")
    known = max((token for token in tokens if token and head.startswith(token)), key=len, default="")
    json_at = re.search(r'[\[{]\s*["{\[]', head)
    tag = re.match(r"<[^<>\s]+>", head)
    marker = known or (tag[0] if tag else "") or head[: json_at.start() if json_at else None].strip().split("\n")[0]
    tail = (form.end if form.begin else form.close).lstrip(' \n\t"}]`')
    closing = f"</{marker[1:]}"
    stop = closing if closing in tail else tail.split(ID)[0].split("\n")[0].strip()
    return form._replace(marker=marker.split(ID)[0].split(NUMBER)[0], stop=stop)


def _json_start(text: str) -> int:
    """Where the JSON at the end of a text begins: an object or a list that is open there."""
    if (found := re.search(r'\[?\s*\{\s*"[^{}\[\]]*$', text)) is not None:
        return found.start()
    return len(text)


def _split(text: str, probe: Probe) -> tuple[str, str, str] | None:
    """A text as what stands before the name, between name and arguments, and after the arguments."""
    text = _without_id(text, probe)
    if (at := text.find(probe.name)) < 0:
        return None
    rest = at + len(probe.name)
    for begin in _starts(text, rest):
        if (end := _value_end(text, begin, probe.arguments)) is not None:
            return text[:at], text[rest:begin], text[end:]
    return None


def _without_id(text: str, probe: Probe) -> str:
    """A text in which the call's id, or the end of it, may be any."""
    return text.replace(probe.id, ID).replace(probe.id[-_SHORT_ID:], ID)


def _pair(text: str, first: Probe, second: Probe) -> tuple[str, str, str, str] | None:
    """(before the first call, between the calls, after the second, between name and arguments)."""
    if (one := _split(text, first)) is None or (two := _split(one[2], second)) is None:
        return None
    sep, again = one[1], two[1]
    if _numbered(sep) != _numbered(again):
        return None
    return one[0], two[0], two[2], sep


def _starts(text: str, begin: int) -> Iterator[int]:
    return (at for at in range(begin, len(text)) if text[at] in '{"')


def _value_end(text: str, begin: int, wanted: Any) -> int | None:
    """Where the JSON value that begins there ends, if it is the wanted one."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except ValueError:
        return None
    return end if value == wanted else None


def common_begin(one: Sequence[str], other: Sequence[str]) -> str:
    """The longest common beginning of two texts in pieces."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return "".join(one[:length])


def common_end(one: Sequence[str], other: Sequence[str]) -> str:
    """The longest common end of two texts in pieces."""
    length = next((n for n, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), None)
    return "".join(one[len(one) - (min(len(one), len(other)) if length is None else length) :])


def pieces(text: str, tokens: Iterable[str]) -> list[str]:
    """A text as single characters and whole tokens."""
    known = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1]
    return re.findall("|".join([*known, "."]), text, re.DOTALL)


def _is_header(form: CallFormat) -> bool:
    """Whether the name stands outside the JSON."""
    return '"' not in form.open and '"' not in form.sep


def _objects(text: str) -> Iterator[Found]:
    """Calls in a sequence of JSON objects, or in lists of them; other text between them is skipped."""
    decoder = json.JSONDecoder()
    at, any_found = 0, False
    while (match := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, match.start())
        except ValueError:
            at = match.start() + 1
            if any_found:
                return
            continue
        for one in value if isinstance(value, list) else [value]:
            any_found = True
            yield _call(one)


def _call(found: Any) -> Found:
    """A call out of a JSON object. Raises KeyError if it is none."""
    if isinstance(inner := found.get("function"), dict):
        found = inner
    name = next((found[key] for key in _NAMES if isinstance(found.get(key), str)), None)
    if name is None:
        if len(found) == 1 and isinstance(found[only := next(iter(found))], dict):
            return str(only), found[only]  # {"name": {...}}
        raise KeyError("name")
    return name, next(found[key] for key in _ARGUMENTS if key in found)


def _headed(form: CallFormat, text: str) -> Iterator[Found]:
    """Calls whose names stand outside the JSON: ``open NAME sep {...}``."""
    decoder = json.JSONDecoder()
    opening = _tolerant(form.open.strip().removeprefix(form.marker) if form.begin == "" else form.open.strip())
    lead = f"(?:{opening}\\s*|(?<![\\w.-]))" if opening else "(?<![\\w.-])"  # not tried inside each word
    head = re.compile(f'{lead}([\\w.-]+)\\s*{_tolerant(form.sep)}\\s*(?=[{{"])')
    at = 0
    while (match := head.search(text, at)) is not None:
        value, at = decoder.raw_decode(text, match.end())
        yield match[1], value


def _tolerant(literal: str) -> str:
    """A regular expression for a literal, whatever its white space."""
    pieces = [re.escape(piece) for piece in literal.split()]
    shape = r"\s*".join(pieces).replace(re.escape(ID), r"[\w.:-]+").replace(re.escape(NUMBER), r"\d+")
    return shape.replace('"true"', '"(?:true|false)"')  # whether the value is a string


def _learnt_keys(text: str, probe: Probe, tokens: Iterable[str]) -> CallFormat | None:
    """A format that writes each argument as a text between tags."""
    text = _without_id(text, probe)
    pairs = list(probe.arguments.items())
    marks = [probe.name, *(part for pair in pairs for part in pair)]
    places, at = [], 0
    for mark in marks:
        if (found := text.find(mark, at)) < 0:
            return None
        places.append((found, at := found + len(mark)))
    gaps = [text[end:begin] for (_, end), (begin, _) in pairwise(places)]
    before, after = text[: places[0][0]], text[places[-1][1] :]
    sep_and_key, equals, between = gaps[0], gaps[1], gaps[2]
    if gaps[3] != equals or not equals.strip():
        return None
    key = common_end(sep_and_key, between).lstrip("> \n")
    value_end = between[: len(between) - len(key)].rstrip()
    if not key.strip() or not after.startswith(value_end) or not value_end.strip():
        return None
    form = CallFormat(
        open=before,
        sep=sep_and_key[: len(sep_and_key) - len(key)],
        close=after[len(value_end) :],
        key=(key, equals, value_end),
    )
    return marked(form, tokens)


def _keyed(form: CallFormat, text: str, tools: Any) -> Iterator[Found]:
    assert form.key is not None
    opening = _tolerant(form.open.strip().removeprefix(form.marker))
    for head in re.finditer(f"{opening}\\s*([\\w.-]+)\\s*{_tolerant(form.sep)}", text):
        stop = re.compile(opening).search(text, head.end()) if opening else None
        region = text[head.end() : stop.start() if stop else len(text)]
        types = _types(head[1], tools)
        yield head[1], {key: _value(value, types.get(key)) for key, value in _pairs(form.key, region)}


def _pairs(key: tuple[str, str, str], text: str) -> Iterator[tuple[str, str]]:
    """Keys and values, mark after mark: a pattern for all three would go back over the whole text for each of them."""
    marks = [re.compile(_tolerant(part)) for part in key]
    at = 0
    while True:
        places = []
        for mark in marks:
            if (found := mark.search(text, at)) is None:
                return
            places.append(found)
            at = found.end()
        begin, equals, end = places
        value = text[equals.end() : end.start()]
        yield text[begin.end() : equals.start()].strip(), value.removeprefix("\n").removesuffix("\n")


def _types(name: str, tools: Any) -> dict[str, Any]:
    """Each parameter's type by the description of a tool."""
    for tool in tools or ():
        if tool["function"]["name"] == name:
            stated = (tool["function"].get("parameters") or {}).get("properties") or {}
            return {key: one.get("type") for key, one in stated.items() if isinstance(one, dict)}
    return {}


def _value(text: str, kind: Any) -> Any:
    """An argument that was written as text, in its parameter's type."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
