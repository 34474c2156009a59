"""schemathesis sends what the API's own document allows, and what it does not, to a real agent: no answer is a 5xx.

Long form, some thousand requests: ``MLXRACK_ABUSE=1``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.rack.harness import Agent, model, rack, until
from tests.rack.test_strangers import BEARER, KEYS

ABUSE = os.environ.get("MLXRACK_ABUSE") == "1"
RUN = settings(
    max_examples=100 if ABUSE else 6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def sender(agent: Agent, path: str, seen: set[int]) -> Callable[[Any, bool], None]:
    token = (agent.state / "admin.token").read_text().strip()
    bearer = {"Authorization": f"Bearer {token}"} if path.startswith("/admin/") else BEARER

    def send(case: Any, known: bool) -> None:
        if known and path.startswith("/v1/") and isinstance(case.body, dict):
            case.body["model"] = "m"  # else every request ends at an unknown model
        answer = case.call(headers=bearer, timeout=120)
        seen.add(answer.status_code)
        assert answer.status_code < 500, (path, answer.content)

    return send


@pytest.mark.parametrize("extra", ["", KEYS] if ABUSE else [KEYS])
@pytest.mark.filterwarnings("ignore")
def test_no_request_makes_a_server_error(tmp_path: Path, extra: str) -> None:
    import schemathesis  # it takes a second to import

    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    with rack(tmp_path, [model(rows=2, plan_context_tok=64, max_tokens=4)], extra=extra) as (agent,):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{agent.port}/openapi.json")
        seen: dict[str, set[int]] = {}
        for found in schema.get_all_operations():
            operation: Any = found.ok()  # type: ignore[union-attr]
            # an order before may have unloaded it, and then 503 is the truth
            assert agent.admin("POST", "load", model="m").status == 200
            send = sender(agent, operation.path, seen.setdefault(operation.path, set()))
            for mode in (positive, negative) if operation.body else (positive,):
                cases = operation.as_strategy(generation_mode=mode)
                RUN(given(case=cases, known=st.booleans())(send))()
        assert len(seen) >= 20
        assert {200, 400, 404} <= seen["/v1/chat/completions"] | seen["/v1/completions"]
        assert agent.alive()
        until(lambda: agent.status()["in_flight"] == 0, "nothing is left of them")
        assert agent.status()["models"][0]["restarts"] == 0
