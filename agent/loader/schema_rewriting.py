"""A JSON schema of any draft as one that llguidance compiles: resolved references, its keywords only. Pure.

What llguidance cannot enforce is given to ``Losses``, which records it or refuses. Dropping is always loosening: what
the original accepts, the rewritten schema accepts, but for undeclared properties where ``closed`` is asked for, and for
the order of properties.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from agent.loader.schema_references import IN_PLACE, REFERENCES, Document, Place, pointer

LEVELS = 24
"""Schemas nested deeper are moved to a definition of their own: llguidance reads at most 128 levels of JSON."""
_CLOSED_BY = ("additionalProperties", "patternProperties", "unevaluatedProperties")
UNSUPPORTED = "cannot be enforced while generating"
ODD = "has a value that is not valid there"
NOTHING = "cannot be satisfied by any value"


class Unfollowable(ValueError):
    """A schema that cannot be followed: which keyword, at which JSON pointer ("" is the root), and why."""

    def __init__(self, keyword: str, at: str, reason: str) -> None:
        self.keyword, self.pointer, self.reason = keyword, at if len(at) <= 200 else f"{at[:200]}...", reason
        super().__init__(f"{keyword} at {self.pointer or '/'} {reason}")


class Losses:
    """What is stated and will not be enforced. Not ``lenient``, the first loss raises Unfollowable."""

    def __init__(self, *, lenient: bool) -> None:
        self.lenient = lenient
        self._said: dict[str, None] = {}

    def add(self, keyword: str, at: str, reason: str = UNSUPPORTED) -> None:
        """Records a loss once."""
        lost = Unfollowable(keyword, at, reason)
        if not self.lenient:
            raise lost
        self._said[f"{keyword} at {lost.pointer or '/'}"] = None

    def listed(self) -> tuple[str, ...]:
        """Each as "keyword at pointer"."""
        return tuple(self._said)


class Node(dict[str, Any]):
    """A rewritten schema that knows the pointer of its original."""

    def __init__(self, at: str, held: dict[str, Any] | None = None) -> None:
        super().__init__(held or {})
        self.at = at


Tree = Node | bool
Slot = tuple[Any, Any]
"""Where a schema hangs: its container and the key or index there."""


def slots(node: Tree) -> Iterator[Slot]:
    """Where a rewritten schema's subschemas hang."""
    if isinstance(node, bool):
        return
    for key in ("properties", "patternProperties"):
        yield from ((node[key], name) for name in node.get(key, ()))
    for key in ("prefixItems", "allOf", "anyOf"):
        yield from ((node[key], index) for index in range(len(node.get(key, ()))))
    yield from ((node, key) for key in ("items", "additionalProperties") if key in node)


class _Mode(NamedTuple):
    """How a schema may be closed to undeclared properties: ``alone``, it is all that applies to its value and may be.
    ``contested`` are the subschemas (keyword or property name) whose values other schemas describe, too; None: all."""

    alone: bool
    contested: frozenset[str] | None


_ALONE = _Mode(True, frozenset())
_OPEN = _Mode(False, None)


class Rewriting:
    """One document being rewritten. Its definitions are those that something refers to, each rewritten once."""

    def __init__(self, schema: Any, prefix: str, losses: Losses, rules: "Mapping[str, Rule]", *, closed: bool) -> None:
        self.document = Document(schema)
        self.definitions: dict[str, Tree] = {}
        self.losses = losses
        self.alternatives: list[tuple[list[Tree], str, str | None]] = []
        """Of each ``oneOf``: its branches, pointer, and the property that is declared to tell them apart."""
        self._prefix, self._rules = prefix, rules
        self._top = _ALONE if closed else _OPEN
        self._names: dict[tuple[tuple[str, ...], _Mode], str] = {}
        self._waiting: list[tuple[str, Place, _Mode]] = []

    def run(self) -> Tree:
        """The root, with ``definitions`` filled."""
        root = self.schema(self.document.root, self._top, 0)
        while self._waiting:
            name, place, mode = self._waiting.pop()
            self.definitions[name] = self.schema(place, mode, 0)
        return root

    def schema(self, place: Place, mode: _Mode, level: int) -> Tree:
        """One schema rewritten, and what is below it."""
        schema, at = place.schema, pointer(place.path)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self.losses.add("schema", at, "is neither an object nor a boolean")
            return True
        if level > LEVELS:
            return self.reference(place, mode)
        one = One(self, self.document.meant(place), mode, level)
        for keyword, value in one.schema.items():
            if rule := self._rules.get(keyword):
                rule(one, keyword, value)
        return False if one.impossible else one.node

    def reference(self, place: Place, mode: _Mode) -> Node:
        """A reference to what stands at a place."""
        name = self._names.get((place.path, mode))
        if name is None:
            name = self._names[place.path, mode] = f"{self._prefix}{len(self._names)}"
            self._waiting.append((name, place, mode))
        return Node(pointer(place.path), {"$ref": f"#/$defs/{name}"})

    def in_place(self, place: Place) -> list[Place]:
        """The schemas that apply to the same value, this one first, each once; conditional ones included."""
        found: dict[tuple[str, ...], Place] = {}
        waiting = [place]
        while waiting:
            one = self.document.meant(waiting.pop())
            if one.path in found or not isinstance(one.schema, dict):
                continue
            found[one.path] = one
            below = [c for c in self.document.children(one) if c.path[len(one.path)] in IN_PLACE]
            waiting += reversed([*below, *self.targets(one)])
        return list(found.values())

    def targets(self, place: Place) -> list[Place]:
        """What a schema refers to, as far as it is known."""
        found = (self.target(place, key) for key in REFERENCES if key in place.schema)
        return [one for one in found if one is not None]

    def target(self, place: Place, keyword: str) -> Place | None:
        """What a reference means; None where the document does not hold it or does not say which one it is."""
        reference = place.schema[keyword]
        if not isinstance(reference, str) or self.is_ambiguous(keyword, reference):
            return None
        return self.document.target(place, reference)

    def is_ambiguous(self, keyword: str, reference: str) -> bool:
        """Whether a dynamic reference may mean more than one schema."""
        name = reference.partition("#")[2] if keyword == "$dynamicRef" else ""
        return keyword != "$ref" and self.document.is_ambiguous(name)

    def child_mode(self, mode: _Mode, slot: str) -> _Mode:
        """How a schema below may be closed."""
        return _OPEN if mode.contested is None or slot in mode.contested else self._top


class Declared(NamedTuple):
    """What the schemas that apply to one value say of its properties."""

    names: tuple[str, ...]  # in order; required ones that are not declared, too
    declares: bool  # whether there is a list of properties at all
    open: bool  # whether one says what undeclared properties are, or is not known
    contested: frozenset[str] | None


def declared(rewriting: Rewriting, place: Place, besides: dict[str, Any] | None = None) -> Declared:
    """``besides``: a schema whose own statement on undeclared properties does not count."""
    places = rewriting.in_place(place)
    schemas = [one.schema for one in places]
    names: dict[str, int] = {}
    for schema in schemas:
        for name in schema["properties"] if isinstance(schema.get("properties"), dict) else ():
            names[name] = names.get(name, 0) + 1
    demanded = [name for schema in schemas for name in _demanded(schema)]
    lists = [key for schema in schemas for key in ("items", "prefixItems") if key in schema]
    patterns = any("patternProperties" in schema for schema in schemas)
    held = len(schemas) > 1 and any(isinstance(schema.get("additionalProperties"), dict) for schema in schemas)
    shared = {name for name, count in names.items() if count > 1} | (set(lists) if len(lists) > 1 else set())
    return Declared(
        names=tuple(dict.fromkeys([*names, *demanded])),
        declares=any(isinstance(schema.get("properties"), dict) for schema in schemas),
        open=any(s.get(key) is not None for s in schemas if s is not besides for key in _CLOSED_BY)
        or any(rewriting.target(one, key) is None for one in places for key in REFERENCES if key in one.schema),
        contested=None if patterns or held else frozenset(shared),
    )


def _demanded(schema: dict[str, Any]) -> list[str]:
    """Names that a schema may require."""
    lists = [schema.get("required")]
    for key in ("dependentRequired", "dependencies"):
        lists += schema[key].values() if isinstance(schema.get(key), dict) else []
    return [name for held in lists if isinstance(held, list) for name in held if isinstance(name, str)]


class One:
    """One schema object being rewritten, keyword by keyword in the order they are written."""

    def __init__(self, rewriting: Rewriting, place: Place, mode: _Mode, level: int) -> None:
        self.rewriting, self.place, self.level = rewriting, place, level
        self.schema: dict[str, Any] = place.schema
        self.node = Node(pointer(place.path))
        self.impossible = self.names_are_listed = False
        self.passes_on = self._passes_on()
        self.mode = mode
        if mode.alone and not self.passes_on:
            self._close(mode)

    def lose(self, keyword: str, reason: str = UNSUPPORTED) -> None:
        self.rewriting.losses.add(keyword, self.node.at, reason)

    def below(self, *steps: str) -> Tree:
        """A schema that applies to a part of the value."""
        child = self.rewriting.document.child(self.place, *steps)
        slot = steps[1] if steps[0] == "properties" else steps[0]
        return self.rewriting.schema(child, self.rewriting.child_mode(self.mode, slot), self.level + 1)

    def beside(self, *steps: str) -> Tree:
        """A schema that applies to the same value."""
        return self.rewriting.schema(self.rewriting.document.child(self.place, *steps), self.mode, self.level + 1)

    def conjoin(self, keyword: str, branches: list[Tree]) -> None:
        """``anyOf`` or ``$ref`` where there may be one already."""
        if keyword in self.node:
            self.node.setdefault("allOf", []).append(Node(self.node.at, {keyword: branches}))
        else:
            self.node[keyword] = branches

    def _passes_on(self) -> bool:
        """Whether the schema is but a choice of, or a reference to, schemas that each describe the whole value."""
        applied = [key for key in (*IN_PLACE, *REFERENCES) if key in self.schema]
        held = self.schema[applied[0]] if len(applied) == 1 else None
        whole = applied in (["$ref"], ["anyOf"], ["oneOf"]) or (isinstance(held, list) and len(held) == 1)
        own = ("properties", "required", "items", "prefixItems", *_CLOSED_BY)
        return whole and not any(key in self.schema for key in own)

    def _close(self, mode: _Mode) -> None:
        found = declared(self.rewriting, self.place)
        self.mode = _Mode(False, found.contested)
        if found.declares and not found.open:
            self.close(found.names)

    def close(self, names: tuple[str, ...]) -> None:
        """No properties but these."""
        own = self.schema["properties"] if isinstance(self.schema.get("properties"), dict) else {}
        held = self.node.setdefault("properties", {})
        for name in (*own, *names):
            held.setdefault(name, True)
        self.node["additionalProperties"] = False


Rule = Callable[[One, str, Any], None]
"""What to do with a keyword of a schema, and its value."""
