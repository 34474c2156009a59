"""A machine without CPU to spare: one core, on which busy processes run beside the rack.

``MLXRACK_ABUSE=1`` takes more of them, a longer prompt and more short requests.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rack.harness import Agent, Answer, rack, until
from tests.tiny_model import write_tiny_model

LONG = "MLXRACK_ABUSE" in os.environ
CONTEXT_TOK = 8192 if LONG else 2048
PROMPT_TOK = 5000 if LONG else 1100
ANSWER_TOK = 900 if LONG else 150
BUSY = 4 if LONG else 1
SHORT = 30 if LONG else 3
_BUSY_S = 600

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to a core here"),
]


@contextlib.contextmanager
def starved() -> Iterator[None]:
    """Bind this process and those that it starts to one core, and run busy ones there."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    loop = f"import time\nend = time.monotonic() + {_BUSY_S}\nwhile time.monotonic() < end: pass"
    busy = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(BUSY)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cores)


def complete(agent: Agent, prompt: str, **more: object) -> Answer:
    body = {"model": "m", "prompt": prompt, "temperature": 0, "ignore_eos": True, **more}
    return agent.request("POST", "/v1/completions", json.dumps(body).encode(), timeout=1200)


def test_short_requests_go_on_beside_a_long_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    # weights that weigh as much as many tokens, as those of real models do
    write_tiny_model(folder, seed=2, config={"max_position_embeddings": CONTEXT_TOK, "intermediate_size": 4096})
    table = {"name": "m", "path": str(folder), "rows": 4, "plan_context_tok": CONTEXT_TOK // 4}
    with starved(), rack(tmp_path, [{**table, "prefill_chunk_tok": 64, "cache_bytes": 16 << 20}]) as (agent,):
        complete(agent, "question 0", max_tokens=2)
        long: list[Answer] = []
        asking = threading.Thread(target=lambda: long.append(complete(agent, "x" * PROMPT_TOK, max_tokens=ANSWER_TOK)))
        asking.start()
        until(lambda: agent.status()["models"][0]["in_flight"] == 1, "the long one has begun")
        waited = []
        for number in range(SHORT):
            began = time.monotonic()
            assert complete(agent, f"question {number}", max_tokens=2).status == 200
            waited.append(time.monotonic() - began)
            assert not long, "the short ones need not wait for the long one"
        usual, worst = sorted(waited)[SHORT // 2], max(waited)
        print(f"beside a prompt of {PROMPT_TOK} tokens: median {usual:.2f} s, worst {worst:.2f} s")
        asking.join()
        assert long[0].status == 200
        assert agent.status()["models"][0]["restarts"] == 0
