"""Plans of requests: what of their schemas is kept."""

import json
import tracemalloc
from typing import Any

import pytest

from agent.loader.mlx.plan import Planner
from agent.wire.frames import Failed, Generate, Message
from tests.families import known


def test_the_schemas_that_are_kept_take_bounded_memory() -> None:
    family = known("json_tags")
    planner = Planner(family.talk, family.template, family.ends, lambda: family.grammars)

    def plan(number: int) -> None:
        parameters = {"type": "object", "properties": {"a": {"enum": [f"{number}{'x' * 100_000}"]}}}
        tool = json.dumps({"name": "f", "parameters": parameters})
        said = (Message(role="user", content="x"),)
        request = Generate(id=1, model="m", max_tokens=8, temperature=0.0, messages=said, tools=(tool,))
        planner.planned(request, family.talk.form)

    plan(0)
    tracemalloc.start()
    try:
        for number in range(1, 65):
            plan(number)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 48 * 100_000  # two texts for each of 16, instead of 64, schemas


def test_the_schemas_of_a_request_have_one_budget_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within every limit of its own; together they would hold up all other requests."""
    family = known("json_tags")
    planner = Planner(family.talk, family.template, family.ends, lambda: family.grammars)
    said = (Message(role="user", content="x"),)

    def tool(number: int, patterns: int) -> str:
        properties = {f"p{n}": {"type": "string", "pattern": rf"(?<=a{n})b{number}\1"} for n in range(patterns)}
        return json.dumps({"name": f"f{number}", "parameters": {"type": "object", "properties": properties}})

    def planned(*tools: str, **more: Any) -> Any:
        request = Generate(id=1, model="m", max_tokens=8, messages=said, tools=tools, **more)
        return planner.planned(request, family.talk.form)

    costly = [tool(number, 100) for number in range(8)]
    assert not isinstance(planned(tool(9, 3)), Failed)
    ticks = iter(range(100_000))
    monkeypatch.setattr("agent.loader.mlx.plan.time.thread_time", lambda: next(ticks) * 0.01)
    refused = planned(*costly)
    assert isinstance(refused, Failed)
    assert refused.param == "tools"
    assert "].function.parameters: the schemas of this request take more than 2 s" in refused.message
    assert "simplify" in refused.message
    used = next(ticks)
    assert planned(*costly) == refused
    assert next(ticks) - used < 10, "what was too costly once is not begun again"
    assert not isinstance(planned(tool(9, 3)), Failed)
    alternatives = [{"type": "string", "pattern": rf"(?<=x)b{n}\1"} for n in range(300)]
    assert planned(schema=json.dumps({"anyOf": alternatives})).param == "response_format"
