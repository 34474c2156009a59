"""JSON schemas as llguidance can enforce them while a model generates. Pure.

A schema is rewritten by position (``agent/loader/schema_rewriting.py``), compiled for a probe, and where the compiler
still refuses it, the smallest part that it refuses is loosened. So no keyword, known or to come, refuses a request that
asks for leniency.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from agent.loader.schema_keywords import RULES
from agent.loader.schema_rewriting import NOTHING, Losses, Node, Rewriting, Slot, Tree, Unfollowable, slots
from agent.loader.schema_validation import unmet
from agent.loader.schema_values import barren, every_slot, name_of, overlap, reachable, too_deep

__all__ = ["Followed", "Unfollowable", "follow", "unmet"]

Faulty = Callable[[dict[str, Any]], str | None]
_DROPPED_FIRST = (
    *("format", "pattern", "multipleOf", "exclusiveMinimum", "exclusiveMaximum", "minimum", "maximum"),
    *("minLength", "maxLength", "minProperties", "maxProperties", "minItems", "maxItems", "patternProperties"),
    *("allOf", "anyOf", "$ref", "enum", "const", "prefixItems", "items", "additionalProperties", "properties"),
    *("required", "type"),
)
"""Where several keywords could be at fault, what says least about the shape of a value goes first."""
_WITH = {"patternProperties": "additionalProperties", "prefixItems": "items", "properties": "additionalProperties"}
"""Keywords that mean "what the first does not name": kept without the first they would forbid more."""
_MOST_PROBES, _PROBED_BYTES = 2000, 20_000_000


class Followed(NamedTuple):
    """A schema that llguidance enforces; it refers to nothing but ``#/$defs/<prefix>N``, which ``definitions`` holds by
    name. ``unenforced``: what is stated and not enforced, each as "keyword at pointer"."""

    schema: dict[str, Any] | bool
    definitions: dict[str, Any]
    unenforced: tuple[str, ...]


def follow(schema: Any, *, prefix: str, closed: bool, lenient: bool, faulty: Faulty) -> Followed:
    """A schema to put into another one. ``closed``: objects that declare properties hold no others unless they say so.
    ``lenient``: what cannot be enforced is left out and listed. ``faulty`` compiles a schema and returns what is wrong.
    Raises Unfollowable where the schema cannot be satisfied and, not ``lenient``, at the first thing left out."""
    losses = Losses(lenient=lenient)
    if not _is_json(schema):
        losses.add("schema", "", "is not JSON")
        return Followed({}, {}, losses.listed())
    rewriting = Rewriting(schema, prefix, losses, RULES, closed=closed)
    trees = {"": rewriting.run(), **rewriting.definitions}
    for branches, at, told_by in rewriting.alternatives:
        if overlap(branches, told_by, trees):
            losses.add("oneOf", at, "has alternatives that overlap")
    _Repair(trees, losses, faulty).run()
    root = trees[""]
    return Followed({} if root is True else root, reachable(trees), losses.listed())


def _is_json(schema: Any) -> bool:
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class _Spent(Exception):
    """No more probes."""


class _Repair:
    """Makes rewritten schemas compile: ``trees`` by name, "" is the root; they are changed in place."""

    def __init__(self, trees: dict[str, Tree], losses: Losses, faulty: Faulty) -> None:
        self._trees, self._losses, self._faulty = trees, losses, faulty
        self._probes = 0

    def run(self) -> None:
        """Raises Unfollowable where nothing satisfies the root."""
        self._limit_depth()
        self._prune()
        size = len(json.dumps(self._trees))
        self._probes = min(_MOST_PROBES, _PROBED_BYTES // size + 20)
        try:
            for loosen in (self._loosen_each_alone, self._loosen_together, self._loosen_together):
                if self._fault(self._trees[""], self._definitions()) is None:
                    return
                loosen()
                self._prune()
            refused = self._fault(self._trees[""], self._definitions())
        except _Spent:
            refused = "not known"
        if refused is not None:
            self._give_up()

    def _definitions(self) -> dict[str, Any]:
        return {name: tree for name, tree in self._trees.items() if name}

    def _fault(self, tree: Tree | dict[str, Any], definitions: dict[str, Any]) -> str | None:
        self._probes -= 1
        if self._probes < 0:
            raise _Spent
        if isinstance(tree, bool):
            return None if tree else NOTHING
        # below the root, where it will be used: options that are put into the root may change the order of its keywords
        return self._faulty({"allOf": [tree], "$defs": definitions})

    def _limit_depth(self) -> None:
        while found := too_deep(self._trees):
            for container, key in found:
                self._losses.add("schema", container[key].at, "is nested too deep")
                container[key] = True

    def _prune(self) -> None:
        """References to what nothing satisfies become what nothing satisfies, which the compiler can leave out."""
        dead = barren(self._trees)
        if "" in dead:
            at = root.at if isinstance(root := self._trees[""], Node) else ""
            raise Unfollowable("schema", at, NOTHING)
        for container, key in every_slot(self._trees):
            held = container[key]
            if isinstance(held, Node) and name_of(held) in dead:
                container[key] = False
        for name in dead:
            del self._trees[name]

    def _loosen_each_alone(self) -> None:
        """Each schema's own keywords, whatever its subschemas are; inner ones first."""
        known: dict[str, str | None] = {}

        def fault(node: dict[str, Any]) -> str | None:
            alone = _alone(node)
            written = json.dumps(alone)
            if written not in known:
                known[written] = self._fault(alone, {})
            return known[written]

        for slot in reversed(every_slot(self._trees)):
            if isinstance(slot[0][slot[1]], Node):
                self._loosen(slot, fault)

    def _loosen_together(self) -> None:
        """Schemas that are refused for what their parts mean together. Of the definitions that are refused, each is
        loosened while the others demand nothing; it too, unless the fault is that it refers to itself."""
        names = list(self._trees)[::-1]
        refused = {name for name in names if self._fault(self._trees[name], self._definitions()) is not None}
        for name in (name for name in names if name in self._trees):
            definitions = {n: True if n in refused - {name} else tree for n, tree in self._definitions().items()}
            while (tree := self._trees[name]) is not False and self._fault(tree, definitions) is not None:
                alone = {**definitions, name: True}
                used = definitions if self._fault(tree, alone) is None else alone
                fault = partial(self._fault, definitions=used)
                self._loosen(self._culprit((self._trees, name), fault), fault)
            refused.discard(name)
            self._prune()

    def _culprit(self, slot: Slot, fault: Callable[[Tree], str | None]) -> Slot:
        """The innermost schema that is refused for more than what it refers to."""
        for inner in slots(slot[0][slot[1]]):
            held = inner[0][inner[1]]
            if isinstance(held, Node) and list(held) != ["$ref"] and fault(held) is not None:
                return self._culprit(inner, fault)
        return slot

    def _loosen(self, slot: Slot, fault: Callable[[dict[str, Any]], str | None]) -> None:
        """Leaves out what is refused: one keyword if that helps, otherwise one after the other."""
        container, key = slot
        node = container[key]
        error = fault(node)
        if error is None:
            return
        if "nsatisfiable" in error:
            container[key] = False
            return
        held = [keyword for keyword in _DROPPED_FIRST if keyword in node]
        enough = (keyword for keyword in held if fault(_without(node, keyword)) is None)
        for keyword in [one] if (one := next(enough, "")) else held:
            self._losses.add(keyword, node.at)
            kept = _without(node, keyword)
            node.clear()
            node.update(kept)
            if fault(node) is None:
                return

    def _give_up(self) -> None:
        self._losses.add("schema", "")
        root = self._trees[""]
        stated = root.get("type") if isinstance(root, Node) else None
        self._trees.clear()
        self._trees[""] = Node("", {"type": stated} if stated else {})


def _without(node: dict[str, Any], keyword: str) -> dict[str, Any]:
    return {key: held for key, held in node.items() if key not in (keyword, _WITH.get(keyword))}


def _alone(node: dict[str, Any]) -> dict[str, Any]:
    """A schema whose subschemas demand nothing, unless they are false."""
    named: dict[str, Any] = {key: dict(node[key]) for key in ("properties", "patternProperties") if key in node}
    listed: dict[str, Any] = {key: list(node[key]) for key in ("prefixItems", "allOf", "anyOf") if key in node}
    alone = Node("", {key: held for key, held in {**node, **named, **listed}.items() if key != "$ref"})
    for container, key in slots(alone):
        container[key] = container[key] is not False
    return alone
