"""Random histories, in any order of roles and with what five clients echo, through the API's parser into a prompt.

``MLXRACK_HISTORIES`` is how many each family gets (``make histories`` tries 300).
"""

import json
import os
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.api.openai.requests import parse_chat
from agent.loader.mlx.prompt import TemplateRefused
from agent.wire.frames import Generate
from shared.errors import Refused
from tests.families import NAMES, Family, known

HISTORIES = int(os.environ.get("MLXRACK_HISTORIES", "12"))
TRIES = settings(
    max_examples=HISTORIES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
REASON = re.compile(r"messages\[\d+\]: the model's chat template refused this \w+ message: \S.*")
NAMED = re.compile(r"(messages|tools)(\[\d+\])?(\.\w+(\[\d+\])?)*")

ids = st.sampled_from(
    ["call_1", "call_2", "toolu_01A09q90qw90lq917835lq9", "a1B2c3D4e", "functions.book:0", "0", "é ü", "x" * 64]
)
arguments = st.sampled_from(
    [
        "",
        "{}",
        '{"city": "Oslo"}',
        '{"city": "Os',
        "null",
        "[1]",
        '"text"',
        "not json",
        '{"city": {"deep": [1, null]}}',
        None,
    ]
)
names = st.sampled_from(["get_weather", "book", "gone_since"])
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "book"}},
]


class Numbered:
    """Texts that stand nowhere else."""

    def __init__(self) -> None:
        self.count = 0

    def next(self, role: str) -> str:
        self.count += 1
        return f"{role} text {self.count:03d}."


def calls() -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.builds(
        lambda i, n, a: {
            "id": i,
            "type": "function",
            "function": {"name": n, **({} if a is None else {"arguments": a})},
        },
        ids,
        names,
        arguments,
    )
    return st.lists(one, min_size=1, max_size=3)


def echoes(content: str) -> st.SearchStrategy[dict[str, Any]]:
    """An assistant's message as five clients append it to the history."""
    return st.sampled_from(
        [
            {
                "role": "assistant",
                "content": content,
                "refusal": None,
                "parsed": None,
                "annotations": [],
                "audio": None,
            },
            {
                "role": "assistant",
                "content": content,
                "reasoning": "r",
                "reasoning_details": [{"type": "x", "text": "r"}],
            },
            {"role": "assistant", "content": content, "provider_specific_fields": {"a": 1}, "thinking_blocks": []},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": content}],
            },
            {
                "role": "assistant",
                "content": content,
                "reasoning_content": "t",
                "tool_calls": [],
                "function_call": None,
            },
        ]
    )


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Any order of roles."""
    texts = Numbered()
    found: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 9))):
        kind = draw(
            st.sampled_from(
                [
                    "system",
                    "developer",
                    "user",
                    "parts",
                    "assistant",
                    "echo",
                    "empty",
                    "null",
                    "calls",
                    "beside",
                    "tool",
                    "answered",
                ]
            )
        )
        if kind in ("system", "developer", "user", "assistant"):
            found.append({"role": kind, "content": texts.next(kind)})
        elif kind == "parts":
            found.append(
                {
                    "role": "user",
                    "content": [{"type": "text", "text": texts.next("part")}, {"type": "text", "text": ""}],
                }
            )
        elif kind == "echo":
            found.append(draw(echoes(texts.next("echo"))))
        elif kind in ("empty", "null"):
            found.append(
                {
                    "role": draw(st.sampled_from(["assistant", "user", "tool"])) if kind == "empty" else "assistant",
                    "content": "" if kind == "empty" else None,
                }
            )
        elif kind in ("calls", "beside"):
            found.append(
                {
                    "role": "assistant",
                    "content": texts.next("beside") if kind == "beside" else None,
                    "tool_calls": draw(calls()),
                }
            )
        elif kind == "tool":
            found.append({"role": "tool", "tool_call_id": draw(ids), "content": texts.next("tool"), "is_error": False})
        else:
            made = draw(calls())
            found.append({"role": "assistant", "content": None, "tool_calls": made})
            found += [{"role": "tool", "tool_call_id": one["id"], "content": texts.next("result")} for one in made]
    return found


def request(history: list[dict[str, Any]], *, tools: bool) -> Generate | None:
    """The request as a model gets it; None if the API refuses it, which names the place and quotes nothing."""
    body = {"model": "m", "messages": history, **({"tools": TOOLS} if tools else {})}
    try:
        return parse_chat(json.dumps(body).encode()).generate
    except Refused as error:
        refused = error
    assert NAMED.fullmatch(refused.param or ""), refused.param
    assert " text 0" not in str(refused)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_any_history_becomes_a_prompt(name: str) -> None:
    family = known(name)

    @TRIES
    @given(histories(), st.booleans())
    def holds(history: list[dict[str, Any]], tools: bool) -> None:
        asked = request(history, tools=tools)
        if asked is not None:
            check(family, asked)

    holds()


def check(family: Family, asked: Generate) -> None:
    """Nothing is lost that the probe has not named; what is refused says where and why."""
    try:
        prompt = family.text(family.prompts.write(asked).tokens)
    except TemplateRefused as error:
        refused = str(error)
    else:
        gone = [one for one in asked.messages if one.content and one.content not in prompt]
        assert all(one.role == "assistant" and one.calls for one in gone), gone
        assert not gone or "text beside a call" in family.talk.lost
        return
    assert REASON.fullmatch(refused)
    assert " text 0" not in refused
