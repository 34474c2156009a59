"""What a value leaves unmet of a JSON schema: the jsonschema library within limits, on any schema. Pure."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema.validators
import regex
from jsonschema.exceptions import ValidationError
from jsonschema_specifications import REGISTRY

from agent.loader.schema_references import Document, draft, pointer, portable

_STEPS = 100_000
_STEPS_OF_A_PATTERN, _PATTERN_S = 100, 0.1
_LISTS = ("allOf", "anyOf", "enum", "oneOf", "prefixItems", "required")
_NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf", "divisibleBy")

_Check = Callable[[Any, Any, Any, Any], Any]


def unmet(schema: Any, value: Any) -> str | None:
    """What a value breaks of a schema, as "keyword at pointer" (a reference's own pointer for what it refers to), or
    None. Formats are annotations, ``nullable`` is honoured, a keyword whose value means nothing is not checked. Never
    raises. What takes longer than a few seconds counts as met: steps are limited, and so is the time of each search for
    a pattern."""
    try:
        bare, patterns = _bare(schema)
        base = _DIALECTS.get(draft(schema), _NEWEST)
        checker = _extended(base, _Checks(patterns).table(base))
        error = next(checker(bare, registry=REGISTRY).iter_errors(value), None)
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
    """The limit of steps, or of a pattern's time, is reached."""


def _bare(schema: Any) -> tuple[Any, bool]:
    """A copy without ``$schema``, with which the library would go on without our checks; whether there are patterns
    among the names of properties."""
    bare = json.loads(json.dumps(schema))
    document, patterns = Document(bare), False
    waiting = [document.root]
    while waiting:
        place = waiting.pop()
        if isinstance(place.schema, dict):
            waiting += document.children(place)
            place.schema.pop("$schema", None)
            patterns = patterns or "patternProperties" in place.schema
    return bare, patterns


class _Checks:
    """The keywords' checks for one value, counted, and with those replaced that search for patterns."""

    def __init__(self, patterns: bool) -> None:
        self._left = _STEPS
        self._patterns = patterns

    def table(self, base: Any) -> dict[str, _Check]:
        """Checks by keyword."""
        checks = {
            **base.VALIDATORS,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
            "type": _or_null(base.VALIDATORS["type"]),
        }
        if self._patterns:
            checks.pop("unevaluatedProperties", None)  # the library searches for the patterns itself
        return {keyword: self._guarded(keyword, check) for keyword, check in checks.items()}

    def _guarded(self, keyword: str, check: _Check) -> _Check:
        def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            self._spend(1)
            if not _means_something(keyword, value, schema):
                return
            try:
                yield from check(validator, value, instance, schema) or ()
            except _TooMuch:
                raise
            except Exception:  # noqa: BLE001  # whatever a keyword's value makes the library raise: it means nothing
                return

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
