"""``make bench-classes``: the time to first token of ORCHESTRATION, idle and under a flood of ROUTINE.

A real agent with ``--rows`` rows: with the fake engine, whose steps always take the same time, so that what differs is
waiting alone, and with the demo model, where a step with more rows takes longer, too. In interleaved rounds the same
ORCHESTRATION requests are sent one after another to an agent that is idle otherwise, and to one that gets ROUTINE from
ten times as many clients as it has rows, each of which sends its next request as soon as it has an answer or may come
again. What of a ratio is due to sharing the machine is measured without any waiting: the same requests beside as many
running rows as the flood may take, while one row is free.

Reserved rows are an operator's means against sharing: with ``--reserve`` 7 of 8 rows the flood gets 1, decoded in a
batch of their own, which pauses for a first token.
"""

import contextlib
import functools
import http.client
import itertools
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench_fair import connected
from scripts.bench_serve import BUILD, Server, serving
from scripts.common import agent_toml, chat, parser, quantile, script, warn_if_busy
from scripts.fetch_demo_model import MAIN, default_folder
from scripts.seaweed import free_port

SUBJECTS = ("a whale", "the moon", "a clock", "bread", "a river", "chess", "snow", "a violin")
IN_FLIGHT = 64
FAKE = 'engine = "fake"\npath = "weights"\nneed_bytes = 10\nfake_step_s = 0.02\nfake_prefill_tps = 2000.0'


class Case(NamedTuple):
    """An agent and what is asked of it: a [[models]] table, reserved rows, tokens of an answer of ROUTINE."""

    name: str
    model: str
    reserve: int
    routine_tok: int


class Seen(NamedTuple):
    """What the clients of a flood saw: seconds from an admitted request to its answer, one entry for each refusal, and
    how long the floods lasted."""

    answered_s: list[float]
    refused: list[int]
    lasted_s: list[float]


def main() -> int:
    """Command line."""
    args = _arguments()
    warn_if_busy()
    BUILD.mkdir(parents=True, exist_ok=True)
    real = f"path = {json.dumps(str(args.model))}\nplan_context_tok = 1024\nmax_tokens = 64"
    for name in args.cases:
        table = FAKE if name == "fake" else real
        for reserve in args.reserve:
            measure(Case(name, table, reserve, args.routine_tok), args)
    return 0


def _arguments() -> Any:
    found = parser(__doc__)
    found.add_argument("--cases", nargs="*", choices=("fake", "model"), default=("fake", "model"))
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--requests", type=int, default=12, help="ORCHESTRATION requests in each half of a round")
    found.add_argument("--rows", type=int, default=8)
    found.add_argument("--reserve", type=int, nargs="*", default=[0, 7])
    found.add_argument("--prompt-tok", type=int, default=400, help="prompt tokens of ORCHESTRATION, about")
    found.add_argument("--routine-tok", type=int, default=48)
    found.add_argument("--starve-s", type=float, default=30.0)
    found.add_argument("--model", type=Path, default=default_folder() / MAIN)
    return found.parse_args()


def measure(case: Case, args: Any) -> None:
    """One agent: interleaved rounds, then what they say."""
    idle: list[float] = []
    flooded: list[float] = []
    shared: list[float] = []
    ratios: list[float] = []
    seen = Seen([], [], [])
    numbers, few = itertools.count(), args.rows - max(1, case.reserve)
    with agent(case, args) as server:
        first_token(server, order(next(numbers), args.prompt_tok))
        for _ in range(args.rounds):
            one = [first_token(server, order(next(numbers), args.prompt_tok)) for _ in range(args.requests)]
            with beside(server, few, case, numbers, Seen([], [], [])):
                shared += [first_token(server, order(next(numbers), args.prompt_tok)) for _ in range(args.requests)]
            with beside(server, 10 * args.rows, case, numbers, seen):
                two = [first_token(server, order(next(numbers), args.prompt_tok)) for _ in range(args.requests)]
            idle, flooded = idle + one, flooded + two
            ratios.append(quantile(two, 0.95) / quantile(one, 0.95))
    drained_per_s = max(1, len(seen.answered_s)) / sum(seen.lasted_s)
    queue_s = IN_FLIGHT / drained_per_s
    print(f"{case.name}, {args.rows} rows, {case.reserve} reserved for ORCHESTRATION, {os.cpu_count()} cores")
    for label, times in (("idle", idle), (f"beside {few} rows", shared), ("flooded", flooded)):
        p50, p95 = statistics.median(times), quantile(times, 0.95)
        print(f"  TTFT {label:16} p50 {p50 * 1e3:7.0f} ms   p95 {p95 * 1e3:7.0f} ms   of {len(times)}")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"  p95 flooded / idle: median of {args.rounds} rounds {statistics.median(ratios):.2f} ({spread})")
    sharing = quantile(shared, 0.95) / quantile(idle, 0.95)
    print(f"  p95 beside running rows / idle: {sharing:.2f}, which is sharing alone")
    tries = len(seen.answered_s) + len(seen.refused)
    oldest_s = max(seen.answered_s, default=float("nan"))
    print(f"  ROUTINE: {len(seen.answered_s)} answered of {tries} tries; the oldest took {oldest_s:.1f} s, of at most")
    print(
        f"  {queue_s:.1f} s for {IN_FLIGHT} admitted ones at {drained_per_s:.1f}/s, and {args.starve_s:g} s for others"
    )


def agent(case: Case, args: Any) -> Any:
    """A real agent under a policy that reserves rows."""
    folder = BUILD / "classes" / f"{case.name}-{case.reserve}"
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "policy.toml"
    policy.write_text(f"[admission]\nreserved_orchestration = {case.reserve}\nstarve_s = {args.starve_s:g}\n")
    port = free_port()
    tables = f"[loader]\ncalibrate = false\n[policy]\npath = {json.dumps(str(policy.resolve()))}\n"
    tables += f"[limits]\nin_flight_per_model = {IN_FLIGHT}\nin_flight_per_key = 4096\n"
    tables += f'[[models]]\nname = "m"\nrows = {args.rows}\n{case.model}\n'
    config = agent_toml(folder, "bench", "bench", tables, port=port)
    return serving([script("mlxrack-agent"), "run", "--config", str(config)], {}, port, "ready", "m")


class beside:  # noqa: N801  # a context, read as a word
    """ROUTINE from so many clients, each in a thread, until the block ends; then they leave."""

    def __init__(self, server: Server, clients: int, case: Case, numbers: "itertools.count[int]", seen: Seen) -> None:
        self._over, self._began_s, self._seen = threading.Event(), time.perf_counter(), seen
        self._open: set[http.client.HTTPConnection] = set()
        send = functools.partial(self._send, server, case, numbers)
        self._threads = [threading.Thread(target=send, daemon=True) for _ in range(clients)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()
        time.sleep(3.0)  # until its queue is what it will be

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._seen.lasted_s.append(time.perf_counter() - self._began_s)
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _send(self, server: Server, case: Case, numbers: "itertools.count[int]") -> None:
        while not self._over.is_set():
            body = chat(server.model, question(next(numbers)), case.routine_tok, temperature=0)
            connection = connected(server, 600)
            self._open.add(connection)
            try:
                began = time.perf_counter()
                retry_s = posted(connection, body)
                if retry_s is None:
                    self._seen.answered_s.append(time.perf_counter() - began)
            except (OSError, http.client.HTTPException):
                continue  # its own client left
            finally:
                self._open.discard(connection)
                connection.close()
            if retry_s is not None:
                self._seen.refused.append(1)
                self._over.wait(retry_s)


def question(number: int) -> str:
    """A short prompt that no prompt cache knows."""
    return f"{number}: say something about {SUBJECTS[number % len(SUBJECTS)]}, " + "and take your time. " * 8


def order(number: int, tokens: int) -> str:
    """A prompt of about so many tokens, as one that plans has: what it may use, then what is wanted."""
    return f"{number}: " + "there is a tool for each of these steps. " * (tokens // 9) + "What is the next step?"


def posted(connection: http.client.HTTPConnection, body: dict[str, Any]) -> float | None:
    """Send one ROUTINE request; None when it was answered, else the seconds after which to come again."""
    headers = {"Content-Type": "application/json", "X-Task-Class": "ROUTINE"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    answer.read()
    if answer.status == 200:
        return None
    return float(answer.getheader("Retry-After") or 1)


def first_token(server: Server, content: str) -> float:
    """Seconds until the first token of a streamed answer of 4."""
    connection = connected(server, 300)
    body = chat(server.model, content, 4, temperature=0, stream=True)
    began = time.perf_counter()
    headers = {"Content-Type": "application/json", "X-Task-Class": "ORCHESTRATION"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"bench: the agent answered {answer.status}")
    found = next(_tokens_at(answer)) - began
    answer.read()
    connection.close()
    return found


def _tokens_at(answer: http.client.HTTPResponse) -> Iterator[float]:
    for line in answer:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or []
            if any(choice.get("delta", {}).get("content") for choice in choices):
                yield time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
