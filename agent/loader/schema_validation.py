"""What a value leaves unmet of a JSON schema: the jsonschema library within limits, on any schema. Pure."""

import graphlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema.validators
import regex
from jsonschema.exceptions import ValidationError
from referencing import Registry

from agent.loader.schema_references import IN_PLACE, Document, Place, draft, pointer, portable

_STEPS = 50_000
_DEPTH = 100
"""Checks within checks, each of up to six frames of Python. The library must not reach the interpreter's limit: its
extension in Rust does not survive that."""
_MOST_REFERENCES = 40
"""With more, what is unevaluated is not looked for: the library follows them without our limits."""
_STEPS_OF_A_PATTERN, _PATTERN_S = 100, 0.1
_LISTS = ("allOf", "anyOf", "enum", "oneOf", "prefixItems", "required")
_TURNING = ("contains", "disallow", "if", "not", "oneOf")
"""Keywords that a value may break because it satisfies a schema: inside, what is not known must not count as met."""
_NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf", "divisibleBy")

_Check = Callable[[Any, Any, Any, Any], Any]


def unmet(schema: Any, value: Any) -> str | None:
    """What a value breaks of a schema, as "keyword at pointer" (a reference's own pointer for what it refers to), or
    None. Formats are annotations, ``nullable`` is honoured, a keyword whose value means nothing is not checked. Never
    raises. What takes longer than a few seconds counts as met: steps are limited, and so is the time of each search for
    a pattern."""
    try:
        bare, unevaluated = _bare(schema)
        checker = _Checks().library(_DIALECTS.get(draft(schema), _NEWEST), unevaluated=unevaluated)
        error = next(checker(bare, registry=Registry()).iter_errors(value), None)
    except Exception:  # noqa: BLE001  # libraries may raise anything on a hostile schema; it has been followed already
        return None
    if error is None:
        return None
    steps = [str(step) for step in error.absolute_schema_path]
    return f"{error.validator or 'schema'} at {pointer(tuple(steps[:-1]))[:200] or '/'}"


_extended: Any = jsonschema.validators.extend
_NEWEST: Any = jsonschema.Draft202012Validator
_DIALECTS: dict[int, Any] = {
    3: jsonschema.Draft3Validator,
    4: jsonschema.Draft4Validator,
    6: jsonschema.Draft6Validator,
    7: jsonschema.Draft7Validator,
    2019: jsonschema.Draft201909Validator,
}


class _TooMuch(Exception):
    """The limit of steps, of depth, or of a pattern's time is reached; or what matters is not known."""


def _bare(schema: Any) -> tuple[Any, bool]:
    """A copy without ``$schema``, with which the library would go on without our checks; and whether it may look for
    what is unevaluated, for which it searches patterns and follows references by itself."""
    bare = json.loads(json.dumps(schema))
    document = Document(bare)
    places = [document.root]
    for place in places:
        places += document.children(place) if isinstance(place.schema, dict) else ()
    schemas = [place.schema for place in places if isinstance(place.schema, dict)]
    for one in schemas:
        one.pop("$schema", None)
    beyond = any(key in one for one in schemas for key in ("patternProperties", "$dynamicRef", "$recursiveRef"))
    return bare, not beyond and _ends(document, places)


def _ends(document: Document, places: list[Place]) -> bool:
    """Whether following references, on one value, ends soon."""
    leads: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    references = 0
    for place in places:
        if not isinstance(place.schema, dict):
            continue
        below = [one for one in document.children(place) if one.path[len(place.path)] in {*IN_PLACE, "not"}]
        if isinstance(reference := place.schema.get("$ref"), str):
            references += 1
            below += [found] if (found := document.target(place, reference)) else []
        leads[place.path] = [one.path for one in below]
    try:
        graphlib.TopologicalSorter(leads).prepare()
    except graphlib.CycleError:
        return False
    return references <= _MOST_REFERENCES


class _Checks:
    """The keywords' checks for one value, counted, and with those replaced that search for patterns."""

    def __init__(self) -> None:
        self._left = _STEPS
        self._depth = self._turned = 0

    def library(self, base: Any, *, unevaluated: bool) -> Any:
        """A validator's class of the library that uses these checks."""
        table = {
            **base.VALIDATORS,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
            "type": _or_null(base.VALIDATORS["type"]),
        }
        if not unevaluated:
            table |= {keyword: _unknown for keyword in table if keyword.startswith("unevaluated")}
        return _extended(base, {keyword: self._guarded(keyword, check) for keyword, check in table.items()})

    def _guarded(self, keyword: str, check: _Check) -> _Check:
        def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            self._spend(1)
            if not _means_something(keyword, value, schema):
                return
            turns = keyword in _TURNING
            self._depth, self._turned = self._depth + 1, self._turned + turns
            try:
                if self._depth > _DEPTH:
                    raise _TooMuch
                yield from check(validator, value, instance, schema) or ()
            except _TooMuch:
                raise
            except Exception as error:  # a keyword's value may make the library raise anything
                if self._turned:
                    raise _TooMuch from error
            finally:
                self._depth, self._turned = self._depth - 1, self._turned - turns

        return checked

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooMuch

    def _found(self, pattern: str, text: str) -> bool:
        self._spend(_STEPS_OF_A_PATTERN)
        try:
            found = regex.search(portable(pattern), text, timeout=_PATTERN_S)
        except TimeoutError:
            raise _TooMuch from None
        return found is not None

    def _pattern(self, validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not self._found(value, instance):
            yield ValidationError("does not match")

    def _pattern_properties(self, validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        for pattern, below in value.items() if isinstance(instance, dict) else ():
            for name in [name for name in instance if self._found(pattern, name)]:
                yield from validator.descend(instance[name], below, path=name, schema_path=pattern)

    def _additional_properties(
        self, validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[ValidationError]:
        patterns = schema.get("patternProperties", ())
        names = instance if isinstance(instance, dict) else ()
        for name in [name for name in names if name not in schema.get("properties", ())]:
            if any(self._found(pattern, name) for pattern in patterns):
                continue
            if value is False:
                yield ValidationError("is not declared")
            else:
                yield from validator.descend(instance[name], value, path=name)


def _unknown(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
    raise LookupError("not looked for")


def _or_null(check: _Check) -> _Check:
    def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        return () if instance is None and schema.get("nullable") is True else check(validator, value, instance, schema)

    return checked


def _means_something(keyword: str, value: Any, schema: dict[str, Any]) -> bool:
    """Whether a keyword's value is of its kind; the library would take a text for a list, or true for 1."""
    if keyword == "unevaluatedProperties" and schema.get("additionalProperties") is not None:
        return False  # all of them are evaluated, which the library overlooks in draft 2019-09
    if keyword in _LISTS:
        return isinstance(value, list)
    return not (isinstance(value, bool) and (keyword in _NUMBERS or keyword.startswith(("min", "max"))))
