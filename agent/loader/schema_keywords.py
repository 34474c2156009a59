"""What each keyword of JSON schema becomes in what llguidance compiles. Pure."""

import math
from typing import Any

from agent.loader.schema_references import IN_PLACE, REFERENCES, Place, portable
from agent.loader.schema_rewriting import LEVELS, ODD, Node, One, Rewriting, Rule, Tree, declared

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_EXACT = 1 << 53
"""llguidance computes with doubles: larger integers are not told apart."""


def _types(one: One, keyword: str, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    known = [name for name in names if isinstance(name, str) and name in (*_TYPES, "integer")]
    if "any" in names:
        return
    if not known or len(known) < len(names):
        one.lose(keyword, ODD)
        return
    if one.schema.get("nullable") is True:
        known.append("null")
    known = list(dict.fromkeys(known))
    one.node[keyword] = known[0] if len(known) == 1 else known


def _values(one: One, keyword: str, value: Any) -> None:
    if keyword == "enum" and not isinstance(value, list):
        one.lose(keyword, ODD)
    elif _is_exact(value):
        one.node[keyword] = value
    else:
        one.lose(keyword)


def _is_exact(value: Any) -> bool:
    """Whether no number in it is changed by computing with doubles."""
    if isinstance(value, dict | list):
        return all(map(_is_exact, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) <= _EXACT or (abs(value) < 1 << 1000 and int(float(value)) == value)


def _count(one: One, keyword: str, value: Any) -> None:
    if not _is_number(value) or value < 0 or value != int(value):
        one.lose(keyword, ODD)
    elif value or keyword.startswith("max"):
        one.node[keyword] = int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bound(one: One, keyword: str, value: Any) -> None:
    strict = "exclusive" + keyword[0].upper() + keyword[1:]
    if keyword.startswith("exclusive") and isinstance(value, bool):
        return  # draft 4: says how its neighbour is meant
    if not _is_number(value):
        one.lose(keyword, ODD)
    elif abs(value) > _EXACT:
        one.lose(keyword)
    else:
        one.node[strict if one.schema.get(strict) is True else keyword] = value


def _multiple(one: One, keyword: str, value: Any) -> None:
    if keyword == "divisibleBy" and one.rewriting.document.draft > 3:
        return
    if not _is_number(value) or value <= 0:
        one.lose(keyword, ODD)
    else:
        one.node["multipleOf"] = value


def _pattern(one: One, keyword: str, value: Any) -> None:
    if isinstance(value, str):
        one.node[keyword] = portable(value)
    else:
        one.lose(keyword, ODD)


def _format(one: One, keyword: str, value: Any) -> None:
    if isinstance(value, str) and value in _FORMATS:
        one.node[keyword] = value
    elif one.rewriting.losses.lenient:
        one.lose(keyword)  # otherwise an annotation


def _required(one: One, keyword: str, value: Any) -> None:
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(names) < len(value):
        one.lose(keyword, ODD)
    if names:
        one.node[keyword] = list(dict.fromkeys(names))


def _named(one: One, keyword: str, value: Any) -> None:
    if not isinstance(value, dict):
        one.lose(keyword, ODD)
        return
    written = portable if keyword == "patternProperties" else str
    one.node.setdefault(keyword, {}).update({written(name): one.below(keyword, name) for name in value})


def _additional(one: One, keyword: str, value: Any) -> None:
    if value is None:
        one.lose(keyword, ODD)
    elif not one.names_are_listed:
        one.node[keyword] = one.below(keyword)


def _items(one: One, keyword: str, value: Any) -> None:
    if isinstance(value, list):
        one.node["prefixItems"] = [one.below(keyword, str(index)) for index in range(len(value))]
    else:
        one.node["items"] = one.below(keyword)


def _prefix_items(one: One, keyword: str, value: Any) -> None:
    if isinstance(value, list):
        _items(one, keyword, value)
    else:
        one.lose(keyword, ODD)


def _additional_items(one: One, keyword: str, value: Any) -> None:
    if isinstance(one.schema.get("items"), list):
        one.node["items"] = one.below(keyword)


def _branches(one: One, keyword: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        one.lose(keyword, ODD)
        return
    branches = [one.beside(keyword, str(index)) for index in range(len(value))]
    if keyword == "allOf":
        one.node.setdefault("allOf", []).extend(branches)
        return
    one.conjoin("anyOf", branches)
    if keyword == "oneOf":
        declared = one.schema.get("discriminator")
        told_by = declared.get("propertyName") if isinstance(declared, dict) else None
        one.rewriting.alternatives.append((branches, one.node.at, told_by if isinstance(told_by, str) else None))


def _extends(one: One, keyword: str, value: Any) -> None:
    if one.rewriting.document.draft > 3:
        return
    steps = [(str(index),) for index in range(len(value))] if isinstance(value, list) else [()]
    one.node.setdefault("allOf", []).extend(one.beside(keyword, *step) for step in steps)


def _refer(one: One, keyword: str, value: Any) -> None:
    if not isinstance(value, str):
        one.lose(keyword, ODD)
    elif (target := one.rewriting.target(one.place, keyword)) is not None:
        one.conjoin("$ref", one.rewriting.reference(target, one.mode)["$ref"])
    elif one.rewriting.is_ambiguous(keyword, value):
        one.lose(keyword)
    else:
        is_here = value.startswith("#")
        one.lose(keyword, "refers to what is not there" if is_here else "refers to another document")


def _disallow(one: One, keyword: str, value: Any) -> None:
    if one.rewriting.document.draft <= 3:
        one.lose(keyword)


def _not(one: One, keyword: str, value: Any) -> None:
    if value is True or value == {}:
        one.impossible = True
    elif value is False:
        return
    elif (left := _other_types(one.schema, value)) is None:
        one.lose(keyword)
    elif left:
        one.node.setdefault("allOf", []).append(Node(one.node.at, {"type": left}))
    else:
        one.impossible = True


def _other_types(schema: dict[str, Any], refused: Any) -> list[str] | None:
    """The types that are left where the schema refuses types and nothing else."""
    if not isinstance(refused, dict) or list(refused) != ["type"]:
        return None
    names = refused["type"] if isinstance(refused["type"], list) else [refused["type"]]
    return None if any(name not in _TYPES for name in names) else [name for name in _TYPES if name not in names]


def _property_names(one: One, keyword: str, value: Any) -> None:
    """Properties of listed names, or of a pattern, say the same where no others are declared."""
    rules = _resolved(one.rewriting, one.rewriting.document.child(one.place, keyword))
    if rules is True or rules == {} or rules == {"type": "string"}:
        return
    free = not any(
        key in one.schema for key in ("properties", "patternProperties", "required", "unevaluatedProperties")
    )
    stated = {**rules, "type": "string"} if isinstance(rules, dict) and rules.get("type", "string") == "string" else {}
    names, pattern = stated.get("enum"), stated.get("pattern")
    if free and set(stated) == {"type", "enum"} and isinstance(names, list) and _are_text(names):
        one.node["properties"] = {name: _any_property(one) for name in names}
    elif free and set(stated) == {"type", "pattern"} and isinstance(pattern, str):
        one.node["patternProperties"] = {portable(pattern): _any_property(one)}
    else:
        one.lose(keyword)
        return
    one.node["additionalProperties"], one.names_are_listed = False, True


def _are_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _resolved(rewriting: Rewriting, place: Place) -> Any:
    """A schema without what only describes; for a mere reference what it refers to."""
    for _ in range(LEVELS):
        if not isinstance(place.schema, dict):
            return place.schema
        rules = {key: held for key, held in place.schema.items() if key in RULES}
        if list(rules) != ["$ref"] or not (found := rewriting.targets(place)):
            return rules
        place = found[0]
    return None


def _any_property(one: One) -> Tree:
    held = one.schema.get("additionalProperties", True)
    if not isinstance(held, dict):
        return held is not False
    place = one.rewriting.document.child(one.place, "additionalProperties")
    return one.rewriting.reference(place, one.rewriting.child_mode(one.mode, "additionalProperties"))


def _unevaluated(one: One, keyword: str, value: Any) -> None:
    """Alone in its schema it means what ``additionalProperties`` and ``items`` mean."""
    same = "additionalProperties" if keyword == "unevaluatedProperties" else "items"
    told = "additionalItems" if isinstance(one.schema.get("items"), list) and same == "items" else same
    if value is True or value == {} or one.schema.get(told) is not None:
        return
    if not any(key in one.schema for key in (*IN_PLACE, *REFERENCES, "contains")):
        one.node[same] = one.below(keyword)
        return
    found = declared(one.rewriting, one.place, besides=one.schema)
    if value is False and same == "additionalProperties" and not found.open:
        one.close(found.names)
    one.lose(keyword)


def _lost(one: One, keyword: str, value: Any) -> None:
    if not _demands_nothing(one.schema, keyword, value):
        one.lose(keyword)


def _demands_nothing(schema: dict[str, Any], keyword: str, value: Any) -> bool:
    if keyword == "contains":
        return schema.get("minContains") == 0 and "maxContains" not in schema
    if keyword == "if":
        return "then" not in schema and "else" not in schema
    return value is False if keyword == "uniqueItems" else value == {}


RULES: dict[str, Rule] = {
    **dict.fromkeys(REFERENCES, _refer),
    **dict.fromkeys(("enum", "const"), _values),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _branches),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
    **dict.fromkeys(("multipleOf", "divisibleBy"), _multiple),
    **dict.fromkeys(("properties", "patternProperties"), _named),
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), _unevaluated),
    **dict.fromkeys(("uniqueItems", "contains", "dependentRequired", "dependentSchemas", "dependencies", "if"), _lost),
    "type": _types,
    "pattern": _pattern,
    "format": _format,
    "required": _required,
    "additionalProperties": _additional,
    "items": _items,
    "prefixItems": _prefix_items,
    "additionalItems": _additional_items,
    "extends": _extends,
    "disallow": _disallow,
    "not": _not,
    "propertyNames": _property_names,
}
"""What each keyword becomes; any other describes, and is left out."""
