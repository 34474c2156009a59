"""Why requests were not served, from a real agent's telemetry to the rack's availability."""

import hashlib
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aggregator import load
from aggregator.calendar import between
from aggregator.commands import rollup
from aggregator.config import AggregatorConfig
from shared.bucket import Store
from shared.store_dir import DirectoryStore
from tests.builders import uptime_of
from tests.rack.harness import model, rack, until
from tests.rack.test_bodies import CHAT
from tests.rack.test_strangers import BEARER, KEYS, connections

SECOND, THIRD = "o" * 43, "f" * 43
OTHER = {"Authorization": f"Bearer {SECOND}"}
FEW = {"Authorization": f"Bearer {THIRD}"}
LIMITS = """
[limits]
body_s = 1
body_bytes = 1000000
bodies_per_key_bytes = 2000000
bodies_bytes = 2000000
drain_s = 1
in_flight_per_model = 2
in_flight_per_key = 2
"""
WHY = ["key_bodies_full", "bodies_full", "key_queue_full", "queue_full"]


def stream(text: str) -> bytes:
    """A request of the first key that lasts."""
    messages = [{"role": "user", "content": text}]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": 4000, "stream": True}).encode()
    lines = ("Host: localhost", f"Authorization: {BEARER['Authorization']}", f"Content-Length: {len(body)}")
    return "\r\n".join((f"POST {CHAT} HTTP/1.1", *lines, "", "")).encode() + body


def test_each_refusal_says_whose_doing_it_was(tmp_path: Path) -> None:
    second = f'[[keys]]\nid = "lab"\nsha256 = "{hashlib.sha256(SECOND.encode()).hexdigest()}"\n'
    third = f'[[keys]]\nid = "few"\nsha256 = "{hashlib.sha256(THIRD.encode()).hexdigest()}"\n'
    policy = tmp_path / "policy.toml"
    policy.write_text('version = "1"\n[[keys]]\nid = "few"\nrequests_per_minute = 1\n')
    extra = f"[policy]\npath = {json.dumps(str(policy))}\n{KEYS}{second}{third}{LIMITS}"
    codes = []
    with rack(tmp_path, [model(fake_step_s=0.05, rows=4)], extra=extra) as (agent,):

        def asked(text: str = "x", headers: dict[str, str] = BEARER, **more: object) -> None:
            answer = agent.chat(text, headers=headers, **more)
            codes.append(answer.json["error"]["code"] if answer.status != 200 else "ok")

        asked()
        asked(model="nobody's")
        asked(n=3)
        asked("x", FEW)
        asked("x", FEW)
        with connections(agent, 1, stream("x" * 900_000)):
            until(lambda: agent.status()["in_flight"] == 1, "the budget is held")
            asked("x" * 250_000)
            asked("x" * 250_000, OTHER)
            with connections(agent, 1, stream("x")):
                until(lambda: agent.status()["in_flight"] == 2, "the key's limit is reached")
                asked()
                asked("x", OTHER)
        until(lambda: agent.status()["in_flight"] == 0, "those that left are over")
        agent.stop()
    assert codes == ["ok", "model_not_found", "invalid_value", "ok", "rate_limited", *WHY]
    store = DirectoryStore(tmp_path / "bucket")
    rollup.run(AggregatorConfig(rack="r", store=Store(path="x")), store)
    first, last = (f"{datetime.now(UTC) + timedelta(days=n):%Y-%m-%d}" for n in (-1, 1))
    found = load.window(store, between(first, last, "UTC"))
    ends: Counter[tuple[str, str]] = Counter()
    for one in found.served:
        ends[one.outcome, one.finish if one.outcome == "refused" else ""] += one.requests
    assert ends == {
        ("ok", ""): 2,
        ("cancelled", ""): 2,
        ("refused", "request"): 2,
        ("refused", "limit"): 3,
        ("refused", "capacity"): 2,
    }
    up = uptime_of(found, found.span.since_ms)
    assert (up.requests_ok, up.requests_bad, up.refused_capacity, up.refused_unsaid) == (2, 2, 2, 0)
