"""What a rewritten schema means: whether it has any value, whether two share one, how deep it goes. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from agent.loader.schema_rewriting import Node, Slot, Tree, slots

_DEEPEST = 300
"""Levels of schemas, references followed. llguidance recurses, and overflows its stack (which ends the process) at
about 1,500 levels with a stack of 8 MiB."""
_PAIRS = 20_000
"""Comparisons for one choice; a choice of more is taken for overlapping."""
_SCALARS = {"null", "boolean", "number", "integer", "string"}
_KINDS = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}

Trees = Mapping[str, Tree]
"""Schemas by name; "" is the root, the others are definitions."""


def name_of(node: Node) -> str:
    """The definition that a node refers to, "" for none."""
    return str(node.get("$ref", "")).rpartition("/")[2]


def barren(trees: Trees) -> set[str]:
    """The schemas that no value satisfies, since it would have to hold another one for ever, or what is forbidden."""
    fertile: set[str] = set()
    latest_first = list(trees)[::-1]
    while found := {name for name in latest_first if name not in fertile and has_value(trees[name], fertile)}:
        fertile |= found
    return set(trees) - fertile


def has_value(node: Any, fertile: set[str]) -> bool:
    """Whether some value satisfies a schema, ``fertile`` being the definitions that have one. True in doubt."""
    if isinstance(node, bool):
        return node
    if "$ref" in node and name_of(node) not in fertile:
        return False
    if not all(has_value(one, fertile) for one in node.get("allOf", ())):
        return False
    if "anyOf" in node and not any(has_value(one, fertile) for one in node["anyOf"]):
        return False
    types = kinds(node)
    if types & _SCALARS:
        return True
    return ("object" in types and _has_object(node, fertile)) or ("array" in types and _has_array(node, fertile))


def _has_object(node: Node, fertile: set[str]) -> bool:
    named, rest = node.get("properties", {}), node.get("additionalProperties", True)
    rest = True if "patternProperties" in node else rest
    return all(has_value(named.get(name, rest), fertile) for name in node.get("required", ()))


def _has_array(node: Node, fertile: set[str]) -> bool:
    first, least = node.get("prefixItems", []), node.get("minItems", 0)
    return all(has_value(one, fertile) for one in first[:least]) and (
        least <= len(first) or has_value(node.get("items", True), fertile)
    )


def kinds(node: Node) -> set[str]:
    """The types that a schema's own keywords leave; integers are numbers."""
    stated = node.get("type", list({*_KINDS.values(), "object"}))
    types = {"number" if name == "integer" else name for name in ([stated] if isinstance(stated, str) else stated)}
    values = _values(node)
    return types if values is None else types & {_KINDS.get(type(value), "object") for value in values}


def _values(node: Node) -> list[Any] | None:
    return [node["const"]] if "const" in node else node.get("enum")


def overlap(branches: list[Tree], told_by: str | None, trees: Trees) -> bool:
    """Whether a value may satisfy two of the branches. ``told_by``: a property that is declared to tell them apart."""
    count = len(branches)
    if count * count > _PAIRS:
        return True
    pairs = ((a, b) for index, a in enumerate(branches) for b in branches[index + 1 :])
    return not all(_apart(a, b, told_by, trees, 4) for a, b in pairs)


def _apart(a: Any, b: Any, told_by: str | None, trees: Trees, depth: int) -> bool:
    """Whether two schemas surely share no value."""
    if a is False or b is False:
        return True
    if isinstance(a, bool) or isinstance(b, bool) or not depth:
        return False
    for one, other in ((a, b), (b, a)):
        if "$ref" in one and _apart(trees.get(name_of(one), True), other, told_by, trees, depth - 1):
            return True
        if "anyOf" in one and all(_apart(x, other, told_by, trees, depth - 1) for x in one["anyOf"]):
            return True
    if not kinds(a) & kinds(b):
        return True
    mine, others = _values(a), _values(b)
    if mine is not None and others is not None and not {_key(v) for v in mine} & {_key(v) for v in others}:
        return True
    return kinds(a) == kinds(b) == {"object"} and _told_apart(a, b, told_by, trees, depth)


def _told_apart(a: Node, b: Node, told_by: str | None, trees: Trees, depth: int) -> bool:
    mine, others = a.get("properties", {}), b.get("properties", {})
    names = {*a.get("required", ()), *b.get("required", ()), *([told_by] if told_by else ())}
    return any(_apart(mine.get(name, True), others.get(name, True), None, trees, depth - 1) for name in sorted(names))


def _key(value: Any) -> str:
    """Equal for equal values of JSON, where 1 and 1.0 are, and 1 and true are not."""
    return json.dumps(json.loads(json.dumps(value), parse_int=float), sort_keys=True)


def too_deep(trees: dict[str, Tree]) -> list[Slot]:
    """Where a nesting begins that is too deep for llguidance, which follows the first reference to each definition."""
    seen: set[str] = set()
    found: list[Slot] = []
    waiting: list[tuple[Slot, int]] = [((trees, ""), 0)]
    while waiting:
        (container, key), level = waiting.pop()
        node = container[key]
        if isinstance(node, bool):
            continue
        if level > _DEEPEST:
            found.append((container, key))
            continue
        waiting += [(slot, level + 1) for slot in reversed(list(slots(node)))]
        if (name := name_of(node)) and name not in seen:
            seen.add(name)
            waiting.append(((trees, name), level + 1))
    return found


def reachable(trees: Trees) -> dict[str, Tree]:
    """The definitions that the root refers to, and those that they refer to."""
    found: dict[str, Tree] = {}
    waiting = [trees[""]]
    while waiting:
        for container, key in every_slot({"": waiting.pop()}):
            held = container[key]
            name = name_of(held) if isinstance(held, Node) else ""
            if name and name not in found:
                found[name] = trees[name]
                waiting.append(trees[name])
    return found


def every_slot(trees: Trees) -> list[Slot]:
    """Where every schema hangs, outer ones before inner ones."""
    found: list[Slot] = [(trees, name) for name in trees]
    for container, key in found:
        found += slots(container[key])
    return found
