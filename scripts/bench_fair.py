"""The second half of ``make bench-serve``: what plain speed does not show.

Shared prompts, short requests behind long ones, streams beside long prompts, clients that leave, overload. Each case
measures the agent beside mlx_lm.server or beside mlx-lm's own batch settings in one run.
"""

import concurrent.futures
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from scripts import bench_serve
from scripts.bench_serve import RIVAL_PATH, Server, agent, rival

SENTENCE = "The quick brown fox jumps over the lazy dog near the old stone bridge. "
TOKENS_PER_SENTENCE = 15
STALL_S = 0.75

UNFAIR = r"""
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
def run(longs, short, delay, max_tokens):
    bg = BatchGenerator(model, stop_tokens=[[t] for t in tokenizer.eos_token_ids], prefill_batch_size=8,
                        prefill_step_size=2048)
    began = time.perf_counter()
    bg.insert([tokens(t) for t in longs], max_tokens=[max_tokens] * len(longs))
    asked, uid, first, left = None, None, None, len(longs) + 1
    while left:
        if uid is None and time.perf_counter() - began >= delay:
            (uid,) = bg.insert([tokens(short)], max_tokens=[max_tokens])
            asked = began + delay
        _, generated = bg.next()
        for response in generated:
            if response.uid == uid and first is None:
                first = time.perf_counter() - asked
            left -= response.finish_reason is not None
    bg.close()
    return first, time.perf_counter() - began
run(["warm up"], "warm", 0.0, 2)
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(run(**json.loads(line))), flush=True)
"""


class Streamed(NamedTuple):
    """One streamed answer, in seconds from its sending."""

    first_s: float
    gaps_s: list[tuple[float, float]]
    end_s: float
    tokens: int


def text_of(tokens: int, salt: str) -> str:
    """About so many tokens of text that begin differently for each salt."""
    return f"{salt}. " + SENTENCE * max(1, tokens // TOKENS_PER_SENTENCE)


def stream(server: Server, content: str, *, max_tokens: int, system: str = "") -> Streamed:
    """Ask and time each piece. Gaps carry the moment at which they ended."""
    messages = [{"role": "system", "content": system}] if system else []
    body = {
        "model": server.model,
        "messages": [*messages, {"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    connection = http.client.HTTPConnection(urlsplit(server.base).netloc, timeout=300)
    began = last = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"bench: {server.base} answered {answer.status}")
    first, gaps, count = 0.0, [], 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        choices = json.loads(line[6:]).get("choices") or []
        if not any(choice.get("delta", {}).get("content") for choice in choices):
            continue
        now = time.perf_counter()
        count += 1
        if not first:
            first = now - began
        else:
            gaps.append((now, now - last))
        last = now
    connection.close()
    return Streamed(first, gaps, time.perf_counter() - began, count)


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """Results of functions that run side by side."""
    with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def shared_prefix(servers: dict[str, Server], salt: str) -> dict[str, Any]:
    """Twenty requests with the same 1,000 tokens before them, one after another."""
    found = {}
    for name, server in servers.items():
        system = text_of(1000, f"Shared {salt}")
        times = [stream(server, f"Say {n}.", max_tokens=4, system=system).first_s for n in range(20)]
        found[name] = {"cold_s": times[0], "warm_s": statistics.median(times[1:])}
    return found


def short_behind_long(
    servers: dict[str, Server], unfair: Callable[..., list[float]], tokens: int, salt: str
) -> dict[str, Any]:
    """A short request half a second after two long ones: its first token, and the time for all of it."""
    longs, short, wait = [text_of(tokens, f"{salt} {n}") for n in range(2)], f"Say hello {salt}.", 0.5
    found: dict[str, Any] = {}
    for name, server in servers.items():

        def later(server: Server = server) -> Streamed:
            time.sleep(wait)
            return stream(server, short, max_tokens=16)

        began = time.perf_counter()
        *_, answer = at_once(*[lambda t=t, s=server: stream(s, t, max_tokens=16) for t in longs], later)
        found[name] = {"first_s": answer.first_s, "all_s": time.perf_counter() - began}
    first, total = unfair(longs=longs, short=short, delay=wait, max_tokens=16)
    found["8 rows, step 2048"] = {"first_s": first, "all_s": total}
    return found


def streams_beside_long(server: Server, salt: str) -> dict[str, float]:
    """Two streams, then two prompts of 1,500 tokens: the streams' gaps while these are worked on."""

    def long(number: int) -> tuple[float, float]:
        time.sleep(1.5)
        began = time.perf_counter()
        stream(server, text_of(1500, f"{salt} {number}"), max_tokens=2)
        return began, time.perf_counter()

    a, b, first, second = at_once(
        lambda: stream(server, f"Tell me a long story {salt} a.", max_tokens=160),
        lambda: stream(server, f"Tell me a long story {salt} b.", max_tokens=160),
        lambda: long(1),
        lambda: long(2),
    )
    begin, end = min(first[0], second[0]), max(first[1], second[1])
    gaps = sorted(gap for one in (a, b) for at, gap in one.gaps_s if begin <= at <= end)
    return {"p95_s": gaps[int(0.95 * len(gaps))], "max_s": gaps[-1], "count": len(gaps)}


def leavers(server: Server, made: Callable[[], int], salt: str) -> dict[str, float]:
    """Eight clients ask for 150 tokens, not streamed, and leave after two seconds: tokens made after that."""
    connections = []
    for number in range(8):
        connection = http.client.HTTPConnection(urlsplit(server.base).netloc, timeout=60)
        body = {
            "model": server.model,
            "messages": [{"role": "user", "content": f"Tell me a long story {salt} {number}."}],
            "max_tokens": 150,
            "temperature": 0,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        connections.append(connection)
    time.sleep(2.0)
    for connection in connections:
        connection.close()
    at_leaving = made()
    last, still = at_leaving, 0
    while still < 4:  # until nothing has been made for two seconds
        time.sleep(0.5)
        now = made()
        still = still + 1 if now == last else 0
        last = now
    return {"wasted_tok": last - at_leaving}


def overload(threads: int) -> dict[str, float]:
    """Ten times as many clients as may be in flight, on the engine without a model: who gets in is served as before."""
    limit = 16
    models = '[[models]]\nname = "m"\nengine = "fake"\npath = "x"\nneed_bytes = 10\nrows = 8\nfake_step_s = 0.01\n'
    extra = f"[limits]\nin_flight_per_model = {limit}\nin_flight_per_key = {limit}\n"
    with agent(models, threads, extra=extra) as server:
        process = psutil.Process(server.pid)
        for count, seconds in ((limit, 2.0), (limit * 10, 2.0)):
            _hammer(server, count, seconds)  # connections and caches grow to their size once
        admitted_before, _ = _hammer(server, limit, 8.0)
        memory_before = process.memory_info().rss
        admitted, refused = _hammer(server, limit * 10, 12.0)
        memory_after = process.memory_info().rss
    return {
        "p95_full_s": _p95(admitted_before),
        "p95_overloaded_s": _p95(admitted),
        "refused": len(refused),
        "refused_p95_s": _p95(refused),
        "memory_grew_mb": (memory_after - memory_before) / 1e6,
    }


def _hammer(server: Server, clients: int, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of admitted and of refused requests. A refused client comes again after a tenth of a second."""
    admitted: list[float] = []
    refused: list[float] = []
    end = time.perf_counter() + seconds
    body = json.dumps({"model": "m", "max_tokens": 20, "messages": [{"role": "user", "content": "x"}]})

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(server.base).netloc, timeout=60)
        while time.perf_counter() < end:
            began = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            took = time.perf_counter() - began
            (admitted if answer.status == 200 else refused).append(took)
            if answer.status != 200:
                time.sleep(0.1)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return admitted, refused


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))] if values else float("nan")


@contextmanager
def unfair_loop(model: Path, environ: dict[str, str]) -> Iterator[Callable[..., list[float]]]:
    """mlx-lm's batch generator with its own settings."""
    with bench_serve.piped([sys.executable, "-P", "-c", UNFAIR, str(model)], environ) as process:

        def run(**order: Any) -> list[float]:
            found: list[float] = bench_serve.exchange(process, order)
            return found

        yield run


def made_by_agent(server: Server) -> int:
    """Tokens that the agent's engine has made so far."""
    with bench_serve.fetch(server.base.removesuffix("/v1") + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("mlxrack_engine_decode_tokens_total"))


def made_by_rival() -> int:
    """Tokens that mlx_lm.server has made so far, by the counter that the wrapper keeps."""
    return int(RIVAL_PATH.read_text() or "0") if RIVAL_PATH.exists() else 0


def main(model: Path, environ: dict[str, str], threads: int, rounds: int, long_rounds: int) -> dict[str, Any]:
    """All cases; prints a line for each."""
    found: dict[str, Any] = {"short behind 1500": [], "short behind 4000": [], "shared prefix": [], "streams": []}
    with ExitStack() as stack:
        a = stack.enter_context(agent(bench_serve.model_table(model), threads))
        b = stack.enter_context(rival(model, environ))
        unfair = stack.enter_context(unfair_loop(model, environ))
        servers = {"agent": a, "mlx_lm.server": b}
        for number in range(rounds):
            turned = dict(list(servers.items())[:: 1 if number % 2 else -1])
            found["shared prefix"].append(shared_prefix(turned, f"{number}"))
            found["streams"].append(streams_beside_long(a, f"{number}"))
            found["short behind 1500"].append(short_behind_long(turned, unfair, 1500, f"{number} of 1500"))
            print(f"  cases, round {number + 1} of {rounds}", flush=True)
        for number in range(long_rounds):
            found["short behind 4000"].append(short_behind_long(servers, unfair, 3900, f"{number} of 4000"))
        found["leavers"] = {
            "agent": leavers(a, lambda: made_by_agent(a), "x"),
            "mlx_lm.server": leavers(b, made_by_rival, "x"),
        }
    found["overload"] = overload(threads)
    report(found)
    return found


def report(found: dict[str, Any]) -> None:
    """What the cases say."""
    prefix = found["shared prefix"]
    for name in ("agent", "mlx_lm.server"):
        ratio = statistics.median(r[name]["cold_s"] / r[name]["warm_s"] for r in prefix)
        warm = statistics.median(r[name]["warm_s"] for r in prefix)
        print(f"shared 1,000 tokens: {name}: first token {ratio:.1f} x sooner than cold ({warm * 1000:.0f} ms)")
    for case in ("short behind 1500", "short behind 4000"):
        if not found[case]:
            continue
        by = {
            name: statistics.median(r[name]["first_s"] for r in found[case])
            for name in ("agent", "mlx_lm.server", "8 rows, step 2048")
        }
        loss = statistics.median(r["agent"]["all_s"] / r["8 rows, step 2048"]["all_s"] for r in found[case])
        print(
            f"{case}: first token {by['agent']:.2f} s; mlx_lm.server {by['mlx_lm.server'] / by['agent']:.1f} x that; "
            f"{by['agent'] / by['8 rows, step 2048']:.0%} of 8 rows with step 2048; all work {loss:.2f} x its time"
        )
    p95 = statistics.median(one["p95_s"] for one in found["streams"])
    print(f"2 streams beside 2 prompts of 1,500: gaps p95 {p95:.2f} s (target {STALL_S} s)")
    left = found["leavers"]
    wasted = [left[name]["wasted_tok"] for name in ("agent", "mlx_lm.server")]
    print(f"clients that leave: {wasted[0]} against {wasted[1]} tokens wasted")
    over = found["overload"]
    full, overloaded, refused = (1000 * over[name] for name in ("p95_full_s", "p95_overloaded_s", "refused_p95_s"))
    print(
        f"10 x overload: admitted p95 {full:.0f} ms full, {overloaded:.0f} ms overloaded; "
        f"{over['refused']} refused, p95 {refused:.0f} ms; memory {over['memory_grew_mb']:+.1f} MB"
    )
