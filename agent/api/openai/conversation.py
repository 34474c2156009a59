"""Parsers for the conversations and tools that clients send."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from agent.api.openai.fields import Extras, boolean, text, unsupported, written, wrong
from agent.api.openai.known import CALL_ECHOES, MESSAGE_ECHOES, PART_ECHOES
from agent.wire.frames import Message, ToolCall
from shared.errors import Refused

ROLES = {**{role: role for role in ("system", "user", "assistant", "tool")}, "developer": "system", "function": "tool"}
MAX_TOOLS = 128
MAX_MESSAGES = 10_000
MAX_SCHEMA_CHARS = 256 << 10
RENDERER_KEY = "x-guidance"
"""Settings of the grammar compiler, which clients must not set."""
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are read, and where each has its text."""
_THOUGHTS = frozenset({"thinking", "reasoning", "reasoning_text", "redacted_thinking"})
"""Types of parts that are reasoning; servers differ in where those have their text."""
_THOUGHT_KEYS = ("thinking", "reasoning", "text", "summary")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("audio", "images")
MESSAGE = MESSAGE_ECHOES | {
    *("role", "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call"),
    *(*_REASONING_KEYS, *_MEDIA),
}
_TEXT_ONLY = "this service reads text, no images, audio or files (docs/models.md)"


class Tools(NamedTuple):
    """Function descriptions as JSON text; ``must_call`` as in agent.wire.frames.Generate."""

    described: tuple[str, ...] = ()
    must_call: str | None = None
    one_call: bool = False


def messages(tree: dict[str, Any], extras: Extras) -> tuple[Message, ...]:
    """The conversation. Raises Refused naming the turn."""
    if not isinstance(found := tree.get("messages"), list) or not 0 < len(found) <= MAX_MESSAGES:
        raise wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_answering(_message(item, f"messages[{n}]", extras) for n, item in enumerate(found)))


def _answering(turns: Iterable[Message]) -> Iterator[Message]:
    """The turns with every call under an id of its own, and every result under that of its call: a result that names
    none answers the first call without one, and of calls that share an id the first."""
    used: set[str] = set()
    waiting: dict[str, None] = {}
    named: dict[str, list[str]] = {}
    for n, turn in enumerate(turns):
        own: dict[str, list[str]] = {}
        for at, call in enumerate(turn.calls):
            number = call.id if call.id and call.id not in used else f"call_{n}_{at}"
            used.add(number)
            own.setdefault(call.id, []).append(number)
        if own:
            numbers = {given: iter(ids) for given, ids in own.items()}
            turn = replace(turn, calls=tuple(replace(call, id=next(numbers[call.id])) for call in turn.calls))
        named |= own
        waiting |= {call.id: None for call in turn.calls}
        if turn.role == "tool":
            turn = replace(turn, call_id=_answered(turn.call_id, named, waiting, n))
            waiting.pop(turn.call_id, None)
        yield turn


def _answered(given: str, named: dict[str, list[str]], waiting: dict[str, None], n: int) -> str:
    """The id of the call that a result answers."""
    if given:
        return ids.pop(0) if (ids := named.get(given)) else given
    if not waiting:
        raise wrong(f"messages[{n}].tool_call_id", "the id of the call that this answers")
    return next(iter(waiting))


def tools(tree: dict[str, Any], extras: Extras) -> Tools:
    """The tools that may be called, and whether one must be."""
    found = tree.get("tools")
    one_call = tree.get("parallel_tool_calls") is not None and not boolean(tree, "parallel_tool_calls")
    if found is None or found == []:
        if tree.get("tool_choice") not in (None, "none", "auto"):
            raise Refused("tool_choice needs tools", code="invalid_value", param="tool_choice")
        return Tools()
    if not isinstance(found, list) or len(found) > MAX_TOOLS:
        raise wrong("tools", f"a list of at most {MAX_TOOLS} tools")
    described = {}
    for n, tool in enumerate(found):
        function = _function(tool, f"tools[{n}]", extras)
        if function["name"] in described:
            raise wrong(f"tools[{n}].function.name", "a unique name")
        described[function["name"]] = written(function, f"tools[{n}].function", MAX_SCHEMA_CHARS)
        if RENDERER_KEY in described[function["name"]]:
            raise unsupported(f"tools[{n}].function.parameters", f"{RENDERER_KEY} is not supported")
    if sum(map(len, described.values())) > MAX_SCHEMA_CHARS:
        raise wrong("tools", f"at most {MAX_SCHEMA_CHARS} characters in all")
    return _chosen(tree.get("tool_choice"), described, one_call)


def _chosen(choice: Any, described: dict[str, str], one_call: bool) -> Tools:
    every = tuple(described.values())
    match choice:
        case None | "auto":
            return Tools(every, None, one_call)
        case "none":
            return Tools()
        case "required":
            return Tools(every, "", one_call)
        case {"type": "function", "function": {"name": str(name)}} if name in described:
            return Tools(every, name, one_call)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(allowed)}}:
            named = [_name_in(tool) for tool in allowed]
            if named and len(named) == len(allowed) and all(isinstance(n, str) and n in described for n in named):
                kept = tuple(described[str(name)] for name in dict.fromkeys(named))
                return Tools(kept, "" if mode == "required" else None, one_call)
    raise wrong("tool_choice", "none, auto, required, or a function that tools describes")


def _name_in(tool: Any) -> str | None:
    match tool:
        case {"function": {"name": str(name)}}:
            return name
    return None


def _function(tool: Any, path: str, extras: Extras) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(path, "an object")
    if tool.get("type") not in (None, "function"):
        raise unsupported(f"{path}.type", "only tools of type function are supported")
    extras.beyond(tool, ("type", "function", "cache_control"), path)
    if not isinstance(function := tool.get("function"), dict):
        raise wrong(f"{path}.function", "an object")
    if not isinstance(name := function.get("name"), str) or not _NAME.fullmatch(name):
        raise wrong(f"{path}.function.name", "1 to 64 letters, digits, dots, dashes and underscores")
    extras.beyond(function, ("name", "description", "parameters", "strict", "cache_control"), f"{path}.function")
    boolean(function, "strict", f"{path}.function.strict")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(f"{path}.function.parameters", "a JSON schema")
    # always strict: arguments that the schema does not allow cannot be generated
    described: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        described["description"] = text(function["description"], f"{path}.function.description")
    return {**described, "parameters": parameters or {"type": "object", "properties": {}}}


def _message(item: Any, path: str, extras: Extras) -> Message:
    """One turn. ``call_id``, and a call's id, is "" where the client named none."""
    if not isinstance(item, dict):
        raise wrong(path, "an object")
    if not isinstance(role := item.get("role"), str) or role not in ROLES:
        raise wrong(f"{path}.role", f"one of {', '.join(ROLES)}")
    extras.beyond(item, MESSAGE, path)
    for key in _MEDIA:
        if item.get(key) not in (None, []):
            raise unsupported(f"{path}.{key}", _TEXT_ONLY)
    for key in ("name", "refusal", "reasoning_content", "tool_call_id"):
        if item.get(key) is not None:
            text(item[key], f"{path}.{key}")
    content, thoughts = _said(item, ROLES[role], path, extras)
    told = (found for key in _REASONING_KEYS if isinstance(found := item.get(key), str) and found)
    return Message(
        role=ROLES[role],
        content=content,
        reasoning=next(told, thoughts),
        calls=_calls(item, role, path, extras),
        call_id=item.get("tool_call_id") or "",
    )


def _said(item: dict[str, Any], role: str, path: str, extras: Extras) -> tuple[str, str]:
    """Content and reasoning. A turn of the history may have a refusal in place of content, or calls, or nothing."""
    content = item.get("content")
    if content in (None, []) and role in ("assistant", "tool"):
        return item.get("refusal") or "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list) or not content:
        raise wrong(f"{path}.content", "a string or a list of text parts")
    return _parts(content, f"{path}.content", extras)


def _parts(content: list[Any], path: str, extras: Extras) -> tuple[str, str]:
    texts, thoughts = [], []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or not (kind in _TEXTS or kind in _THOUGHTS):
            raise unsupported(f"{path}[{n}].type", f"only parts of type text are supported; {_TEXT_ONLY}")
        if kind in _THOUGHTS:
            thoughts.append(_thought(part))
            continue
        key = _TEXTS[kind]
        extras.beyond(part, PART_ECHOES | {"type", key}, f"{path}[{n}]")
        texts.append(text(part.get(key), f"{path}[{n}].{key}"))
    return "".join(texts), "".join(thoughts)


def _thought(part: dict[str, Any]) -> str:
    """The text of a reasoning part, itself a text or a list of text parts; "" for one that is withheld."""
    found = next((part[key] for key in _THOUGHT_KEYS if part.get(key)), "")
    inner = found if isinstance(found, list) else [{"text": found}]
    texts = (one.get("text") for one in inner if isinstance(one, dict))
    return "".join(one for one in texts if isinstance(one, str))


def _calls(item: dict[str, Any], role: str, path: str, extras: Extras) -> tuple[ToolCall, ...]:
    """The calls of a turn, in today's form or the one before it."""
    found, old = item.get("tool_calls"), item.get("function_call")
    if found is not None and not isinstance(found, list):
        raise wrong(f"{path}.tool_calls", "a list of calls")
    if role != "assistant" and (found or old is not None):
        raise wrong(f"{path}.{'tool_calls' if found else 'function_call'}", "no calls outside an assistant's message")
    if not found and old is not None:
        return (_call({"function": old}, f"{path}.function_call", extras),)
    return tuple(_call(call, f"{path}.tool_calls[{n}]", extras) for n, call in enumerate(found or ()))


def _call(call: Any, path: str, extras: Extras) -> ToolCall:
    if isinstance(call, dict) and call.get("type") not in (None, "function"):
        raise unsupported(f"{path}.type", "only calls of type function are supported")
    match call:
        case {"function": {"name": str(name)} as function}:
            extras.beyond(call, CALL_ECHOES | {"id", "type", "function"}, path)
            extras.beyond(function, CALL_ECHOES | {"name", "arguments", "parsed_arguments"}, f"{path}.function")
            number, arguments = call.get("id"), function.get("arguments")
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            if isinstance(number, str | None) and isinstance(arguments, str | None):
                return ToolCall(id=number or "", name=name, arguments=arguments or "")
    raise wrong(path, "a function call with a name and arguments")
