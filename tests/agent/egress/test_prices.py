"""What requests cost, and the most that they can."""

import ast
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.egress import prices
from agent.egress.prices import DEFAULT_MAX_TOK, TOOLS_TOK, body, cost, most
from agent.policy.outgoing import Turn
from tests.agent.egress.made import outgoing, provider

STATED: dict[str, Any] = {"usd_per_mtok_in": "2.50", "usd_per_mtok_out": "10"}
COUNTS = st.integers(0, 10_000_000)


def test_prices_of_the_policy() -> None:
    stated = provider("openai", **STATED)
    assert cost(stated, "anything", 1_000_000, 100_000, 900_000) == Decimal("3.5")
    assert cost(provider("local", **STATED), "m", 1_000_000, 0, 0) == Decimal("2.5")
    assert cost(provider("local"), "m", 1_000_000, 10, 0) == 0


@given(COUNTS, COUNTS, COUNTS)
def test_a_cost_is_exact_and_never_negative(prompt: int, completion: int, cached: int) -> None:
    found = cost(provider("openai", **STATED), "m", prompt, completion, cached)
    assert isinstance(found, Decimal)
    assert found * 1_000_000 == Decimal("2.5") * prompt + 10 * completion


@pytest.mark.parametrize(
    ("kind", "model", "more"),
    [
        ("openai", "gpt-4o", {}),
        ("anthropic", "claude-opus-4-5", {}),
        ("openrouter", "openai/gpt-4o", {}),
        ("compatible", "mistral-large-latest", {"url": "https://api.mistral.ai/v1"}),
    ],
)
def test_listed_prices(kind: str, model: str, more: dict[str, str]) -> None:
    one = provider(kind, **more)
    prompt, half, all_ = (cost(one, model, 1000, n, 0) for n in (0, 50, 100))
    assert isinstance(prompt, Decimal)
    assert half is not None
    assert all_ is not None
    assert 0 < prompt < half < all_ < 1
    cached = cost(one, model, 1000, 100, 1000)
    assert cached is not None
    assert cached <= all_


@pytest.mark.parametrize(
    ("kind", "model", "more"),
    [
        ("openai", "of-tomorrow-9", {}),
        ("openai", "text-embedding-3-large", {}),
        ("openrouter", "agentica-org/deepcoder-14b-preview:free", {}),
        ("openrouter", "made/up", {}),
        ("openai", "gpt-4o", {"url": "https://proxy.example/v1"}),
        ("compatible", "gpt-4o", {"url": "https://somewhere.example/v1"}),
    ],
)
def test_an_unknown_price_is_none(kind: str, model: str, more: dict[str, str]) -> None:
    assert cost(provider(kind, **more), model, 10, 10, 0) is None
    assert most(provider(kind, **more), outgoing(model=model)) is None


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    st.integers(1, 100_000) | st.none(),
    st.sampled_from(["openai", "anthropic", "compatible"]),
    st.integers(0, 1),
)
def test_the_most_bounds_every_answer(text: str, limit: int | None, kind: str, tools: int) -> None:
    """A token is at least a byte of the request; the answer has at most the tokens that were asked for."""
    one = provider(kind, url="https://x.example/v1", **STATED)
    turns = (Turn(role="user", content=f"u{text}"), Turn(role="assistant", content=text))
    sent = outgoing(*turns, max_tokens=limit, tools=('{"name":"f"}',) * tools)
    payload, bound = body(one, sent), most(one, sent)
    assert bound is not None
    answer = DEFAULT_MAX_TOK if limit is None else limit
    assert str(answer).encode() in payload, "the bound holds because it is sent"
    largest = cost(one, "m", len(payload) + TOOLS_TOK * tools, answer, 0)
    assert bound == largest
    assert len(payload) > len(text.encode()) * 2


def test_the_library_is_imported_when_it_is_needed_and_fetches_nothing() -> None:
    code = "import sys; import agent.egress.providers; print('genai_prices' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    tree = ast.parse(Path(prices.__file__).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "genai_prices"}  # fmt: skip
    assert used == {"Usage", "calc_price"}
