"""Where the references of a JSON schema lead, by position: any draft, one document. Pure; nothing is fetched.

A keyword is one only where a schema is expected: a *property* named ``$ref`` or ``definitions`` is a property, and
what stands in ``enum``, ``const``, ``default`` or ``examples`` is a value.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

_NAMED = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}
"""Keywords that hold schemas under names."""
_HELD = {
    *("additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "contentSchema", "disallow", "else"),
    *("extends", "if", "items", "not", "oneOf", "prefixItems", "propertyNames", "then", "type"),
    *("unevaluatedItems", "unevaluatedProperties"),
}
"""Keywords that hold a schema or a list of schemas."""
IN_PLACE = {"allOf", "anyOf", "dependencies", "dependentSchemas", "else", "extends", "if", "oneOf", "then"}
"""Keywords whose schemas apply to the same value as the schema that holds them; ``$ref`` is one, too."""
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_NEWEST = 2020


class Place(NamedTuple):
    """A schema in its document: its path from the root, the base URI there, and what stands there."""

    path: tuple[str, ...]
    base: str
    schema: Any


def pointer(path: tuple[str, ...]) -> str:
    """The JSON pointer of a path, "" for the root."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)


def draft(schema: Any) -> int:
    """The draft that the schema says it is written in: 3, 4, 6, 7, 2019 or 2020, the newest where it says nothing."""
    stated = schema.get("$schema") if isinstance(schema, dict) else None
    found = re.search(r"draft(?:-0|/)(\d+)", stated) if isinstance(stated, str) else None
    return int(found[1]) if found else _NEWEST


_CLASSES = {
    "s": " \t\n\v\f\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
    "d": "0-9",
    "w": "0-9A-Z_a-z",
}


def portable(pattern: str) -> str:
    """A pattern whose classes of characters are those of ECMA 262 with any library for regular expressions."""
    written, in_class = "", False
    for part in re.findall(r"(?s)\\.|.", pattern):
        held = _CLASSES.get(part[1:].lower())
        if held is None or (in_class and part[1:].isupper()):
            written += part
        elif in_class:
            written += held
        else:
            written += f"[{'^' if part[1:].isupper() else ''}{held}]"
        in_class = part == "[" or (in_class and part != "]")
    return written


class Document:
    """One schema document, searched once for what references can name."""

    def __init__(self, schema: Any) -> None:
        self.draft = draft(schema)
        self.root = Place((), self._base("", schema), schema)
        self._resources = {"": self.root, self.root.base: self.root}
        self._anchors: dict[tuple[str, str], Place] = {}
        self._dynamic: dict[str, int] = {}
        waiting = [self.root]
        while waiting:
            place = waiting.pop()
            if isinstance(place.schema, dict):
                self._note(place)
                waiting += self.children(place)

    def children(self, place: Place) -> Iterator[Place]:
        """The subschemas of a schema; with any draft's keywords, and whatever stands where a schema is expected."""
        for key, held in place.schema.items():
            if key in _NAMED and isinstance(held, dict):
                yield from (self.child(place, key, name) for name in held)
            elif key in _HELD and isinstance(held, list):
                yield from (self.child(place, key, str(index)) for index in range(len(held)))
            elif key in _HELD and isinstance(held, dict):
                yield self.child(place, key)

    def child(self, place: Place, *steps: str) -> Place:
        """What stands some steps below. Raises KeyError or IndexError."""
        for step in steps:
            listed = isinstance(place.schema, list) and step.isdecimal()
            held = place.schema[int(step) if listed else step]
            place = Place((*place.path, step), self._base(place.base, held), held)
        return place

    def target(self, place: Place, reference: str) -> Place | None:
        """What a reference means at a place; None where this document does not hold it."""
        try:
            address, fragment = urldefrag(reference)
            address = urljoin(place.base, address) if address else place.base
        except ValueError:
            return None
        start = self._resources.get(address)
        if start is None or not fragment:
            return start
        fragment = unquote(fragment)
        return self._below(start, fragment) if fragment.startswith("/") else self._anchors.get((address, fragment))

    def is_ambiguous(self, anchor: str) -> bool:
        """Whether a dynamic reference to the anchor ("" for ``$recursiveRef``) may mean more than one schema."""
        return self._dynamic.get(anchor, 0) > (1 if anchor else 0)

    def meant(self, place: Place) -> Place:
        """The place without what means nothing there: the neighbours of a reference, up to draft 7."""
        alone = isinstance(place.schema, dict) and self._stands_alone(place.schema)
        return place._replace(schema={"$ref": place.schema["$ref"]}) if alone else place

    def _below(self, place: Place, fragment: str) -> Place | None:
        try:
            return self.child(place, *(s.replace("~1", "/").replace("~0", "~") for s in fragment.split("/")[1:]))
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def _stands_alone(self, schema: dict[str, Any]) -> bool:
        return self.draft <= 7 and isinstance(schema.get("$ref"), str)

    def _base(self, base: str, schema: Any) -> str:
        if not isinstance(schema, dict) or self._stands_alone(schema):
            return base
        stated = schema.get("id" if self.draft <= 4 else "$id")
        try:
            address = urldefrag(stated)[0] if isinstance(stated, str) else ""
            return urljoin(base, address) if address else base
        except ValueError:
            return base

    def _note(self, place: Place) -> None:
        schema = place.schema
        if self._resources.get(place.base) is None:
            self._resources[place.base] = place
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(name := schema.get(keyword), str):
                self._anchors[place.base, name] = place
        if isinstance(name := schema.get("$dynamicAnchor"), str):
            self._dynamic[name] = self._dynamic.get(name, 0) + 1
        self._dynamic[""] = self._dynamic.get("", 0) + (schema.get("$recursiveAnchor") is True)
        stated = schema.get("id" if self.draft <= 4 else "$id")
        if isinstance(stated, str) and "#" in stated and not self._stands_alone(schema):
            self._anchors.setdefault((place.base, stated.partition("#")[2]), place)
