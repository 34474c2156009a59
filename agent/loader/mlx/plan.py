"""What constrains a request's answer: the schema of its response, and those of its tools' arguments."""

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLTokenizer

from agent.loader import schemas
from agent.loader.chat.calls import OWN, CallFormat
from agent.loader.chat.grammar import SPACING, Arguments, Plan, announced, call_grammar, schema_grammar
from agent.loader.chat.harmony import HARMONY
from agent.loader.chat.probe import Conversation
from agent.loader.chat.speech import Markers
from agent.loader.mlx.template import ChatTemplate
from agent.wire.frames import Failed, Generate
from agent.wire.namespaces import Namespace

_KEPT, _KEPT_CHARS = 1024, 8 << 10
"""Schemas whose enforceable form is kept, and the longest of them."""
_KEPT_LONG = 16
"""Longer ones: clients choose how many there are, and each may take megabytes."""
_ANY = {"type": "object"}
BUDGET_S = 2.0
"""CPU time for the schemas of one request, all together: requests behind it wait meanwhile."""
_REMEMBERED = 256
"""Requests whose schemas were too costly together, by their hashes, with where the time was up: the same schemas are
refused at once when they come again."""


class Planned(NamedTuple):
    """A plan, how its answer is parsed, and a function that names what a call breaks: (name, arguments) -> text."""

    plan: Plan
    markers: Markers
    unmet: Callable[[str, str], str | None] | None


class _TooCostly(Exception):
    """The schemas of a request take too long; the text is for the client."""

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(
            f"{where}: the schemas of this request take more than {BUDGET_S:g} s to compile together; simplify their "
            "patterns, repetitions and alternatives, or send fewer"
        )


class Planner:
    """Makes the plans of one model. Grammars are compiled once for each schema."""

    def __init__(
        self, talk: Conversation, template: ChatTemplate, ends: Sequence[int], grammars: Callable[[], LLTokenizer]
    ) -> None:
        self._talk, self._template, self._ends, self._grammars = talk, template, ends, grammars
        self._short, self._long = lru_cache(_KEPT)(self._follow), lru_cache(_KEPT_LONG)(self._follow)
        self._spell: Callable[[str], str] | None = None
        self._where = ""
        self._until_s, self._costly = 0.0, OrderedDict[int, str]()

    def planned(self, request: Generate, asked: CallFormat) -> Planned | Failed:
        """The plan of a request whose prompt asks for calls in a format; Failed naming the schema's fault."""
        form = HARMONY if self._talk.channels else asked
        if request.must_call is not None and not form.constrained:
            form = OWN
        marks = None if self._talk.channels else self._talk.reasoning
        markers = Markers(marks, form, self._talk.silent, unknown=marks is None and not self._talk.channels)
        if not request.tools and request.schema is None:
            return Planned(Plan(), markers, None)
        self._until_s = time.thread_time() + BUDGET_S
        together = hash((request.cache, request.tools, request.schema))
        try:
            if together in self._costly:
                raise _TooCostly(self._costly[together])
            found = self._schemas(request)
            if isinstance(found, Failed):
                return found
            tools, schema, odd = found
            plan = self._plan(request, form, tools, schema)
        except _TooCostly as error:
            self._costly[together] = error.where
            while len(self._costly) > _REMEMBERED:
                self._costly.popitem(last=False)
            return _failed(request, str(error))
        if plan is None:
            return _failed(request, "this model's tokens do not support the constraints of the request")
        loose = {json.loads(t)["name"] for t in request.tools} if not form.constrained else odd
        return Planned(plan, markers, _unmet(request.tools, loose) if loose else None)

    def _schemas(self, request: Generate) -> tuple[list[Arguments], Any, set[str]] | Failed:
        """Arguments that may be written, the answer's schema, and the tools whose schemas are not enforced whole."""
        tools, odd = [], set()
        for number, text in enumerate(request.tools):
            tool = json.loads(text)
            if request.must_call and tool["name"] != request.must_call:
                continue
            self._where = f"tools[{number}].function.parameters"
            try:
                schema, unenforced = self._followed(request.cache, json.dumps(tool.get("parameters")), True)
            except schemas.Unfollowable as error:
                if request.must_call is not None:
                    return _failed(request, f"tools[{number}].function.parameters: {error}", f"tools[{number}]")
                schema, unenforced = json.dumps(_ANY), True
            tools.append(Arguments(tool["name"], json.loads(schema)))
            odd |= {tool["name"]} if unenforced else set()
        if request.schema is None:
            return tools, None, odd
        self._where = "response_format.json_schema.schema"
        try:
            schema, _ = self._followed(request.cache, request.schema, False)
        except schemas.Unfollowable as error:
            return _failed(request, f"response_format.json_schema.schema: {error}", "response_format")
        return tools, json.loads(schema), odd

    def _plan(self, request: Generate, form: CallFormat, tools: Sequence[Arguments], schema: Any) -> Plan | None:
        spell = self._spell = self._spell or self._template.speller(self._grammars(), self._ends)
        if not tools:
            plan = Plan(whole=schema_grammar(schema, form, spell))
        elif request.must_call is not None or schema is not None:
            plan = Plan(whole=call_grammar(tools, form, spell, None if request.must_call is not None else schema))
        else:
            plan = announced(tools, form, spell)
        trial = plan.whole or plan.trial()
        return plan if trial is None or not self._faulty_grammar(trial) else None

    def _followed(self, cache: Namespace, text: str, tool: bool) -> tuple[str, bool]:
        return (self._short if len(text) <= _KEPT_CHARS else self._long)(cache, text, tool)

    def _follow(self, _: Namespace, text: str, tool: bool) -> tuple[str, bool]:
        """A schema as text in the form that can be enforced, and whether some of it is not. Kept for its namespace, so
        that the time it takes tells nobody that another key has sent it."""
        schema = json.loads(text)
        if schema is None:
            schema = {"type": "object", "properties": {}}
        found = schemas.follow(schema, prefix="d", closed=tool, lenient=tool, faulty=self._faulty)
        whole = found.schema
        if found.definitions:
            whole = {**found.schema, "$defs": found.definitions} if isinstance(found.schema, dict) else found.schema
        return json.dumps(whole), bool(found.unenforced)

    def _faulty(self, schema: dict[str, Any]) -> str | None:
        spaced = {**schema, "x-guidance": SPACING}
        return self._faulty_grammar(f"start: %json {json.dumps(spaced)}\n")

    def _faulty_grammar(self, grammar: str) -> str | None:
        if time.thread_time() > self._until_s:
            raise _TooCostly(self._where)
        is_error, said = LLMatcher.validate_grammar_with_warnings(grammar, self._grammars())
        return (str(said[0]) if said else "refused") if is_error else None


def _unmet(tools: Sequence[str], loose: set[str]) -> Callable[[str, str], str | None]:
    numbers = {json.loads(text)["name"]: number for number, text in enumerate(tools)}

    def unmet(name: str, arguments: str) -> str | None:
        if name not in loose:
            return None
        number = numbers[name]
        broken = schemas.unmet(json.loads(tools[number]).get("parameters") or {}, json.loads(arguments))
        return None if broken is None else f"tools[{number}].function.parameters: {broken}"

    return unmet


def _failed(request: Generate, message: str, param: str | None = None) -> Failed:
    param = param or ("response_format" if request.schema is not None else "tools")
    return Failed(id=request.id, code="invalid_value", message=message, param=param)
