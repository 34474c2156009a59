"""Streams whose loader is killed are continued: the same text and counts, one role, one usage."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.rack.harness import Agent, Answer, events_of, model, rack, until

KILLS = int(os.environ.get("MLXRACK_CONTINUATIONS", "2"))
BEFORE_GIVEN_UP = 4
"""A loader that exits five times in two minutes is not restarted automatically."""
ASKED: dict[str, Any] = {"stream": True, "max_tokens": 60, "stream_options": {"include_usage": True}}


def told(answer: Answer) -> tuple[str, str, int]:
    """Text, finish reason and completion tokens; checks the shape of the stream."""
    assert answer.status == 200, answer.body
    events = events_of(answer)
    assert events[-1] == "[DONE]", events[-1]
    chunks = events[:-1]
    choices = [c for chunk in chunks for c in chunk["choices"]]
    assert sum("role" in c["delta"] for c in choices) == 1
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["system_fingerprint"] for chunk in chunks}) == 1
    usages = [chunk["usage"] for chunk in chunks if chunk["usage"]]
    assert len(usages) == 1
    finishes = [c["finish_reason"] for c in choices if c["finish_reason"]]
    assert len(finishes) == 1
    return "".join(c["delta"].get("content") or "" for c in choices), finishes[0], usages[0]["completion_tokens"]


def kill_while_it_streams(agent: Agent, after_s: float, **asked: Any) -> Answer:
    """One stream, and SIGKILL to its loader after some seconds."""
    found: list[Answer] = []
    thread = threading.Thread(target=lambda: found.append(agent.chat("tell me", **asked)))
    thread.start()
    until(lambda: agent.status()["models"][0]["in_flight"] == 1, "the stream runs")
    time.sleep(after_s)
    pid = agent.status()["models"][0]["pid"]
    if pid:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    return found[0]


@pytest.mark.parametrize("dice", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_a_killed_loader_costs_a_pause_and_no_token(tmp_path: Path, dice: dict[str, Any]) -> None:
    chance = random.Random(3)
    for first in range(0, KILLS, BEFORE_GIVEN_UP):
        folder = tmp_path / str(first)
        folder.mkdir()
        with rack(folder, [model(fake_step_s=0.02)]) as (agent,):
            whole = told(agent.chat("tell me", **ASKED, **dice))
            for _ in range(min(BEFORE_GIVEN_UP, KILLS - first)):
                assert told(kill_while_it_streams(agent, chance.uniform(0.05, 1.0), **ASKED, **dice)) == whole
                until(lambda: agent.status()["models"][0]["state"] == "ready", "it is back")  # used at once
            assert agent.status()["models"][0]["restarts"] >= 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dice", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_a_real_model_is_continued(tmp_path: Path, tiny_model: Path, dice: dict[str, Any]) -> None:
    asked = {**ASKED, "max_tokens": 400, "stop": ["zzzz"]}
    with rack(tmp_path, [{"name": "m", "path": str(tiny_model), "plan_context_tok": 128}]) as (agent,):
        until(lambda: agent.get("/ready").status == 200, "it is loaded")
        whole = told(agent.chat("tell me", **asked, **dice))
        assert whole[2] > 100
        for after_s in (0.0, 0.2):
            assert told(kill_while_it_streams(agent, after_s, **asked, **dice)) == whole
            until(lambda: agent.status()["models"][0]["state"] == "ready", "it is back")


def test_a_peer_with_the_same_version_continues(tmp_path: Path) -> None:
    """The gateway has no models; one of the two workers is killed entirely."""
    with rack(tmp_path, [], [model(fake_step_s=0.03)], [model(fake_step_s=0.03)]) as (door, first, second):
        whole = told(door.chat("tell me", **ASKED, temperature=0))
        found: list[Answer] = []
        thread = threading.Thread(target=lambda: found.append(door.chat("tell me", **ASKED, temperature=0)))
        thread.start()

        def busy() -> list[Agent]:
            return [one for one in (first, second) if one.status()["models"][0]["in_flight"]]

        until(lambda: len(busy()) == 1, "one of them answers")
        time.sleep(0.5)
        busy()[0].kill()
        thread.join()
        assert told(found[0]) == whole
        log = (door.state / "logs" / "agent.jsonl").read_text().splitlines()
        continued = [json.loads(line) for line in log if '"continued"' in line]
        assert len(continued) == 1
        assert "tell me" not in "".join(log)
