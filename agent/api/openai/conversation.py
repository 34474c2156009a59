"""Parsers for the conversations and tools that clients send."""

import re
from typing import Any, NamedTuple

from agent.api.openai.fields import boolean, only, shown, text, unsupported, written, wrong
from agent.wire.frames import Message, ToolCall
from shared.errors import Refused

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MAX_TOOLS = 128
MAX_MESSAGES = 10_000
MAX_SCHEMA_CHARS = 256 << 10
RENDERER_KEY = "x-guidance"
"""Settings of the grammar compiler, which clients must not set."""
_ADVISORY = frozenset({"annotations", "cache_control", "prompt_cache_breakpoint"})
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_KNOWN = _ADVISORY | {"role", "content", "name", "refusal", "tool_calls", "tool_call_id", "reasoning_content"}


class Tools(NamedTuple):
    """Function descriptions as JSON text; ``must_call`` as in agent.wire.frames.Generate."""

    described: tuple[str, ...] = ()
    must_call: str | None = None
    one_call: bool = False


def messages(tree: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation. Raises Refused naming the turn."""
    if not isinstance(found := tree.get("messages"), list) or not 0 < len(found) <= MAX_MESSAGES:
        raise wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(item, f"messages[{n}]") for n, item in enumerate(found))


def tools(tree: dict[str, Any]) -> Tools:
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
        function = _function(tool, f"tools[{n}]")
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
        case {"type": "function", "function": {"name": str(name), **rest}, **more} if (
            name in described and not rest and not more
        ):
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


def _function(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(path, "an object")
    if tool.get("type") != "function":
        raise unsupported(f"{path}.type", "only tools of type function are supported")
    only(tool, frozenset({"type", "function", "cache_control"}), path)
    if not isinstance(function := tool.get("function"), dict):
        raise wrong(f"{path}.function", "an object")
    if not isinstance(name := function.get("name"), str) or not _NAME.fullmatch(name):
        raise wrong(f"{path}.function.name", "1 to 64 letters, digits, dots, dashes and underscores")
    only(function, frozenset({"name", "description", "parameters", "strict"}), f"{path}.function")
    boolean(function, "strict", f"{path}.function.strict")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(f"{path}.function.parameters", "a JSON schema")
    # always strict: arguments that the schema does not allow cannot be generated
    described: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        described["description"] = text(function["description"], f"{path}.function.description")
    return {**described, "parameters": parameters or {"type": "object", "properties": {}}}


def _message(item: Any, path: str) -> Message:
    if not isinstance(item, dict):
        raise wrong(path, "an object")
    if not isinstance(role := item.get("role"), str) or role not in ROLES:
        raise wrong(f"{path}.role", f"one of {', '.join(ROLES)}")
    for key, value in item.items():
        if key not in _KNOWN and value is not None and value != []:
            raise unsupported(f"{path}.{shown(key)}")
    for key in ("name", "refusal", "reasoning_content", "tool_call_id"):
        if item.get(key) is not None:
            text(item[key], f"{path}.{key}")
    calls = _calls(item.get("tool_calls"), f"{path}.tool_calls")
    if calls and role != "assistant":
        raise wrong(f"{path}.tool_calls", "no calls outside an assistant's message")
    call_id = item.get("tool_call_id")
    if role == "tool" and not isinstance(call_id, str):
        raise wrong(f"{path}.tool_call_id", "the id of the call that this answers")
    content = item.get("content")
    if content in (None, []) and (calls or role == "tool" or item.get("refusal")):
        content = item.get("refusal") or ""  # a message of the history may have a refusal in place of content
    return Message(
        role=ROLES[role],
        content=_content(content, f"{path}.content"),
        reasoning=text(item.get("reasoning_content") or "", f"{path}.reasoning_content"),
        calls=calls,
        call_id=call_id if isinstance(call_id, str) else "",
    )


def _calls(found: Any, path: str) -> tuple[ToolCall, ...]:
    if found is None:
        return ()
    if not isinstance(found, list):
        raise wrong(path, "a list of calls")
    calls = []
    for n, call in enumerate(found):
        match call:
            case {"id": str(number), "function": {"name": str(name), "arguments": str(arguments)} as function}:
                only(call, frozenset({"id", "type", "function", "index"}), f"{path}[{n}]")
                only(function, frozenset({"name", "arguments"}), f"{path}[{n}].function")
                if call.get("type", "function") != "function":
                    raise unsupported(f"{path}[{n}].type", "only calls of type function are supported")
                calls.append(ToolCall(id=number, name=name, arguments=arguments))
            case _:
                raise wrong(f"{path}[{n}]", "a function call with id, name and arguments")
    return tuple(calls)


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong(path, "a string or a list of text parts")
    texts = []
    for n, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            raise unsupported(f"{path}[{n}].type", "only parts of type text are supported")
        only(part, _ADVISORY | {"type", part["type"]}, f"{path}[{n}]")
        texts.append(text(part.get(part["type"]), f"{path}[{n}].{part['type']}"))
    return "".join(texts)
