"""Runs the JSON-Schema-Test-Suite through what constrains answers: every schema is followed leniently and compiled, its
valid instances must match the grammar, and of the invalid instances of schemas that are enforced in full 95 % must not.

    python -m scripts.schema_suite FOLDER [--failures 40]

FOLDER holds the suite's files in folders that are named after the drafts (``draft7``, ``draft2020-12``, ...), which say
how their schemas are read. An instance is tried with its properties in every order, since a grammar takes them in one
only, and its numbers are written without exponents. What fails for the sake of a ``format`` alone is counted apart:
formats are enforced while generating, the suite takes them for annotations, and llguidance's are narrower than some
RFCs. Exits 1 when a claim does not hold.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from agent.loader.schemas import Followed, Unfollowable, follow, unmet
from scripts.common import parser

_TOKENIZER = LLTokenizer("byte")
_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_MOST_ORDERS = 5040
_LEAST_REJECTED = 0.95
_DRAFTS = {
    "draft3": "http://json-schema.org/draft-03/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
}


def grammar(schema: dict[str, Any]) -> str:
    """The grammar of an answer that follows a schema. llguidance takes the options out by putting the last keyword in
    their place, and order matters to it: they are last."""
    return f"start: %json {json.dumps({**schema, 'x-guidance': _SPACING})}\n"


def faulty(schema: dict[str, Any]) -> str | None:
    """What is wrong with a schema, for ``follow``."""
    return LLMatcher.validate_grammar(grammar(schema), _TOKENIZER) or None


def whole(followed: Followed) -> dict[str, Any]:
    """A followed schema with its definitions."""
    schema = followed.schema if isinstance(followed.schema, dict) else {"anyOf": [followed.schema]}
    return {**schema, "$defs": followed.definitions}


def texts(value: Any) -> Iterator[str]:
    """A value as JSON, with its objects' properties in every order."""
    if isinstance(value, dict):
        for order in permutations(value.items()):
            for held in product(*(list(islice(texts(one), _MOST_ORDERS)) for _, one in order)):
                pairs = (f"{_text(name)}: {one}" for (name, _), one in zip(order, held, strict=True))
                yield "{" + ", ".join(pairs) + "}"
    elif isinstance(value, list):
        for held in product(*(list(islice(texts(one), _MOST_ORDERS)) for one in value)):
            yield "[" + ", ".join(held) + "]"
    else:
        yield _scalar(value)


def allows(written: str, value: Any) -> bool:
    """Whether a grammar takes a value."""
    compiled = LLMatcher(_TOKENIZER, written)
    return any(_takes(compiled.deep_copy(), list(text.encode())) for text in islice(texts(value), _MOST_ORDERS))


def _takes(matcher: LLMatcher, tokens: list[int]) -> bool:
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    return json.dumps(value)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def cases(folder: Path) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Of each schema its name, itself in its draft, and its instances."""
    for path in sorted(folder.rglob("*.json")):
        tree = json.loads(path.read_text())
        draft = next((part for part in path.parts if re.fullmatch(r"draft\d.*|latest|v1", part)), None)
        if draft is None or not isinstance(tree, list) or {"remotes", "proposals"} & {*path.parts}:
            continue
        for case in tree:
            schema = case.get("schema")
            if "tests" not in case or "schema" not in case:
                continue
            if path.name == "vocabulary.json":  # its schemas' meaning is in other documents
                continue
            if draft in _DRAFTS and isinstance(schema, dict):
                schema = {"$schema": _DRAFTS[draft], **schema}
            yield f"{path.relative_to(folder)}: {case['description']}", schema, case["tests"]


class Tally:
    """What was found so far."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def schema(self, name: str, schema: Any, tests: Sequence[dict[str, Any]]) -> None:
        """One schema and its instances."""
        self.counts["schemas"] += 1
        try:
            followed = follow(schema, prefix="d", closed=False, lenient=True, faulty=faulty)
        except Unfollowable as refusal:
            self._refused(name, refusal, tests)
            return
        if faulty(whole(followed)) is not None:
            self.fail("schemas that do not compile", name)
            return
        self.counts["schemas followed"] += 1
        self.counts["schemas enforced in full"] += not followed.unenforced
        self.counts["schemas followed strictly"] += _is_strict(schema)
        for test in tests:
            self._instance(f"{name}: {test['description']}", schema, followed, test)

    def fail(self, kind: str, name: str) -> None:
        """Counts a failure and keeps its name."""
        self.counts[kind] += 1
        self.failures.append(f"{kind}: {name}")

    def _refused(self, name: str, refusal: Unfollowable, tests: Sequence[dict[str, Any]]) -> None:
        if refusal.reason.startswith("cannot be satisfied") and not any(test["valid"] for test in tests):
            self.counts["schemas that no value satisfies, refused"] += 1
        else:
            self.fail("schemas refused", f"{name}: {refusal}")

    def _instance(self, name: str, schema: Any, followed: Followed, test: dict[str, Any]) -> None:
        taken = allows(grammar(whole(followed)), test["data"])
        if test["valid"]:
            self.counts["valid instances"] += 1
            if unmet(schema, test["data"]) is not None:
                self.counts["valid instances that unmet() refuses"] += 1
                self.failures.append(f"unmet() refuses: {name}")
            if not taken and self._takes_without_format(schema, test["data"]):
                self.counts["valid instances outside an enforced format"] += 1
            elif not taken:
                self.fail("valid instances rejected", name)
        elif '"format": ' in json.dumps(schema) and unmet(schema, test["data"]) is None:
            self.counts["instances that break a format"] += 1
            self.counts["instances that break a format, rejected"] += not taken
        elif followed.unenforced:
            self.counts["invalid instances of schemas enforced in part"] += 1
            self.counts["invalid instances of schemas enforced in part, found by unmet()"] += (
                unmet(schema, test["data"]) is not None
            )
        else:
            self.counts["invalid instances of schemas enforced in full"] += 1
            if taken:
                self.fail("invalid instances accepted", name)

    def _takes_without_format(self, schema: Any, value: Any) -> bool:
        text = json.dumps(schema).replace('"format": ', '"x-format": ')
        followed = follow(json.loads(text), prefix="d", closed=False, lenient=True, faulty=faulty)
        return allows(grammar(whole(followed)), value)

    def holds(self) -> bool:
        """Whether every claim does."""
        invalid, accepted = (
            self.counts[f"invalid instances {kind}"] for kind in ("of schemas enforced in full", "accepted")
        )
        broken = ("schemas refused", "schemas that do not compile", "valid instances rejected")
        return not any(self.counts[kind] for kind in broken) and accepted <= invalid * (1 - _LEAST_REJECTED)


def _is_strict(schema: Any) -> bool:
    try:
        follow(schema, prefix="d", closed=False, lenient=False, faulty=faulty)
    except Unfollowable:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts and the failures."""
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--failures", type=int, default=40, help="how many to print")
    given = options.parse_args(arguments)
    tally = Tally()
    for name, schema, tests in cases(given.folder):
        tally.schema(name, schema, tests)
    for kind, count in sorted(tally.counts.items()):
        print(f"{count:6} {kind}")
    print("\n".join(tally.failures[: given.failures]))
    if not tally.counts["schemas"]:
        print(f"{given.folder} holds no schemas of the suite")
        return 1
    return 0 if tally.holds() else 1


if __name__ == "__main__":
    sys.exit(main())
