"""A conversation as input of a chat template, and the grammar that constrains an answer. Pure.

A model whose template supports tools receives them there. For others they are described in the system message, in the
format that most open models were trained on: a JSON object between two markers.
"""

import json
from collections.abc import Sequence
from typing import Any

from agent.wire.frames import Generate, Message

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"
_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""JSON formatted as in most training data, without unbounded white space."""


def for_template(messages: Sequence[Message], tools: Sequence[str], *, native_tools: bool) -> list[dict[str, Any]]:
    """Messages as dictionaries. Without ``native_tools``, calls and results are rendered as text."""
    if native_tools:
        return [_native(message) for message in messages]
    turns = [_as_text(message) for message in messages]
    if not tools:
        return turns
    told = _instructions(tools)
    if turns and turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{turns[0]['content']}\n\n{told}"}, *turns[1:]]
    return [{"role": "system", "content": told}, *turns]


def plain_text(turns: Sequence[dict[str, Any]]) -> str:
    """A conversation for a model without a chat template."""
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"


def grammar(request: Generate, *, marker_is_token: bool, json_calls: bool) -> str | None:
    """The answer's grammar in llguidance's Lark, None for unconstrained answers. Free text that may contain calls is
    constrained only inside the calls. ``marker_is_token``: the marker is a special token of the model; ``json_calls``:
    it writes its calls in JSON, or can be made to."""
    schema = None if request.schema is None else f"%json {_strict(json.loads(request.schema))}"
    if not request.tools or (request.must_call is None and not json_calls):
        return None if schema is None else f"start: {schema}\n"
    calls = _strict(_any_call(request.tools, request.must_call or ""))
    begin, end = (CALL_BEGIN, CALL_END) if marker_is_token else (f'"{CALL_BEGIN}"', f'"{CALL_END}"')
    call = f'call: {begin} "\\n" %json {calls} "\\n" {end}\n'
    if request.must_call is not None:
        return f"start: call\n{call}"
    if schema is not None:
        return f"start: call | answer\nanswer: {schema}\n{call}"
    # free text up to each marker; "lazy" ends the text at the first one
    if marker_is_token:
        return f"start: (TEXT {call.removeprefix('call: ').rstrip()})* TEXT\nTEXT: /(.|\\n)*/\n"
    body = f'"\\n" %json {calls} "\\n" {end}'
    return f"%llguidance {{}}\nstart: (marked {body})* rest\nrest: TEXT\nTEXT: /(.|\\n)*/\nmarked[lazy]: TEXT {begin}\n"


def _any_call(tools: Sequence[str], name: str) -> dict[str, Any]:
    """JSON schema of a call to the tool of that name, or to any tool for ""."""
    wanted = [tool for tool in map(json.loads, tools) if not name or tool["name"] == name]
    definitions: dict[str, Any] = {}
    shapes = []
    for number, tool in enumerate(wanted):
        parameters = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        arguments = _hoisted(parameters, f"t{number}_", definitions)
        shapes.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    found: dict[str, Any] = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return {**found, "$defs": definitions} if definitions else found


def _hoisted(schema: Any, prefix: str, definitions: dict[str, Any]) -> Any:
    """The schema with its own definitions moved to ``definitions`` under a prefix, and references rewritten."""
    if isinstance(schema, list):
        return [_hoisted(one, prefix, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if key in ("$defs", "definitions") and isinstance(value, dict):
            definitions |= {prefix + name: _hoisted(one, prefix, definitions) for name, one in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith(("#/$defs/", "#/definitions/")):
            moved[key] = f"#/$defs/{prefix}{value.split('/', 2)[2]}"
        else:
            moved[key] = _hoisted(value, prefix, definitions)
    return moved


def _native(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.calls:
        turn["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _object(c.arguments)}}
            for c in message.calls
        ]
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    return turn


def _as_text(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    calls = [
        f"{CALL_BEGIN}\n{_compact({'name': c.name, 'arguments': _object(c.arguments)})}\n{CALL_END}"
        for c in message.calls
    ]
    return {"role": message.role, "content": "\n".join([message.content, *calls] if message.content else calls)}


def _instructions(tools: Sequence[str]) -> str:
    described = "\n".join(tools)
    shape = f'{CALL_BEGIN}\n{{"name": "FUNCTION", "arguments": {{...}}}}\n{CALL_END}'
    return (
        f"These functions can be called:\n<tools>\n{described}\n</tools>\n"
        f"To call one, answer with\n{shape}\nand nothing else; its result comes with the next message."
    )


def _object(arguments: str) -> Any:
    """Arguments as a template expects them; a model may have written invalid JSON in an earlier turn."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _strict(schema: Any) -> str:
    """A schema in the form that the grammar expects."""
    return _compact({"x-guidance": _SPACING, **schema} if isinstance(schema, dict) else schema)


def _compact(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False)
