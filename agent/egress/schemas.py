"""What of a JSON schema a provider enforces. A schema is a client's: it may be anything. Pure."""

from collections.abc import Iterator
from typing import Any

_KNOWN = frozenset({"type", "properties", "required", "items", "enum", "const", "anyOf", "description", "title"})
_BY_NAME, _LISTED, _SINGLE = ("properties", "$defs", "definitions"), ("anyOf", "allOf", "oneOf"), ("items", "not")


def is_strict(schema: Any) -> bool:
    """Whether every object of a schema is closed and requires all that it names, as OpenAI demands of strict ones."""
    if not isinstance(schema, dict):
        return False
    if schema.get("type") == "object" or "properties" in schema:
        named, required = schema.get("properties", {}), schema.get("required", [])
        if schema.get("additionalProperties") is not False or not isinstance(named, dict):
            return False
        if not isinstance(required, list) or any(name not in required for name in named):
            return False
    return all(map(is_strict, _inner(schema)))


def is_plain(schema: Any) -> bool:
    """Whether a schema has only what Anthropic enforces: objects with named properties, and known keywords alone."""
    if not isinstance(schema, dict) or not set(schema) <= _KNOWN | {"additionalProperties"}:
        return False
    if schema.get("additionalProperties", False) is not False:
        return False
    if (schema.get("type") == "object") != isinstance(schema.get("properties"), dict):
        return False
    return all(map(is_plain, _inner(schema)))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A plain schema as Anthropic wants it: every object says that it has no further properties. What follows it
    follows the original, too."""
    found = dict(schema)
    if "properties" in schema:
        found["properties"] = {name: closed(one) for name, one in schema["properties"].items()}
        found["additionalProperties"] = False
    if "anyOf" in schema:
        found["anyOf"] = [closed(one) for one in schema["anyOf"]]
    if "items" in schema:
        found["items"] = closed(schema["items"])
    return found


def _inner(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas within a schema; None for what cannot be one."""
    for key in _BY_NAME:
        value = schema.get(key, {})
        yield from value.values() if isinstance(value, dict) else (None,)
    for key in _LISTED:
        value = schema.get(key, [])
        yield from value if isinstance(value, list) else (None,)
    yield from (schema[key] for key in _SINGLE if key in schema)
