"""Routing between real agents: by speed, and to the node whose prompt cache holds the conversation."""

import collections
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.rack.harness import Agent, model, rack, until
from tests.rack.load import Ask, at_once

LASTS_S = 12.0
EXACT = "MLXRACK_CHAOS" in os.environ
"""`make chaos` compares shares with speeds; on a crowded machine no node has the speed that its engine is given."""
WARM_S = 3.5


@pytest.mark.timeout(900)
def test_requests_are_split_by_node_speed(tmp_path: Path) -> None:
    speeds = (1, 2, 4)
    workers = [[model(rows=4, fake_step_s=0.04 / speed)] for speed in speeds]
    with rack(tmp_path, [], *workers) as (door, *_):
        at_once(door.port, [Ask(f"warm up {n}", 10) for n in range(24)])
        began, done = time.monotonic(), []

        def client(number: int) -> None:
            while time.monotonic() < began + LASTS_S:
                done.extend(at_once(door.port, [Ask(f"go {number}", 15)]))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(46)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not [one.fault for one in done if one.fault]
        settled = [one for one in done if one.at_s > began + WARM_S]
        counts = collections.Counter(one.worker for one in settled)
        shares = [counts[f"n{n + 2}"] / len(settled) for n in range(3)]
        print(f"shares of work at speeds 1:2:4: {', '.join(f'{one:.3f}' for one in shares)} of {len(settled)} requests")
        assert shares == sorted(shares), "the faster a node, the more it gets"
        if EXACT:
            for share, speed in zip(shares, speeds, strict=True):
                assert share == pytest.approx(speed / sum(speeds), rel=0.1)


class Talk:
    """A conversation with each turn at any gateway; the possible prompt cache hit is its history."""

    def __init__(self, number: int, dice: random.Random) -> None:
        self.dice = dice
        self.messages = [{"role": "system", "content": f"You are assistant {number % 3}. " * 40}]
        self.number = number
        self.before_tok = 0
        self.possible_tok = self.cached_tok = self.turns = 0

    def turn(self, door: Agent) -> None:
        """One turn."""
        self.messages.append({"role": "user", "content": f"question {self.number} {self.turns} " * 25})
        body: dict[str, Any] = {"model": "m", "messages": self.messages, "max_tokens": 30, "temperature": 0}
        answer = door.request("POST", "/v1/chat/completions", json.dumps(body).encode())
        assert answer.status == 200, answer.body
        usage = answer.json["usage"]
        self.messages.append({"role": "assistant", "content": answer.json["choices"][0]["message"]["content"]})
        self.possible_tok += self.before_tok
        self.cached_tok += min(self.before_tok, usage["prompt_tokens_details"]["cached_tokens"])
        self.before_tok = usage["prompt_tokens"] + usage["completion_tokens"]
        self.turns += 1


@pytest.mark.timeout(900)
def test_conversations_hit_their_prompt_cache_from_any_gateway(tmp_path: Path) -> None:
    worker = model(rows=4, fake_step_s=0.005, fake_prefill_tps=3000, fake_cache_tok=60_000)
    with rack(tmp_path, *([worker] for _ in range(4))) as agents:
        dice = random.Random(4)
        talks = [Talk(n, dice) for n in range(12)]

        def chat(talk: Talk) -> None:
            for _ in range(6):
                talk.turn(dice.choice(agents))
                time.sleep(dice.uniform(0.4, 1.6))

        threads = [threading.Thread(target=chat, args=(talk,)) for talk in talks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        share = sum(t.cached_tok for t in talks) / sum(t.possible_tok for t in talks)
        served = {agent.node: agent.status()["models"][0]["requests_last_hour"] for agent in agents}
        print(f"found in prompt caches: {share:.1%} of what was possible; requests by node {served}")
        assert share >= 0.9
        assert max(served.values()) < 2.0 * sum(served.values()) / len(served), "and yet all nodes work"


@pytest.mark.timeout(900)
def test_one_hot_prompt_does_not_overload_one_node(tmp_path: Path) -> None:
    worker = model(rows=4, fake_step_s=0.01, fake_prefill_tps=3000, fake_cache_tok=60_000)
    with rack(tmp_path, [], *([worker] for _ in range(4))) as (door, *workers):
        system = "You are everybody's assistant. " * 100
        for _ in range(4):
            heard = at_once(door.port, [Ask(f"{system} question {n}", 20) for n in range(32)])
            assert not [one.fault for one in heard if one.fault]
        served = [worker.status()["models"][0]["requests_last_hour"] for worker in workers]
        print(f"requests by node with one system prompt: {served}")
        assert max(served) / (sum(served) / len(served)) < 1.5


def test_a_draining_node_gets_no_new_requests_and_finishes(tmp_path: Path) -> None:
    with rack(tmp_path, [], [model(fake_step_s=0.02)], [model(fake_step_s=0.02)]) as (door, first, _):
        heard: list[Any] = []
        thread = threading.Thread(
            target=lambda: heard.extend(at_once(door.port, [Ask(f"a {n}", 60) for n in range(6)]))
        )
        thread.start()
        until(lambda: first.status()["models"][0]["in_flight"] > 0, "it works")
        assert first.stop() == 0
        thread.join()
        assert not [one.fault for one in heard if one.fault]
        later = at_once(door.port, [Ask(f"b {n}", 5) for n in range(6)])
        assert {one.worker for one in later} == {"n3"}
