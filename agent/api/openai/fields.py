"""Validated access to a client's JSON: every error names the field and never quotes a value."""

import json
import re
from collections.abc import Collection
from typing import Any

import msgspec

from agent.config import Api
from shared.errors import Refused

MAX_DEPTH = 100
"""Deeper than any schema that can be enforced."""
MAX_NAMED = 64
"""Fields without effect that are named, for each request."""
_INDEX = re.compile(r"\[\d+\]")


class Extras:
    """What a body holds beyond the fields that have an effect: named for the client or, where the node's policy says
    so, refused by name. Null and an empty list count as absent."""

    def __init__(self, policy: Api) -> None:
        self._refuses = policy.unknown_fields == "refuse"
        self._names: dict[str, None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Fields without effect, each once, a list's under ``[]``."""
        return tuple(self._names)

    def idle(self, path: str) -> None:
        """A known field that has no effect."""
        if len(self._names) < MAX_NAMED:
            self._names[_INDEX.sub("[]", path)] = None

    def unknown(self, path: str) -> None:
        """An unknown field. Raises Refused where the policy is to refuse them."""
        if self._refuses:
            raise Refused(f"unknown field {path}", code="unknown_parameter", param=path)
        self.idle(path)

    def beyond(self, tree: dict[str, Any], known: Collection[str], path: str) -> None:
        """An object's unknown fields."""
        for key, value in tree.items():
            if key not in known and value is not None and value != []:
                self.unknown(f"{path}.{shown(key)}")


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


def written(tree: Any, path: str, limit: int) -> str:
    """A schema or similar as JSON text of at most ``limit`` characters."""
    # the plain encoder makes a string of every part; what is surely too long costs only its own length
    found = json.dumps(tree, ensure_ascii=False) if len(msgspec.json.encode(tree)) <= 4 * limit else None
    if found is None or len(found) > limit:
        raise wrong(path, f"at most {limit} characters")
    return found


def boolean(tree: dict[str, Any], name: str, path: str | None = None) -> bool:
    """A boolean; null and a missing field are false."""
    if (value := tree.get(name)) is None:
        return False
    if not isinstance(value, bool):
        raise wrong(path or name, "true or false")
    return value


def integer(tree: dict[str, Any], name: str, low: int, high: int, off: Collection[int] = ()) -> int | None:
    """An integer within bounds; None if absent or one of ``off``, with which other servers' clients say so."""
    if (value := tree.get(name)) is None or _is_off(value, off):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(name, f"an integer from {low} to {high}")
    return value


def number(
    tree: dict[str, Any], name: str, low: float, high: float, default: float, off: Collection[float] = ()
) -> float:
    """A number within bounds; the default if absent or one of ``off``."""
    if (value := tree.get(name)) is None or _is_off(value, off):
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def _is_off(value: Any, off: Collection[float]) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value in off


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
