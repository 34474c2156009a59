"""Documentation, help, errors and log events use the field's terms (docs/glossary.md), which readers search for."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cli as agent_cli
from aggregator import cli as aggregator_cli

ROOT = Path(__file__).parent.parent
PRODUCT = [path for name in ("agent", "aggregator", "shared") for path in sorted((ROOT / name).rglob("*.py"))]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("a*/DESIGN.md"))

ODD = re.compile(
    r"\b(doors?|mend(s|ed|ing)?|dice|strangers?|prober|at it already|makes? no sense|gone on with|goes on with|"
    r"say (little|nothing) of|(?<!there\s)is no (?!(longer|more|event|loss|failure|answer|number of|need)\b)[a-z]+|"
    r"for people|in vain|hand(s|ed)? the request|told to die|beats?(?!_)|what is no|put right by hand)\b",
    re.IGNORECASE,
)
"""Words that an engineer would not search for. `beat_s` and `door` stay as names on the wire and in configuration."""

TERMS = (
    *("gateway", "forward", "failover", "retry", "heartbeat", "circuit breaker", "rate limit", "KV cache"),
    *("prompt cache hit", "TTFT", "ITL", "time to first token", "inter-token latency", "back-off", "drain", "lease"),
)
SYMPTOMS = re.compile(
    r"\b(down|rejected|breaker|unexpected|throttl\w+|slow|failed|fails|eviction|memory|queued|not resident|drift|"
    r"upload\w*|unavailable|sensor|meter|start\w*|429|503|disk|respons\w+|latency|backlog|clock|alert\w*|aggregator|report\w*|"
    r"rollup|lease|quarantine|placement|cost|gap\w*|swap|encrypted|again)\b",
    re.IGNORECASE,
)


def prose(text: str) -> str:
    """Markdown without code blocks and code spans, which quote names that stay."""
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What may be shown: every string with a space, docstrings included, and names of log events."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            first, owner = node.args[0], node.func.value
            if isinstance(owner, ast.Name) and owner.id == "log" and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value).replace("_", " ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documentation_uses_the_field_s_terms(page: Path) -> None:
    if page.name == "glossary.md":
        return
    text = prose(page.read_text(encoding="utf-8"))
    assert [found.group() for found in ODD.finditer(text)] == []


def test_messages_docstrings_and_log_events_use_the_field_s_terms() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {odd.group()!r} in {text.strip()[:80]!r}"
        for path in PRODUCT
        for line, text in strings(ast.parse(path.read_text(encoding="utf-8")))
        for odd in ODD.finditer(re.sub(r"``[^`]*``", "", text))
    ]
    assert found == []


@pytest.mark.parametrize("cli", [agent_cli, aggregator_cli], ids=["agent", "aggregator"])
def test_help_uses_the_field_s_terms(cli: object) -> None:
    parser: argparse.ArgumentParser = cli._parser()  # type: ignore[attr-defined]
    texts = [parser.format_help()]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts += [verb.format_help() for verb in action.choices.values()]
    assert len(texts) > 5
    assert [odd.group() for text in texts for odd in ODD.finditer(text)] == []


def test_the_glossary_defines_the_terms_and_the_pages_use_them() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").lower()
    everywhere = " ".join(page.read_text(encoding="utf-8").lower() for page in PAGES)
    for term in TERMS:
        assert term.lower() in glossary, term
        assert everywhere.count(term.lower()) >= 2, f"{term} is defined and never used"


def test_every_runbook_title_is_a_symptom() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "docs/runbooks.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) > 15
    assert [title for title in titles if not SYMPTOMS.search(title)] == []


@pytest.mark.parametrize(
    "odd",
    [
        "Any node is the door.",
        "its beat makes no sense",
        "'x' is no endpoint; mend store.endpoint",
        "rollup: HOST is at it already",
        "it computes with what is no number",
    ],
)
def test_the_list_finds_what_it_is_meant_to_find(odd: str) -> None:
    assert ODD.search(odd)
