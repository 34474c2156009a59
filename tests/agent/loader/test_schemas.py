"""JSON schemas as the grammar of an answer: what is enforced, what is left out, what is refused, and by what name."""

import itertools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agent.loader.schema_references import portable
from agent.loader.schemas import Followed, Unfollowable, follow, unmet
from scripts.schema_suite import allows, faulty, grammar, whole

ANY = object()
"""Whatever is left out."""


def tool(schema: Any, prefix: str = "t0_") -> Followed:
    return follow(schema, prefix=prefix, closed=True, lenient=True, faulty=faulty)


def lenient(schema: Any) -> Followed:
    return follow(schema, prefix="s", closed=False, lenient=True, faulty=faulty)


def strict(schema: Any) -> Followed:
    return follow(schema, prefix="s", closed=False, lenient=False, faulty=faulty)


def takes(followed: Followed, value: Any) -> bool:
    """Whether the compiled grammar takes a value, in some order of its properties."""
    assert faulty(whole(followed)) is None
    return allows(grammar(whole(followed)), value)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


TEXT = {"type": "string"}
TREE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"]}
CASES: dict[str, tuple[Any, list[Any], list[Any], Any]] = {
    # name: schema, values it takes, values it does not, and what is left out leniently ("keyword at pointer")
    "reference to a property": (
        {**of(state={"enum": ["on"]}, many={"type": "array", "items": {"$ref": "#/properties/state"}})},
        [{"state": "on", "many": ["on", "on"]}],
        [{"many": ["off"]}],
        (),
    ),
    "reference to the root": (TREE, [{"v": 1, "next": {"v": 2}}], [{"v": 1, "next": {}}, {"v": "x"}], ()),
    "recursive definition": (
        {"$ref": "#/$defs/N", "$defs": {"N": of(n={"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]})}},
        [{"n": {"n": None}}],
        [{"n": 1}, {"n": {"n": 1}}],
        (),
    ),
    "mutual recursion": (
        {"$ref": "#/$defs/a", "$defs": {"a": of(b={"$ref": "#/$defs/b"}), "b": of(a={"$ref": "#/$defs/a"})}},
        [{"b": {"a": {"b": {}}}}],
        [{"b": {"a": 1}}],
        (),
    ),
    "properties named like keywords": (
        {
            **of(**dict.fromkeys(("$defs", "$ref", "definitions", "properties", "not", "enum", "$id"), TEXT)),
            "required": ["definitions", "$ref"],
        },
        [{"$ref": "a", "definitions": "b"}, {"$defs": "", "$ref": "", "definitions": "", "not": ""}],
        [{"$ref": 1, "definitions": "b"}, {"definitions": "b"}],
        (),
    ),
    "values that look like schemas": (
        of(a={"const": {"$ref": "#/nowhere", "$id": "http://x/"}}, b={"enum": [{"properties": {"x": 1}}]}),
        [{"a": {"$ref": "#/nowhere", "$id": "http://x/"}, "b": {"properties": {"x": 1}}}],
        [{"a": {}}],
        (),
    ),
    "examples and defaults are no schemas": (
        of(a={**TEXT, "default": {"$ref": "#/nowhere"}, "examples": [{"not": {}}]}),
        [{"a": "x"}],
        [{"a": 1}],
        (),
    ),
    "$id beside $ref": (
        {"$id": "https://x/y", **of(a={"$ref": "#/$defs/A"}, b={"$ref": "y#/$defs/A"}), "$defs": {"A": TEXT}},
        [{"a": "x", "b": "y"}],
        [{"a": 1}, {"b": 1}],
        (),
    ),
    "$id of a part": (
        {"$id": "http://h/root", **of(a={"$ref": "part"}), "$defs": {"p": {"$id": "/part", "type": "null"}}},
        [{"a": None}],
        [{"a": 1}],
        (),
    ),
    "pointer is relative to the part with an $id": (
        of(a={"$id": "http://h/part", "$ref": "#/$defs/T", "$defs": {"T": {"type": "null"}}}),
        [{"a": None}],
        [{"a": 1}],
        (),
    ),
    "$anchor": ({**of(a={"$ref": "#z"}), "$defs": {"A": {"$anchor": "z", **TEXT}}}, [{"a": "x"}], [{"a": 1}], ()),
    "escapes in pointers": (
        {
            **of(a={"$ref": "#/$defs/My%20Type"}, b={"$ref": "#/$defs/x~1y"}, c={"$ref": "#/$defs/x~0y"}),
            "$defs": {"My Type": TEXT, "x/y": {"type": "null"}, "x~y": {"type": "boolean"}},
        },
        [{"a": "x", "b": None, "c": True}],
        [{"a": 1}, {"b": 1}, {"c": 1}],
        (),
    ),
    "nested definitions": (
        of(o={**of(a={"$ref": "#/properties/o/$defs/Z"}), "$defs": {"Z": TEXT}}),
        [{"o": {"a": "x"}}],
        [{"o": {"a": 1}}],
        (),
    ),
    "reference into a list": (
        of(a={"anyOf": [TEXT, {"type": "null"}]}, b={"$ref": "#/properties/a/anyOf/1"}),
        [{"b": None}],
        [{"b": "x"}],
        (),
    ),
    "siblings of a reference hold too": (
        {**of(a={"$ref": "#/$defs/A", "maxLength": 2, "description": "d"}), "$defs": {"A": TEXT}},
        [{"a": "xy"}],
        [{"a": "xyz"}, {"a": 1}],
        (),
    ),
    "siblings of a reference mean nothing in draft 7": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$ref": "#/definitions/A",
            "definitions": {"A": of(a={"$ref": "#/definitions/B", "maxLength": 1}), "B": TEXT},
        },
        [{"a": "xy"}],
        [{"a": 1}],
        (),
    ),
    "remote reference": (of(a={"$ref": "https://h/package"}), [{"a": [1]}], [], ("$ref at /properties/a",)),
    "dangling reference": (of(a={"$ref": "#/$defs/A"}), [{"a": [1]}], [], ("$ref at /properties/a",)),
    "dynamic reference to the only anchor": (
        {**of(a={"$dynamicRef": "#n"}), "$defs": {"n": {"$dynamicAnchor": "n", "type": "null"}}},
        [{"a": None}],
        [{"a": 1}],
        (),
    ),
    "integer formats": (of(n={"type": "integer", "format": "uint32", "minimum": 0}), [{"n": 1}], [{"n": -1}], ANY),
    "binary, path and password": (
        of(a={**TEXT, "format": "binary"}, b={**TEXT, "format": "path"}, c={**TEXT, "format": "password"}),
        [{"a": "x", "b": "/tmp", "c": "s"}],
        [{"a": 1}],
        ANY,
    ),
    "formats that are known": (
        of(a={**TEXT, "format": "date"}, b={**TEXT, "format": "uuid"}),
        [{"a": "2024-02-29"}],
        [{"a": "x"}, {"b": "x"}],
        (),
    ),
    "disjoint oneOf": (of(a={"oneOf": [TEXT, {"type": "integer"}]}), [{"a": "x"}, {"a": 1}], [{"a": None}], ()),
    "overlapping oneOf": (
        of(a={"oneOf": [TEXT, {**TEXT, "maxLength": 3}]}),
        [{"a": "long enough"}],
        [{"a": 1}],
        ("oneOf at /properties/a",),
    ),
    "oneOf told apart by a constant behind references": (
        {
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            "$defs": {
                "Cat": {**of(kind={"const": "cat"}, lives={"type": "integer"}), "required": ["kind"]},
                "Dog": {**of(kind={"const": "dog"}, barks={"type": "boolean"}), "required": ["kind"]},
            },
        },
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "barks": True}],
        [{"kind": "cow"}, {"lives": 9}],
        (),
    ),
    "discriminator whose property has a default": (
        {
            "oneOf": [of(kind={"const": "a", "default": "a"}), of(kind={"const": "b", "default": "b"})],
            "discriminator": {"propertyName": "kind"},
        },
        [{"kind": "a"}],
        [{"kind": "c"}],
        (),
    ),
    "oneOf and anyOf": (
        {"anyOf": [TEXT, {"type": "integer"}], "oneOf": [{"type": "integer"}, {"type": "null"}]},
        [1],
        ["x", None],
        (),
    ),
    "one of two is required": (
        {**of(a=TEXT, b=TEXT), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": "x"}, {"b": "x"}, {"a": "x", "b": "y"}],
        [{}],
        (),
    ),
    "allOf": ({"allOf": [of(a=TEXT), of(b=TEXT)]}, [{"a": "x", "b": "y"}], [{"a": 1}, {"b": 1}], ()),
    "not a type": (of(a={"not": {"type": "null"}}), [{"a": 1}, {"a": "x"}], [{"a": None}], ()),
    "not anything": (of(a={"not": {}}, b=TEXT), [{"b": "x"}, {}], [{"a": 1}, {"a": None}], ()),
    "not a value": (of(a={**TEXT, "not": {"const": "x"}}), [{"a": "y"}], [{"a": 1}], ("not at /properties/a",)),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x-": TEXT}, "additionalProperties": False},
        [{"x-a": "b"}, {}],
        [{"x-a": 1}, {"y": "b"}],
        (),
    ),
    "patterns that overlap": (
        {**of(b={"type": "null"}), "patternProperties": {"^a": TEXT, "a$": TEXT}, "additionalProperties": False},
        [{"b": None, "a": "x", "ab": "y"}],
        [{"b": 1}],
        ("patternProperties at /",),
    ),
    "names are text": (
        of(m={"type": "object", "propertyNames": TEXT, "additionalProperties": TEXT}),
        [{"m": {"a": "b"}}],
        [{"m": {"a": 1}}],
        (),
    ),
    "names are listed": (
        {
            **of(
                m={
                    "type": "object",
                    "propertyNames": {"$ref": "#/$defs/E"},
                    "additionalProperties": {"type": "integer"},
                }
            ),
            "$defs": {"E": {"enum": ["red", "blue"], "type": "string", "title": "E"}},
        },
        [{"m": {"red": 1}}, {"m": {"blue": 1, "red": 2}}],
        [{"m": {"green": 1}}, {"m": {"red": "x"}}],
        (),
    ),
    "names have a pattern": (
        {"propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}},
        [{"ab": 1}, "not an object"],
        [{"A": 1}, {"ab": "x"}],
        (),
    ),
    "names have a length": (
        {"type": "object", "propertyNames": {"maxLength": 2}},
        [{"ab": 1}],
        [[]],
        ("propertyNames at /",),
    ),
    "uniqueItems": (
        of(a={"type": "array", "items": TEXT, "uniqueItems": True}),
        [{"a": ["x", "y"]}],
        [{"a": [1]}],
        ("uniqueItems at /properties/a",),
    ),
    "uniqueItems is false": ({"type": "array", "uniqueItems": False}, [[1, 1]], [{}], ()),
    "contains": (of(a={"type": "array", "contains": TEXT}), [{"a": ["x"]}], [{"a": 1}], ("contains at /properties/a",)),
    "contains nothing": ({"type": "array", "contains": TEXT, "minContains": 0}, [[1]], [1], ()),
    "tuple of draft 7": (
        of(a={"type": "array", "items": [TEXT, {"type": "null"}], "additionalItems": False, "minItems": 2}),
        [{"a": ["x", None]}],
        [{"a": ["x"]}, {"a": ["x", None, 1]}, {"a": [None, "x"]}],
        (),
    ),
    "tuple of draft 2020-12": (
        of(a={"type": "array", "prefixItems": [TEXT, {"type": "null"}], "items": {"type": "integer"}}),
        [{"a": ["x", None, 1]}],
        [{"a": ["x", None, "x"]}, {"a": [1]}],
        (),
    ),
    "look-ahead": (of(a={**TEXT, "pattern": "^(?!x)"}), [{"a": "y"}], [{"a": 1}], ("pattern at /properties/a",)),
    "back-reference": (of(a={**TEXT, "pattern": "(a)\\1"}), [{"a": "aa"}], [{"a": 1}], ("pattern at /properties/a",)),
    "broken pattern": (of(a={**TEXT, "pattern": "(["}), [{"a": "x"}], [{"a": 1}], ("pattern at /properties/a",)),
    "pattern of ECMA": (
        of(a={"pattern": "^https?:\\/\\/\\w+$"}, b={"pattern": "^\\p{L}+$"}),
        [{"a": "http://x"}, {"b": "é"}],
        [{"a": "ftp://x"}, {"b": "1"}],
        (),
    ),
    "dependent keywords": (
        {
            **of(a=TEXT, b=TEXT),
            "dependentRequired": {"a": ["b"]},
            "dependentSchemas": {"a": of(c=TEXT)},
            "dependencies": {"b": ["a"]},
        },
        [{"a": "x", "b": "y", "c": "z"}],
        [{"a": 1}],
        ("dependentRequired at /", "dependentSchemas at /", "dependencies at /"),
    ),
    "condition": (
        {**of(a=TEXT), "if": {"required": ["a"]}, "then": {**of(b=TEXT), "required": ["b"]}},
        [{"a": "x", "b": "y"}, {}],
        [{"a": 1}],
        ("if at /",),
    ),
    "condition without consequence": ({"if": {"type": "string"}, "type": ["string", "null"]}, ["x", None], [1], ()),
    "unevaluatedProperties": ({**of(a=TEXT), "unevaluatedProperties": False}, [{"a": "x"}, {}], [{"b": 1}], ()),
    "unevaluatedProperties of a composition": (
        {"allOf": [of(a=TEXT)], **of(b=TEXT), "unevaluatedProperties": False},
        [{"a": "x", "b": "y"}],
        [{"a": 1}, {"c": 1}],
        ("unevaluatedProperties at /",),
    ),
    "unevaluatedItems": ({"prefixItems": [TEXT], "unevaluatedItems": False}, [["x"]], [["x", 1], [1]], ()),
    "exclusive bounds of draft 4": (
        of(a={"type": "integer", "minimum": 0, "exclusiveMinimum": True}),
        [{"a": 1}],
        [{"a": 0}],
        (),
    ),
    "exclusive bounds": (
        of(a={"type": "integer", "exclusiveMinimum": 0, "maximum": 2**53 - 1}),
        [{"a": 1}],
        [{"a": 0}],
        (),
    ),
    "bounds beyond doubles": (
        of(a={"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}),
        [{"a": 5}, {"a": -(2**63)}],
        [{"a": "x"}],
        ("minimum at /properties/a", "maximum at /properties/a"),
    ),
    "value beyond doubles": ({"const": 2**53 + 1}, [2**53 + 1], [], ("const at /",)),
    "multipleOf with many digits": ({"type": "number", "multipleOf": 1 / 3}, [1], ["x"], ("multipleOf at /",)),
    "multipleOf": ({"type": "number", "multipleOf": 0.5}, [1.5, -2], [1.3], ()),
    "mixed enum": (of(a={"enum": ["x", 1, None, True, [1], {"b": 2}]}), [{"a": [1]}, {"a": {"b": 2}}], [{"a": 2}], ()),
    "empty enum of an optional property": (of(a={"enum": []}, b=TEXT), [{"b": "x"}], [{"a": "x"}], ()),
    "optional property behind a reference that nothing satisfies": (
        {
            **of(a={"$ref": "#/$defs/A"}, b={"type": "array", "items": {"$ref": "#/$defs/A"}}),
            "$defs": {"A": {"enum": []}},
        },
        [{}, {"b": []}],
        [{"a": 1}, {"b": [1]}],
        (),
    ),
    "part that nothing satisfies where it need not be": (
        {"prefixItems": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"allOf": [{"allOf": [TEXT, {"type": "null"}]}]}}},
        ["x", []],
        [["x"], [None]],
        (),
    ),
    "listed names of which none is evaluated": (
        {"type": "object", "propertyNames": {"pattern": "^a"}, "unevaluatedProperties": False},
        [{}],
        [{"a": 1}],
        ("propertyNames at /",),
    ),
    "alternatives of which one nests for ever": (
        {
            "anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}],
            "$defs": {"A": {**of(a={"$ref": "#/$defs/A"}), "required": ["a"]}},
        },
        [None],
        [{}],
        (),
    ),
    "booleans for schemas": (of(a=True, b=False), [{"a": [1]}], [{"b": 1}], ()),
    "required but not declared": ({**of(a=TEXT), "required": ["b"]}, [{"a": "x", "b": 1}, {"b": 1}], [{"a": "x"}], ()),
    "properties: null": ({"type": "object", "properties": None}, [{"a": 1}], [[]], ("properties at /",)),
    "type: any": (of(a={"type": "any"}), [{"a": 1}, {"a": [None]}], [], ()),
    "type of another language": (of(a={"type": "str"}), [{"a": "x"}], [], ("type at /properties/a",)),
    "type: 5": ({"type": 5}, [1, "x"], [], ("type at /",)),
    "list of types": ({"type": ["object"], "properties": {"a": TEXT}}, [{"a": "x"}], [{"a": 1}, []], ()),
    "nullable": (of(a={**TEXT, "nullable": True}), [{"a": None}, {"a": "x"}], [{"a": 1}], ()),
    "required: true": (of(a={**TEXT, "required": True}), [{"a": "x"}], [{"a": 1}], ("required at /properties/a",)),
    "counts that are none": (
        {"type": "string", "minLength": -1, "maxLength": "5"},
        ["x"],
        [1],
        ("minLength at /", "maxLength at /"),
    ),
    "counts with a fraction of 0": ({"type": "array", "maxItems": 2.0}, [[1, 2]], [[1, 2, 3]], ()),
    "long counts": (
        of(a={**TEXT, "maxLength": 1_000_000}, b={"type": "array", "maxItems": 10**9}),
        [{"b": [1]}],
        [{"b": 1}],
        (),
    ),
    "counts beyond 64 bits": ({"type": "string", "maxLength": 10**30}, ["x"], [1], ("maxLength at /",)),
    "minProperties of a map": ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}], ()),
    "minProperties of declared ones": (
        {**of(a=TEXT, b=TEXT, c=TEXT), "minProperties": 2},
        [{"a": "x", "b": "y"}],
        [{"a": 1}],
        ("minProperties at /",),
    ),
    "a text for a schema": (of(a="string"), [{"a": 1}], [[]], ("schema at /properties/a",)),
    "no schema": (None, [{"a": 1}], [], ("schema at /",)),
    "extensions and content": (
        {"$comment": "c", **of(a={**TEXT, "x-order": 1, "contentEncoding": "base64", "markdownDescription": "m"})},
        [{"a": "x"}],
        [{"a": 1}],
        (),
    ),
    "keyword to come": (of(a={**TEXT, "propertyDependencies": {"x": {"y": False}}}), [{"a": "x"}], [{"a": 1}], ()),
    "circular conjunction": (
        {"$ref": "#/$defs/A", "$defs": {"A": {**of(a={"$ref": "#/$defs/A", "maxProperties": 1}), "required": []}}},
        [{"a": {"a": {"a": {}}}}],
        [1],
        ("$ref at /$defs/A/properties/a",),
    ),
    "draft 3": (
        {"$schema": "http://json-schema.org/draft-03/schema#", "extends": of(a={"divisibleBy": 2}), "disallow": "null"},
        [{"a": 4}],
        [{"a": 3}],
        ("disallow at /",),
    ),
    "anything": ({}, [1, None, {"a": [{}]}], [], ()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_enforced_is_and_the_rest_is_listed(name: str) -> None:
    schema, good, bad, unenforced = CASES[name]
    followed = lenient(schema)
    assert [value for value in good if not takes(followed, value)] == []
    assert [value for value in bad if takes(followed, value)] == []
    assert unenforced is ANY or followed.unenforced == unenforced
    assert all(unmet(schema, value) is None for value in good)


@pytest.mark.parametrize("name", CASES)
def test_strictly_the_first_thing_that_cannot_be_enforced_is_named(name: str) -> None:
    schema, good, bad, unenforced = CASES[name]
    if unenforced is ANY:
        return
    if unenforced:
        with pytest.raises(Unfollowable) as refusal:
            strict(schema)
        error = refusal.value
        assert f"{error.keyword} at {error.pointer or '/'}" == unenforced[0]
        assert str(error) == f"{unenforced[0]} {error.reason}"
    else:
        followed = strict(schema)
        assert followed.unenforced == ()
        assert all(takes(followed, value) for value in good)
        assert not any(takes(followed, value) for value in bad)


@pytest.mark.parametrize("name", CASES)
def test_every_schema_works_as_a_tool_s_parameters(name: str) -> None:
    schema = CASES[name][0]
    followed = tool({"type": "object", "properties": {"given": schema}, "required": ["given"], "$defs": _defs(schema)})
    assert faulty(whole(followed)) is None


def _defs(schema: Any) -> Any:
    return schema.get("$defs", {}) if isinstance(schema, dict) else {}


@pytest.mark.parametrize(
    ("schema", "unenforced"),
    [
        (of(a={**TEXT, "format": "path"}), ("format at /properties/a",)),
        (of(a={**TEXT, "format": "made-up"}), ("format at /properties/a",)),
    ],
)
def test_an_unknown_format_is_listed_for_tools_and_an_annotation_otherwise(schema: Any, unenforced: Any) -> None:
    assert tool(schema).unenforced == unenforced
    assert strict(schema).unenforced == ()


OPEN = {"additionalProperties": True}
CLOSED: list[tuple[Any, list[Any], list[Any]]] = [
    (of(a=TEXT), [{"a": "x"}, {}], [{"b": 1}]),
    (of(), [{}], [{"a": 1}]),
    ({"type": "object"}, [{"a": 1}], [[]]),
    ({**of(a=TEXT), **OPEN}, [{"a": "x", "b": 1}], []),
    ({**of(a=TEXT), "unevaluatedProperties": True}, [{"a": "x", "b": 1}], []),
    ({**of(a=TEXT), "patternProperties": {"^x": TEXT}}, [{"a": "x", "xb": "y"}], [{"xb": 1}]),
    (of(o=of(a=TEXT)), [{"o": {"a": "x"}}], [{"o": {"b": 1}}]),
    (of(o={"type": "array", "items": of(a=TEXT)}), [{"o": [{"a": "x"}]}], [{"o": [{"b": 1}]}]),
    (
        of(o={"type": "object", "additionalProperties": of(a=TEXT)}),
        [{"o": {"k": {"a": "x"}}}],
        [{"o": {"k": {"b": 1}}}],
    ),
    ({"allOf": [of(a=TEXT), of(b=TEXT)]}, [{"a": "x", "b": "y"}], [{"c": 1}, {"a": 1}]),
    ({**of(a=TEXT), "allOf": [of(b=TEXT)]}, [{"a": "x", "b": "y"}], [{"c": 1}]),
    ({**of(a=TEXT), "anyOf": [{"required": ["a"]}, of(b=TEXT)]}, [{"a": "x"}, {"b": "y"}], [{"c": 1}]),
    ({"anyOf": [of(a=TEXT), of(b=TEXT)]}, [{"a": "x"}, {"b": "x"}], [{"a": "x", "b": "y"}, {"c": 1}]),
    ({"anyOf": [{"type": "null"}, of(b=TEXT)]}, [None, {"b": "x"}], [{"c": 1}]),
    ({"$ref": "#/$defs/A", "$defs": {"A": of(a=TEXT)}}, [{"a": "x"}], [{"b": 1}]),
    ({"$ref": "#/$defs/A", **of(b=TEXT), "$defs": {"A": of(a=TEXT)}}, [{"a": "x", "b": "y"}], [{"c": 1}]),
    ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": of(a=TEXT)}}, [{"a": "x"}], [{"b": 1}]),
    # the same definition, once alone and once as a part
    (
        {**of(x={"$ref": "#/$defs/A"}, y={"allOf": [{"$ref": "#/$defs/A"}, of(b=TEXT)]}), "$defs": {"A": of(a=TEXT)}},
        [{"x": {"a": "x"}, "y": {"a": "x", "b": "y"}}],
        [{"x": {"b": "y"}}, {"y": {"c": 1}}],
    ),
    # what two parts say of one property holds together, so neither may close it
    ({"allOf": [of(o=of(a=TEXT)), of(o=of(b=TEXT), p=of(c=TEXT))]}, [{"o": {"a": "x", "b": "y"}}], [{"p": {"d": 1}}]),
    ({"allOf": [of(o=of(a=TEXT)), {"additionalProperties": of(b=TEXT)}]}, [{"o": {"a": "x"}, "p": {"b": "y"}}], []),
    ({"items": of(a=TEXT), "allOf": [{"items": of(b=TEXT)}]}, [[{"a": "x", "b": "y"}]], [[{"a": 1}]]),
    ({**of(a=TEXT), "required": ["b"]}, [{"a": "x", "b": 1}], [{"b": 1, "c": 1}]),
    ({**of(a=TEXT), "then": of(b=TEXT), "if": True}, [{"a": "x", "b": "y"}], [{"c": 1}]),
    ({**of(a=TEXT), "dependentRequired": {"a": ["b"]}}, [{"a": "x", "b": 1}], [{"c": 1}]),
    ({**of(a=TEXT), "allOf": [{"$ref": "http://h/elsewhere"}]}, [{"a": "x", "b": 1}], [{"a": 1}]),
    ({**of(a=TEXT), "allOf": [OPEN]}, [{"a": "x", "b": 1}], [{"a": 1}]),
    (TREE, [{"v": 1, "next": {"v": 2}}], [{"v": 1, "next": {"v": 2, "w": 1}}]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CLOSED)
def test_declared_arguments_only_unless_the_schema_says_otherwise(schema: Any, good: list[Any], bad: list[Any]) -> None:
    followed = tool(schema)
    assert [value for value in good if not takes(followed, value)] == []
    assert [value for value in bad if takes(followed, value)] == []
    open_ = lenient(schema)
    assert all(takes(open_, value) for value in good)


def test_several_schemas_share_one_that_holds_their_definitions() -> None:
    first, second = tool(TREE, "t0_"), tool({**TREE, "required": []}, "t1_")
    assert not set(first.definitions) & set(second.definitions)
    both = {
        "type": "object",
        "properties": {"a": first.schema, "b": second.schema},
        "$defs": {**first.definitions, **second.definitions},
    }
    assert faulty(both) is None
    assert allows(grammar(both), {"a": {"v": 1, "next": {"v": 2}}, "b": {"next": {}}})
    assert not allows(grammar(both), {"a": {"v": 1, "next": {}}})


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"not": {}},
        {"enum": []},
        {"type": "string", "const": 5},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {**of(a=False), "required": ["a"]},
        {**of(a={"$ref": "#"}), "required": ["a"]},
        {"$ref": "#"},
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        {"allOf": [TEXT, {"type": "null"}]},
        {**of(a={"allOf": [TEXT, {"type": "null"}]}), "required": ["a"]},
        {"anyOf": [False, {"enum": []}]},
    ],
)
def test_what_no_value_satisfies_is_refused(schema: Any) -> None:
    for take in (tool, lenient, strict):
        with pytest.raises(Unfollowable, match="cannot be satisfied by any value"):
            take(schema)


def test_an_error_is_short_and_quotes_no_values() -> None:
    secret = "secret" * 1000
    for schema in (of(a={"pattern": f"(?!{secret})"}), {"$ref": f"https://{secret}"}, {"type": secret}):
        with pytest.raises(Unfollowable) as refusal:
            strict(schema)
        assert "secret" not in str(refusal.value)
    with pytest.raises(Unfollowable) as refusal:
        strict(of(**{"a" * 5000: {"uniqueItems": True}}))
    assert len(str(refusal.value)) < 300


def test_the_input_is_left_as_it_was() -> None:
    schema = {**of(a={"pattern": "(?!x)", "enum": [{"b": [1]}]}), "allOf": [{"type": 5}]}
    before = json.dumps(schema)
    tool(schema)
    assert json.dumps(schema) == before


# ---- the probe: a compiler that refuses what it did not refuse before ----


def refusing(keyword: str) -> Any:
    """A compiler that has never heard of a keyword."""

    def compiled(schema: dict[str, Any]) -> str | None:
        return "no" if f'"{keyword}": ' in json.dumps(schema) else faulty(schema)

    return compiled


@pytest.mark.parametrize("keyword", ["maxLength", "pattern", "minItems", "multipleOf", "anyOf", "const", "prefixItems"])
def test_what_the_compiler_refuses_is_found_and_only_that_is_left_out(keyword: str) -> None:
    odd = {
        "maxLength": {**TEXT, "maxLength": 3},
        "pattern": {**TEXT, "pattern": "a"},
        "minItems": {"type": "array", "minItems": 2},
        "multipleOf": {"type": "integer", "multipleOf": 3},
        "anyOf": {"anyOf": [TEXT]},
        "const": {"const": 3},
        "prefixItems": {"prefixItems": [TEXT], "items": False},
    }[keyword]
    schema = {**of(a={"type": "array", "items": odd}, b={"$ref": "#/$defs/B"}), "$defs": {"B": of(c=TEXT, d=odd)}}
    asked = {"prefix": "s", "closed": False, "faulty": refusing(keyword)}
    followed = follow(schema, lenient=True, **asked)
    assert sorted(followed.unenforced) == [f"{keyword} at /$defs/B/properties/d", f"{keyword} at /properties/a/items"]
    assert takes(followed, {"a": [], "b": {"c": "x"}})
    assert not takes(followed, {"b": {"c": 1}})
    with pytest.raises(Unfollowable) as refusal:
        follow(schema, lenient=False, **asked)
    assert refusal.value.keyword == keyword


def test_parts_that_are_refused_together_only_are_loosened() -> None:
    def compiled(schema: dict[str, Any]) -> str | None:
        nodes = [*schema.get("allOf", ()), *schema.get("$defs", {}).values()]
        odd = [n for n in nodes if isinstance(n, dict) and "maxLength" in json.dumps(n.get("allOf"))]
        return "no" if odd else faulty(schema)

    schema = {
        **of(x={"$ref": "#/$defs/A"}, y=TEXT),
        "$defs": {"A": {"allOf": [TEXT, {"maxLength": 3}]}, "B": {"type": "null"}},
    }
    followed = follow(schema, prefix="s", closed=False, lenient=True, faulty=compiled)
    assert followed.unenforced == ("allOf at /$defs/A",)
    assert not takes(followed, {"y": 1})


@pytest.mark.parametrize("width", [1, 40, 400])
def test_a_compiler_that_refuses_everything_costs_a_bounded_number_of_probes(width: int) -> None:
    asked = 0

    def refuses(schema: dict[str, Any]) -> str:
        nonlocal asked
        asked += 1
        return "no"

    schema = of(**{f"p{n}": of(a={"pattern": f"a{n}", "maxLength": n}) for n in range(width)})
    followed = follow(schema, prefix="s", closed=False, lenient=True, faulty=refuses)
    assert followed.schema in ({"type": "object"}, {})
    assert "schema at /" in followed.unenforced
    assert asked <= 2001


def test_a_chain_of_references_is_cut_before_it_overflows_the_compiler_s_stack() -> None:
    chain: dict[str, Any] = {f"d{n}": of(a={"$ref": f"#/$defs/d{n + 1}"}) for n in range(5000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, "d5000": TEXT}}
    followed = lenient(schema)
    assert len(followed.definitions) < 300
    assert len(followed.unenforced) == 1
    assert takes(followed, {"a": {"a": {}}})
    with pytest.raises(Unfollowable, match="nested too deep"):
        strict(schema)


def test_deep_nesting_is_flattened_so_that_the_compiler_can_read_it() -> None:
    deep: Any = {"type": "null"}
    value: Any = None
    for _ in range(90):
        deep, value = of(a={"anyOf": [deep, TEXT]}), {"a": value}
    followed = strict(deep)
    assert takes(followed, value)
    assert not takes(followed, {"a": 1})


def test_definitions_are_shared_not_repeated() -> None:
    doubling = {f"d{n}": of(a={"$ref": f"#/$defs/d{n + 1}"}, b={"$ref": f"#/$defs/d{n + 1}"}) for n in range(60)}
    followed = tool({"$ref": "#/$defs/d0", "$defs": {**doubling, "d60": TEXT}})
    assert len(followed.definitions) == 61


def test_a_choice_of_many_is_not_compared_for_ever() -> None:
    branches = [{**of(k={"const": n}), "required": ["k"]} for n in range(200)]
    assert lenient({"oneOf": branches[:120]}).unenforced == ()
    assert lenient({"oneOf": branches}).unenforced == ("oneOf at /",)


# ---- what an answer leaves unmet ----


@pytest.mark.parametrize(
    ("schema", "value", "found"),
    [
        (of(a={"uniqueItems": True}), {"a": [1, 1]}, "uniqueItems at /properties/a"),
        (of(a={"uniqueItems": True}), {"a": [1, 2]}, None),
        ({"contains": TEXT}, [1], "contains at /"),
        (of(a={"not": {"const": 1}}), {"a": 1}, "not at /properties/a"),
        (of(a={"pattern": "^(?!x)"}), {"a": "xy"}, "pattern at /properties/a"),
        (of(a={"pattern": "^\\s$"}), {"a": "\ufeff"}, None),
        ({"patternProperties": {"^(?!x)": TEXT}}, {"a": 1}, "type at /patternProperties/^(?!x)"),
        ({"patternProperties": {"^x": TEXT}, "additionalProperties": False}, {"a": 1}, "additionalProperties at /"),
        ({"additionalProperties": TEXT}, {"a": 1}, "type at /additionalProperties"),
        ({"additionalProperties": False}, "text", None),
        ({"propertyNames": {"maxLength": 2}}, {"abc": 1}, "maxLength at /propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, {"a": 1}, "dependentRequired at /"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "x", "minLength at /then"),
        ({"oneOf": [TEXT, {"maxLength": 2}]}, "x", "oneOf at /"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"minimum": 2**63}}}, 1, "minimum at /"),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True},
            1,
            "minimum at /",
        ),
        ({"$schema": "https://h/unheard-of", "maximum": 1}, 2, "maximum at /"),
        (of(a={**TEXT, "format": "date"}), {"a": "no date"}, None),
        (of(a={**TEXT, "nullable": True}), {"a": None}, None),
        (
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                **of(a={**TEXT, "nullable": True}, b={"$ref": "#"}),
            },
            {"b": {"a": None}},
            None,
        ),
        (False, 1, "schema at /"),
        # what means nothing is not checked
        ({"type": 5, "enum": "x", "required": "ab", "minLength": True, "pattern": "(", "items": "x"}, {"c": 1}, None),
        ({"minimum": 0, "exclusiveMinimum": True}, 1, None),
        ({"$ref": "https://h/elsewhere"}, 1, None),
        ({"$ref": "#"}, 1, None),
        ({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, 1, None),
        # what is not known is not held against a value
        ({"not": {"$ref": "https://h/elsewhere"}}, 1, None),
        ({"oneOf": [TEXT, {"patternProperties": {"a": {}}, "unevaluatedProperties": False}]}, "x", None),
        (5, 1, None),
    ],
)
def test_what_a_value_breaks_is_named(schema: Any, value: Any, found: str | None) -> None:
    assert unmet(schema, value) == found


def test_a_hostile_pattern_ends() -> None:
    for schema in ({"pattern": "^(a+)+$"}, {"patternProperties": {"^(a|a)*$": False}, "unevaluatedProperties": False}):
        assert unmet(schema, "a" * 50_000 + "!" if "pattern" in schema else {"a" * 500 + "!": 1}) is None


SELF = {"$ref": "#"}


@pytest.mark.parametrize(
    "schema",
    [
        {"unevaluatedProperties": False, "anyOf": [SELF, SELF]},
        {"unevaluatedItems": False, "allOf": [SELF, SELF]},
        {"unevaluatedProperties": {}, "if": SELF, "then": SELF, "else": SELF},
        {"not": SELF, "dependentSchemas": {"a": SELF}, "unevaluatedProperties": SELF, "oneOf": [SELF, SELF]},
        {"contains": SELF, "unevaluatedItems": SELF, "additionalProperties": SELF, "anyOf": [SELF, {"not": SELF}]},
        {
            "$ref": "#/$defs/d0",
            "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(39)},
            "unevaluatedProperties": False,
        },
        {
            "unevaluatedProperties": False,
            "$ref": "#/$defs/d0",
            "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(900)},
        },
        {
            "unevaluatedProperties": False,
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{n}": {"dependentSchemas": {name: {"$ref": f"#/$defs/d{n + 1}"} for name in "abc"}}
                for n in range(13)
            },
        },
    ],
)
def test_references_that_never_end_and_those_that_double_end(schema: Any) -> None:
    for value in ({"a": {"b": 1}, "b": 1, "c": 1}, [[1], 2]):
        assert unmet(schema, value) in (None, "unevaluatedProperties at /")


def test_a_deep_value_is_checked_as_far_as_is_safe() -> None:
    for depth, found in ((1, "type at /properties/next/properties/v"), (95, None)):
        value: Any = {"v": "x"}
        for _ in range(depth):
            value = {"v": 1, "next": value}
        assert unmet(TREE, value) == found


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def refuse(*args: Any, **more: Any) -> None:
        fetched.append(args)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    schema = of(a={"$ref": "http://127.0.0.1:9/x"}, b={"$dynamicRef": "http://127.0.0.1:9/y#z"})
    assert unmet(schema, {"a": 1, "b": 1}) is None
    assert tool(schema).unenforced == ("$ref at /properties/a", "$dynamicRef at /properties/b")
    assert fetched == []


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("a\\d", "a[0-9]"),
        ("[\\d-]", "[0-9-]"),
        ("\\\\d", "\\\\d"),
        ("[\\D]\\W", "[\\D][^0-9A-Z_a-z]"),
        ("x]\\.", "x]\\."),
    ],
)
def test_classes_of_characters_are_written_out(pattern: str, written: str) -> None:
    assert portable(pattern) == written


# ---- any schema at all ----

NAMES = st.sampled_from(["a", "b", "c"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-4, 4), st.sampled_from([0.5, -1.5, 2.25]), st.text("ab1", max_size=3)
)
VALUES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3), max_leaves=5
)
COUNTS = st.integers(0, 3)
NUMBERS = st.integers(-3, 3) | st.sampled_from([0.5, -0.25])
TYPES = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
REFERENCES = st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/properties/a", "#here", "http://h/x"])


def _keywords(below: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    named, listed = st.dictionaries(NAMES, below, max_size=3), st.lists(below, min_size=1, max_size=3)
    return {
        **dict.fromkeys(["properties", "patternProperties", "$defs", "dependentSchemas"], named),
        **dict.fromkeys(["allOf", "anyOf", "oneOf", "prefixItems"], listed),
        **dict.fromkeys(["items", "additionalProperties", "not", "if", "then", "contains", "propertyNames"], below),
        **dict.fromkeys(["unevaluatedProperties", "unevaluatedItems"], below),
        **dict.fromkeys(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"], COUNTS),
        **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"], NUMBERS),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "pattern": st.sampled_from(["a", "^b*$", "[^1]", "^(?!a)"]),
        "required": st.lists(NAMES, unique=True, max_size=2),
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, unique=True, max_size=2), max_size=2),
        "uniqueItems": st.booleans(),
        "enum": st.lists(VALUES, min_size=1, max_size=3),
        "const": VALUES,
        "type": TYPES | st.lists(TYPES, unique=True, min_size=1, max_size=3),
        "$ref": REFERENCES,
        "$anchor": st.just("here"),
    }


def _objects(rules: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    chosen = st.lists(st.sampled_from(sorted(rules)), unique=True, max_size=4)
    return chosen.flatmap(lambda keys: st.fixed_dictionaries({key: rules[key] for key in keys}))


def _sound(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _objects({key: rule for key, rule in _keywords(below).items() if key not in ("$ref", "$defs", "$anchor")})


def _odd(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _objects({key: rule | VALUES for key, rule in _keywords(below).items()})


# references below a property or an item: the library, which is the oracle, follows others without an end
PARTS = st.sampled_from(["#", "#/$defs/a", "#/$defs/b"]).map(lambda to: {"$ref": to})
LEAVES = st.booleans() | st.dictionaries(NAMES, PARTS, min_size=1).map(lambda held: {"properties": held})
SOUND = st.recursive(LEAVES | PARTS.map(lambda to: {"items": to}), _sound, max_leaves=8)
SCHEMAS = st.builds(
    lambda root, a, b: {**root, "$defs": {"a": a, "b": b}},
    SOUND.filter(lambda root: isinstance(root, dict)),
    SOUND,
    SOUND,
)
ODD_SCHEMAS = st.recursive(VALUES, _odd, max_leaves=8)
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@given(ODD_SCHEMAS, st.booleans())
@MANY
def test_any_schema_is_followed_or_refused_as_unsatisfiable(schema: Any, closed: bool) -> None:
    try:
        followed = follow(schema, prefix="p", closed=closed, lenient=True, faulty=faulty)
    except Unfollowable as refusal:
        if refusal.reason != "cannot be satisfied by any value":
            raise
        return
    assert faulty(whole(followed)) is None
    assert all(name.startswith("p") for name in followed.definitions)


@given(ODD_SCHEMAS)
@MANY
def test_strictly_any_schema_is_followed_in_full_or_refused(schema: Any) -> None:
    try:
        followed = strict(schema)
    except Unfollowable:
        return
    assert followed.unenforced == ()
    assert faulty(whole(followed)) is None


@given(SCHEMAS, st.lists(VALUES, min_size=5, max_size=12))
@MANY
def test_what_the_schema_accepts_the_grammar_accepts(schema: Any, values: list[Any]) -> None:
    good = [value for value in values if jsonschema.Draft202012Validator(schema).is_valid(value)]
    try:
        followed = lenient(schema)
    except Unfollowable:
        assert good == []
        return
    for value in good:
        assert takes(followed, value)
        assert unmet(schema, value) is None


@given(SCHEMAS, st.lists(VALUES, min_size=5, max_size=12))
@MANY
def test_what_is_enforced_in_full_the_grammar_rejects(schema: Any, values: list[Any]) -> None:
    try:
        followed = strict(schema)
    except Unfollowable:
        assume(False)
    for value in values:
        assert not takes(followed, value) or jsonschema.Draft202012Validator(schema).is_valid(value)


@given(ODD_SCHEMAS, VALUES)
@MANY
def test_unmet_never_raises(schema: Any, value: Any) -> None:
    found = unmet(schema, value)
    assert found is None or " at /" in found


def test_the_table_holds_as_many_shapes_as_it_claims() -> None:
    assert len(CASES) >= 60
    assert len(list(itertools.chain.from_iterable(case[1] for case in CASES.values()))) > len(CASES)
