"""Plans of requests: what of their schemas is kept."""

import json
import tracemalloc

from agent.loader.mlx.plan import Planner
from agent.wire.frames import Generate, Message
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
