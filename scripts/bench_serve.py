"""``make bench-serve``: how much of the engine's throughput reaches a client, compared with mlx-lm's server.

Throughput is measured here; the other cases are in bench_fair.py.

Three programs hold the same model over the same BLAS: a bare ``BatchGenerator`` loop without a server (the limit),
``mlx_lm.server``, and the agent. One works at a time, in interleaved rounds with the same requests; medians and
their spread are printed, and ratios within the run. Refuses to measure on a busy machine.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import agent_toml, at_once, chat, running, script, wait_started
from scripts.fetch_demo_model import MAIN, default_folder
from scripts.seaweed import free_port

BUILD = Path("build/bench")
LEVELS = (1, 4, 8, 16)
ROUNDS = 7
TOKENS = 48
BUSY = 0.6
SUBJECTS = ("a whale", "the moon", "a clock", "bread", "a river", "chess", "snow", "a violin")

PREAMBLE = r"""
import json, sys, time
from agent.loader import blas
blas.install()
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
import importlib
importlib.import_module("mlx_lm.generate").maybe_set_recommended_wired_limit = lambda: None
model, tokenizer = load(sys.argv[1])
def tokens(text):
    found = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return found if isinstance(found, list) else list(found["input_ids"])
"""
BARE = r"""
def run(questions, max_tokens):
    prompts = [tokens(q) for q in questions]
    began = time.perf_counter()
    bg = BatchGenerator(model, stop_tokens=[[t] for t in tokenizer.eos_token_ids], completion_batch_size=16)
    bg.insert(prompts, max_tokens=[max_tokens] * len(prompts))
    left, made = len(prompts), 0
    while left:
        for response in bg.next_generated():
            made += 1
            left -= response.finish_reason is not None
    bg.close()
    return made, time.perf_counter() - began
run(["warm up"], 4)
"""
LOOP = r"""
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(run(**json.loads(line))), flush=True)
"""
RIVAL = r"""
import sys
from agent.loader import blas
blas.install()
import importlib
generate = importlib.import_module("mlx_lm.generate")
counter, plain, made = open(sys.argv.pop(1), "w"), generate.GenerationBatch.next, 0
def counted(self):
    global made
    found = plain(self)
    made += len(found)
    counter.seek(0)
    counter.write(str(made))
    counter.flush()
    return found
generate.GenerationBatch.next = counted
from mlx_lm.server import main
main()
"""
RIVAL_PATH = BUILD / "rival-tokens"


class Server(NamedTuple):
    """A running server."""

    base: str
    model: str
    pid: int


Runner = Callable[[list[str]], tuple[int, float]]
"""Answers questions concurrently; returns completion tokens and seconds."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cases", nargs="*", choices=("speed", "fair"), default=("speed", "fair"))
    parser.add_argument("--case-rounds", type=int, default=5)
    parser.add_argument("--long-rounds", type=int, default=1)
    parser.add_argument("--levels", type=int, nargs="*", default=list(LEVELS))
    parser.add_argument("--model", type=Path, default=default_folder() / MAIN)
    args = parser.parse_args()
    if os.getloadavg()[0] > BUSY:
        print(f"bench: load average is {os.getloadavg()[0]:.2f} (at most {BUSY}); retry on an idle machine")
        return os.EX_TEMPFAIL
    BUILD.mkdir(parents=True, exist_ok=True)
    threads = os.cpu_count() or 1
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    found: dict[str, Any] = {}
    if "speed" in args.cases:
        with (
            piped(BARE, args.model, environ) as a,
            rival(args.model, environ) as b,
            agent(model_table(args.model), threads) as c,
        ):
            runners: dict[str, Runner] = {
                "bare loop": lambda questions: a(questions=questions, max_tokens=TOKENS),
                "mlx_lm.server": functools.partial(ask_all, b),
                "agent": functools.partial(ask_all, c),
            }
            found["speed"] = report(measure(runners, args.levels, args.rounds))
    if "fair" in args.cases:
        from scripts import bench_fair

        found["fair"] = bench_fair.main(args.model, environ, threads, args.case_rounds, args.long_rounds)
    (BUILD / "serve.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(runners: dict[str, Runner], levels: list[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Tokens per second of each program at each concurrency, by round; the order rotates from round to round."""
    rates: dict[int, dict[str, list[float]]] = {level: {name: [] for name in runners} for level in levels}
    names = list(runners)
    for number in range(rounds):
        for level in levels:
            # new questions each round, so that no program gains by its prompt cache
            questions = [f"Tell me about {SUBJECTS[n % 8]}, number {number * 100 + n}." for n in range(level)]
            for name in names[number % 3 :] + names[: number % 3]:
                made, seconds = runners[name](questions)
                rates[level][name].append(made / seconds)
        print(f"  round {number + 1} of {rounds}", flush=True)
    return rates


def report(rates: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Print the table; returns it as data."""
    found = []
    print(f"\n{'at once':>8} {'bare loop':>18} {'mlx_lm.server':>18} {'agent':>18}   agent/bare  agent/mlx_lm")
    for level, by_name in rates.items():
        median = {name: statistics.median(values) for name, values in by_name.items()}
        to_bare = statistics.median(c / a for a, c in zip(by_name["bare loop"], by_name["agent"], strict=True))
        to_rival = statistics.median(c / b for b, c in zip(by_name["mlx_lm.server"], by_name["agent"], strict=True))
        cells = [f"{median[n]:7.1f} ({min(v):.0f}-{max(v):.0f})" for n, v in by_name.items()]
        print(f"{level:>8} {cells[0]:>18} {cells[1]:>18} {cells[2]:>18}   {to_bare:10.3f}  {to_rival:12.3f}")
        found.append({"at_once": level, "tok_per_s": by_name, "agent_to_bare": to_bare, "agent_to_mlx_lm": to_rival})
    print("\ntokens per second: median (spread); ratios: median of the rounds' ratios")
    return found


@contextlib.contextmanager
def piped(code: str, model: Path, environ: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A child process that calls its function ``run`` with the arguments it is sent; yields the caller's side."""
    command = [sys.executable, "-P", "-c", PREAMBLE + code + LOOP, str(model)]
    process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    orders, answers = process.stdin, process.stdout
    assert orders is not None
    assert answers is not None
    answers.readline()

    def run(**arguments: Any) -> Any:
        orders.write(json.dumps(arguments) + "\n")
        orders.flush()
        return json.loads(answers.readline())

    try:
        yield run
    finally:
        orders.close()
        process.wait(timeout=20)
        answers.close()


@contextlib.contextmanager
def rival(model: Path, environ: dict[str, str]) -> Iterator[Server]:
    """mlx-lm's own server, over the same BLAS."""
    port = free_port()
    words = ["--model", str(model), "--port", str(port), "--host", "127.0.0.1", "--log-level", "ERROR"]
    command = [sys.executable, "-P", "-c", RIVAL, str(RIVAL_PATH), *words]
    with serving(command, environ, port, "health", str(model)) as server:
        yield server


def model_table(model: Path) -> str:
    """The agent's configuration of the model."""
    return f'[[models]]\nname = "m"\npath = {json.dumps(str(model))}\nrows = 16\nplan_context_tok = 4096\n'


@contextlib.contextmanager
def agent(models: str, threads: int, *, extra: str = "") -> Iterator[Server]:
    """One agent, through its HTTP API."""
    port = free_port()
    tables = f"[loader]\nthreads = {threads}\ncalibrate = false\n{extra}{models}"
    config = agent_toml(BUILD / "agent", "bench", "bench", tables, port=port)
    with serving([script("mlxrack-agent"), "run", "--config", str(config)], {}, port, "ready", "m") as server:
        yield server


@contextlib.contextmanager
def serving(command: list[str], environ: dict[str, str], port: int, ready: str, model: str) -> Iterator[Server]:
    """A server until the block ends."""
    log, base = BUILD / "servers.log", f"http://127.0.0.1:{port}"
    with running(command, log, environ) as process:
        wait_started(lambda: fetch(f"{base}/{ready}").close(), process, log, 120.0)
        yield Server(f"{base}/v1", model, process.pid)


def fetch(url: str) -> Any:
    """A response with status 200; raises as urllib does."""
    return urllib.request.urlopen(url, timeout=10)


def ask_all(server: Server, questions: list[str]) -> tuple[int, float]:
    """All questions concurrently over HTTP; tokens as the answers' usage counts them."""

    def ask(question: str) -> int:
        body = json.dumps(chat(server.model, question, TOKENS, temperature=0)).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.base}/chat/completions", body, head)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return int(json.loads(answer.read())["usage"]["completion_tokens"])

    began = time.perf_counter()
    made = at_once([functools.partial(ask, question) for question in questions])
    return sum(made), time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
