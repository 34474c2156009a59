"""Validated access to a client's JSON: every error names the field and never quotes a value."""

import json
from typing import Any

import msgspec

from shared.errors import Refused

MAX_DEPTH = 100
"""Deeper than any schema that can be enforced."""


def read_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object. Raises Refused."""
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise Refused("the body is not a JSON object", code="invalid_json")
    if not shallower(tree, MAX_DEPTH):
        raise Refused(f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json")
    return tree


def shallower(tree: Any, limit: int) -> bool:
    """Whether nothing in it is nested more than ``limit`` levels deep; iterative, not recursive."""
    level = [tree]
    for _ in range(limit):
        level = [
            one
            for held in level
            for one in (held.values() if isinstance(held, dict) else held)
            if isinstance(one, dict | list)
        ]
        if not level:
            return True
    return False


def only(tree: dict[str, Any], known: frozenset[str], path: str) -> None:
    """Refuse an object's unknown fields by name; null counts as absent."""
    for key, value in tree.items():
        if key not in known and value is not None:
            name = f"{path}.{shown(key)}"
            raise Refused(f"unknown field {name}", code="unknown_parameter", param=name)


def written(tree: Any, path: str, limit: int) -> str:
    """A schema or similar as JSON text of at most ``limit`` characters."""
    found = json.dumps(tree, ensure_ascii=False)
    if len(found) > limit:
        raise wrong(path, f"at most {limit} characters")
    return found


def boolean(tree: dict[str, Any], name: str, path: str | None = None) -> bool:
    """A boolean; null and a missing field are false."""
    if (value := tree.get(name)) is None:
        return False
    if not isinstance(value, bool):
        raise wrong(path or name, "true or false")
    return value


def integer(tree: dict[str, Any], name: str, low: int, high: int) -> int | None:
    """An integer within bounds; None if absent."""
    if (value := tree.get(name)) is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(name, f"an integer from {low} to {high}")
    return value


def number(tree: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number within bounds."""
    if (value := tree.get(name)) is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def text(value: Any, path: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise wrong(path, "a string")
    return value


def wrong(param: str, expected: str) -> Refused:
    """The error for an invalid value."""
    return Refused(f"{param}: expected {expected}", code="invalid_value", param=param)


def unsupported(path: str, why: str = "is not supported") -> Refused:
    """The error for a value that would change behaviour and is not supported."""
    return Refused(f"{path}: {why}", code="unsupported_parameter", param=path)


def shown(name: str) -> str:
    """A field name bounded for an error message: a client chose it."""
    return name[:64]
