"""The second half of ``make bench-serve``: fairness, cancellation and overload.

Shared prefixes, short requests queued behind long ones, streams during long prefills, clients that disconnect,
overload. Each case compares the agent with mlx_lm.server or with mlx-lm's own batch settings in one run.
"""

import functools
import http.client
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from scripts import bench_serve
from scripts.bench_serve import RIVAL_PATH, Server, agent, rival
from scripts.common import at_once, chat, quantile

SENTENCE = "The quick brown fox jumps over the lazy dog near the old stone bridge. "
TOKENS_PER_SENTENCE = 15
STALL_S = 0.75

UNFAIR = r"""
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
"""


class Streamed(NamedTuple):
    """One streamed answer, in seconds since the request was sent."""

    first_s: float
    gaps_s: list[tuple[float, float]]
    end_s: float
    tokens: int


def text_of(tokens: int, salt: str) -> str:
    """About so many tokens of text that begin differently for each salt."""
    return f"{salt}. " + SENTENCE * max(1, tokens // TOKENS_PER_SENTENCE)


def stream(server: Server, content: str, *, max_tokens: int, system: str = "") -> Streamed:
    """Stream one answer and time each chunk. TokenGaps carry the time at which they ended."""
    body = chat(server.model, content, max_tokens, temperature=0, stream=True)
    if system:
        body["messages"].insert(0, {"role": "system", "content": system})
    connection = connected(server, 300)
    began = last = time.perf_counter()
    post(connection, body)
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


def connected(server: Server, timeout_s: float = 60) -> http.client.HTTPConnection:
    """A connection to a server."""
    return http.client.HTTPConnection(urlsplit(server.base).netloc, timeout=timeout_s)


def post(connection: http.client.HTTPConnection, body: dict[str, Any]) -> None:
    """Send a chat completion."""
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})


def shared_prefix(servers: dict[str, Server], salt: str) -> dict[str, Any]:
    """Twenty requests with the same prefix of 1,000 tokens, one after another."""
    found = {}
    for name, server in servers.items():
        system = text_of(1000, f"Shared {salt}")
        times = [stream(server, f"Say {n}.", max_tokens=4, system=system).first_s for n in range(20)]
        found[name] = {"cold_s": times[0], "warm_s": statistics.median(times[1:])}
    return found


def short_behind_long(
    servers: dict[str, Server], unfair: Callable[..., list[float]], tokens: int, salt: str
) -> dict[str, Any]:
    """A short request half a second after two long ones: its TTFT, and the time for all three."""
    longs, short, wait = [text_of(tokens, f"{salt} {n}") for n in range(2)], f"Say hello {salt}.", 0.5
    found: dict[str, Any] = {}
    for name, server in servers.items():

        def later(server: Server = server) -> Streamed:
            time.sleep(wait)
            return stream(server, short, max_tokens=16)

        began = time.perf_counter()
        work: list[Callable[[], Streamed]] = [functools.partial(stream, server, t, max_tokens=16) for t in longs]
        *_, answer = at_once([*work, later])
        found[name] = {"first_s": answer.first_s, "all_s": time.perf_counter() - began}
    first, total = unfair(longs=longs, short=short, delay=wait, max_tokens=16)
    found["8 rows, step 2048"] = {"first_s": first, "all_s": total}
    return found


def streams_beside_long(server: Server, salt: str) -> dict[str, float]:
    """Two streams, then two prompts of 1,500 tokens: the streams' ITL during these prefills."""
    times: list[float] = []

    def long(number: int) -> list[tuple[float, float]]:
        time.sleep(1.5)
        times.append(time.perf_counter())
        stream(server, text_of(1500, f"{salt} {number}"), max_tokens=2)
        times.append(time.perf_counter())
        return []

    def story(name: str) -> list[tuple[float, float]]:
        return stream(server, f"Tell me a long story {salt} {name}.", max_tokens=160).gaps_s

    found = at_once([lambda: story("a"), lambda: story("b"), lambda: long(1), lambda: long(2)])
    gaps = [gap for one in found for at, gap in one if min(times) <= at <= max(times)]
    return {"p95_s": quantile(gaps, 0.95), "max_s": max(gaps), "count": len(gaps)}


def leavers(server: Server, made: Callable[[], int], salt: str) -> dict[str, float]:
    """Eight clients ask for 150 tokens, not streamed, and disconnect after two seconds: tokens produced after that."""
    connections = [connected(server) for _ in range(8)]
    for number, connection in enumerate(connections):
        post(connection, chat(server.model, f"Tell me a long story {salt} {number}.", 150, temperature=0))
    time.sleep(2.0)
    for connection in connections:
        connection.close()
    at_leaving = made()
    last, still = at_leaving, 0
    while still < 4:  # until no token was produced for two seconds
        time.sleep(0.5)
        now = made()
        still = still + 1 if now == last else 0
        last = now
    return {"wasted_tok": last - at_leaving}


def overload(threads: int) -> dict[str, float]:
    """Ten times as many clients as the in-flight limit, on the fake engine: admitted requests must not slow down."""
    limit = 16
    models = '[[models]]\nname = "m"\nengine = "fake"\npath = "x"\nneed_bytes = 10\nrows = 8\nfake_step_s = 0.01\n'
    extra = f"[limits]\nin_flight_per_model = {limit}\nin_flight_per_key = {limit}\n"
    with agent(models, threads, extra=extra) as server:
        process = psutil.Process(server.pid)
        for count, seconds in ((limit, 2.0), (limit * 10, 2.0)):
            _hammer(server, count, seconds)  # warm-up: connections and caches reach their size
        admitted_before, _ = _hammer(server, limit, 8.0)
        memory_before = process.memory_info().rss
        admitted, refused = _hammer(server, limit * 10, 12.0)
        memory_after = process.memory_info().rss
    return {
        "p95_full_s": quantile(admitted_before, 0.95),
        "p95_overloaded_s": quantile(admitted, 0.95),
        "refused": len(refused),
        "refused_p95_s": quantile(refused, 0.95),
        "memory_grew_mb": (memory_after - memory_before) / 1e6,
    }


def _hammer(server: Server, clients: int, seconds: float) -> tuple[list[float], list[float]]:
    """Latencies of admitted and of rejected requests. A rejected client retries after a tenth of a second."""
    admitted: list[float] = []
    refused: list[float] = []
    end = time.perf_counter() + seconds
    body = chat("m", "x", 20)

    def client() -> None:
        connection = connected(server)
        while time.perf_counter() < end:
            began = time.perf_counter()
            post(connection, body)
            answer = connection.getresponse()
            answer.read()
            took = time.perf_counter() - began
            (admitted if answer.status == 200 else refused).append(took)
            if answer.status != 200:
                time.sleep(0.1)
        connection.close()

    at_once([client] * clients)
    return admitted, refused


def made_by_agent(server: Server) -> int:
    """Tokens that the agent's engine has produced so far."""
    with bench_serve.fetch(server.base.removesuffix("/v1") + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("mlxrack_engine_decode_tokens_total"))


def made_by_rival() -> int:
    """Tokens that mlx_lm.server has produced so far, by the wrapper's counter."""
    return int(RIVAL_PATH.read_text() or "0") if RIVAL_PATH.exists() else 0


def main(model: Path, environ: dict[str, str], threads: int, rounds: int, long_rounds: int) -> dict[str, Any]:
    """Run all cases; prints a line for each."""
    found: dict[str, Any] = {"short behind 1500": [], "short behind 4000": [], "shared prefix": [], "streams": []}
    with ExitStack() as stack:
        a = stack.enter_context(agent(bench_serve.model_table(model), threads))
        b = stack.enter_context(rival(model, environ))
        unfair = stack.enter_context(bench_serve.piped(UNFAIR, model, environ))
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
    """Print the results."""
    prefix = found["shared prefix"]
    for name in ("agent", "mlx_lm.server"):
        ratio = statistics.median(r[name]["cold_s"] / r[name]["warm_s"] for r in prefix)
        warm = statistics.median(r[name]["warm_s"] for r in prefix)
        print(f"shared prefix of 1,000 tokens: {name}: TTFT {ratio:.1f} x shorter than cold ({warm * 1000:.0f} ms)")
    for case in ("short behind 1500", "short behind 4000"):
        if not found[case]:
            continue
        by = {
            name: statistics.median(r[name]["first_s"] for r in found[case])
            for name in ("agent", "mlx_lm.server", "8 rows, step 2048")
        }
        loss = statistics.median(r["agent"]["all_s"] / r["8 rows, step 2048"]["all_s"] for r in found[case])
        print(
            f"{case}: TTFT {by['agent']:.2f} s; mlx_lm.server {by['mlx_lm.server'] / by['agent']:.1f} x that; "
            f"{by['agent'] / by['8 rows, step 2048']:.0%} of 8 rows with step 2048, total time {loss:.2f} x"
        )
    p95 = statistics.median(one["p95_s"] for one in found["streams"])
    print(f"2 streams during 2 prefills of 1,500: ITL, p95, {p95:.2f} s (target {STALL_S} s)")
    left = found["leavers"]
    wasted = [left[name]["wasted_tok"] for name in ("agent", "mlx_lm.server")]
    print(f"clients that disconnect: agent {wasted[0]}, mlx_lm.server {wasted[1]} tokens wasted")
    over = found["overload"]
    full, overloaded, refused = (1000 * over[name] for name in ("p95_full_s", "p95_overloaded_s", "refused_p95_s"))
    print(
        f"10 x overload: admitted p95 {full:.0f} ms full, {overloaded:.0f} ms overloaded; "
        f"{over['refused']} rejected, p95 {refused:.0f} ms; memory {over['memory_grew_mb']:+.1f} MB"
    )
