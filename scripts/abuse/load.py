"""One key against another, and one request against a node: findings 1, 2, 3 of the issue, 4, 7 and 8."""

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import resource
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
from tokenizers import Tokenizer

from scripts.abuse import Place, Seen, Watch, agent_of, all_of, as_key, case, code_of, keys, log_of, restarts
from scripts.common import quantile
from tests.rack.harness import Agent, model, rack
from tests.tiny_model import TEMPLATE, write_tiny_model

CHAT = "/v1/chat/completions"
WINDOW_S = 25.0
"""A window ends then, however few requests it had."""
WORDS = ["rack", "node", "heat", "fan", "token", "queue", "swap", "peer", "load", "cache", "batch", "drain"]


def _told(agent: Agent, group: str, count: int) -> tuple[float, float, int]:
    """Alice sends secrets, Bob guesses each rightly and wrongly: how well cached tokens and times tell both apart (as
    the p value of a rank test), and the most tokens that a guess found in the cache."""
    rng = random.Random(group)
    right: list[tuple[int, float]] = []
    wrong: list[tuple[int, float]] = []
    for number in range(count):
        start = " ".join(rng.choice(WORDS) for _ in range(400))
        secret, guess = (f"{group} {number} {start} salary {rng.randrange(10**6)} per year" for _ in range(2))
        assert agent.chat(secret, headers=as_key("alice"), max_tokens=1).status == 200
        # as many words, so that it takes as long
        order = [(right, secret), (wrong, " ".join(reversed(guess.split())))]
        for found, text in order if rng.random() < 0.5 else reversed(order):
            body = agent.chat(text, headers=as_key("bob"), max_tokens=1, timings=True).json
            found.append((body["usage"]["prompt_tokens_details"]["cached_tokens"], body["timings"]["prompt_ms"]))
    most = max(tok for tok, _ in (*right, *wrong))
    by_tok, by_ms = (_rank_p([one[n] for one in right], [one[n] for one in wrong]) for n in (0, 1))
    return by_tok, by_ms, most


def _rank_p(left: Sequence[float], right: Sequence[float]) -> float:
    """Two-sided p value of the Mann-Whitney test, by its normal approximation with ties."""
    n, m = len(left), len(right)
    wins = sum((a > b) + 0.5 * (a == b) for a in left for b in right)
    both = [*left, *right]
    ties = sum(both.count(one) ** 3 - both.count(one) for one in set(both))
    spread = (n * m / 12 * ((n + m + 1) - ties / ((n + m) * (n + m - 1)))) ** 0.5
    return 1.0 if spread == 0 else 2 * (1 - statistics.NormalDist().cdf(abs(wins - n * m / 2) / spread))


@case(
    "cache-guesses",
    "1",
    "two keys; one guesses what the other has sent, rightly and wrongly",
    "cached_tokens and prompt_ms tell nothing; with a shared cache_group they do",
    limit_s=240,
)
def cache_guesses(place: Place) -> Seen:
    """The fake engine, with a prompt cache and a prefill that takes time."""
    table, count = model(fake_prefill_tps=40_000, fake_cache_tok=200_000, rows=4), place.size(100, 30)
    apart = agent_of(place, [table], keys())
    by_tok, by_ms, most = _told(apart, "apart", count)
    apart.stop()
    group = 'cache_group = "team"\n'
    shared = agent_of(place, [table], keys(alice=group, bob=group), "n2")
    shared_tok, shared_ms, _ = _told(shared, "shared", count)
    return all_of(
        (min(by_tok, by_ms) > 1e-3, f"{2 * count} guesses, apart: p {by_tok:.2g} (tokens), {by_ms:.2g} (ms)"),
        (most == 0, f"at most {most} cached tokens"),
        (shared_tok < 1e-6, f"shared group: p {shared_tok:.2g}, {shared_ms:.2g}"),
    )


def _flood(port: int, body: bytes, count: int, stop: Any, statuses: Any) -> None:
    """Send large prompts from ``count`` connections, over and over, as another process with less of the CPU."""
    os.nice(10)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    raw = (
        f"{head}Authorization: {as_key('alice')['Authorization']}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )

    def sends() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
                sock.sendall(raw)
                statuses.append(int(sock.recv(64).split(b" ")[1] or 0))

    threads = [threading.Thread(target=sends, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def _flooding(port: int, body: bytes, count: int) -> Iterator[list[int]]:
    with multiprocessing.Manager() as manager:
        stop, statuses = manager.Event(), manager.list()
        child = multiprocessing.Process(target=_flood, args=(port, body, count, stop, statuses), daemon=True)
        child.start()
        found: list[int] = []
        try:
            yield found
        finally:
            stop.set()
            child.join(20)
            child.kill()
            found += list(statuses)


def _ttft_s(agent: Agent) -> float:
    """Bob's time to first token."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=200)
    connection.request("POST", CHAT, json.dumps(body), {**as_key("bob"), "Content-Type": "application/json"})
    answer = connection.getresponse()
    while (line := answer.readline()) and b'"content":"' not in line.replace(b": ", b":").replace(b'"content":""', b""):
        pass
    took = time.monotonic() - began
    connection.close()
    return took if answer.status == 200 else 200.0


def _windows(agent: Agent, body: bytes, rounds: int, each: int) -> tuple[list[float], list[float], list[int]]:
    """Bob's TTFT undisturbed and beside the flood, in turn; and what the flood was answered."""
    alone: list[float] = []
    beside: list[float] = []
    statuses: list[int] = []
    for _ in range(rounds):
        alone += [_ttft_s(agent) for _ in range(each)]
        with _flooding(agent.port, body, 48) as found:
            time.sleep(0.5)
            until_s, first = time.monotonic() + WINDOW_S, len(beside)
            while len(beside) < first + each and time.monotonic() < until_s:
                beside.append(_ttft_s(agent))
        statuses += found
        time.sleep(0.5)
    return alone, beside, statuses


@case(
    "large-prompts",
    "2",
    "48 x 5 MB prompts of one key at a time, beside short requests of another (fake engine)",
    "400 each, no loader dies, p95 TTFT of the other key within 1.5 x",
    limit_s=300,
)
def large_prompts(place: Place) -> Seen:
    """Interleaved windows; at least 200 requests of each kind at full size."""
    agent = agent_of(place, [model(fake_step_s=0.005, fake_prefill_tps=5000)], keys())
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 1_000_000}]}).encode()
    alone, beside, statuses = _windows(agent, body, place.size(10, 3), 20)
    before, during = quantile(alone, 0.95), quantile(beside, 0.95)
    return all_of(
        (during <= 1.5 * before, f"p95 TTFT {before * 1e3:.0f} -> {during * 1e3:.0f} ms, ratio {during / before:.2f}"),
        (restarts(agent) == 0, f"{restarts(agent)} restarts"),
        (
            bool(statuses) and set(statuses) <= {400, 413, 429},
            f"{len(statuses)} floods, statuses {sorted(set(statuses))}",
        ),
    )


@case(
    "long-preparation",
    "2",
    "5 prompts of 4.9 MB random letters to a real (tiny) model, stuck_s = 15",
    "400 each at once, no loader is killed, nobody waits",
)
def long_preparation(place: Place) -> Seen:
    """Tokenizing one takes seconds; the watchdog must not take the queue for a hang."""
    write_tiny_model(place.folder / "tiny", seed=1, config={"max_position_embeddings": 8192})
    tokenizer = Tokenizer.from_file(str(place.folder / "tiny" / "tokenizer.json"))
    # the longest token decides from how many bytes on a text cannot fit
    tokenizer.add_special_tokens([f"<|{'long' * 40}|>"])
    tokenizer.save(str(place.folder / "tiny" / "tokenizer.json"))
    table = {"name": "m", "path": str(place.folder / "tiny"), "rows": 2, "plan_context_tok": 8192}
    agent = agent_of(place, [table], keys() + "[limits]\nstuck_s = 15\n")
    rng, found = random.Random(1), []
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4_900_000))

    def sends(number: int) -> None:
        answer = agent.chat(letters[number:], headers=as_key("alice"))
        found.append((answer.status, code_of(answer)))

    threads = [threading.Thread(target=sends, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    slowest = max(_ttft_s(agent) for _ in range(3))
    for thread in threads:
        thread.join()
    return all_of(
        (set(found) == {(400, "context_length_exceeded")}, f"answers {sorted(set(found))}"),
        (restarts(agent) == 0, f"{restarts(agent)} restarts"),
        (slowest < 10, f"the other key waited {slowest:.1f} s at most"),
    )


@case(
    "slow-first-token",
    "3i",
    "first_token_s = 2, a fake engine that prefills for minutes; then a loader that hangs",
    "neither cut nor begun again; the hanging loader is replaced",
    limit_s=300,
)
def slow_first_token(place: Place) -> Seen:
    """Long form of the test: prefill is unbounded while it progresses, silence is not."""
    seconds = place.size(130, 15)
    extra = "[limits]\nfirst_token_s = 2\nstuck_s = 10\n"
    agent = agent_of(place, [model(fake_prefill_tps=2000 / seconds)], extra)
    began = time.monotonic()
    answer = agent.chat(" ".join(["word"] * 2000))
    took = time.monotonic() - began
    begun_again = sum('"retr' in line and '"retries":0' not in line for line in log_of(agent).splitlines())
    before = restarts(agent)
    threading.Thread(target=lambda: agent.chat("!hang"), daemon=True).start()
    deadline = time.monotonic() + 90
    while restarts(agent) == before and time.monotonic() < deadline:
        time.sleep(0.5)
    return all_of(
        (answer.status == 200 and took > seconds / 2, f"{answer.status} after {took:.0f} s of prefill"),
        (before == 0, f"{before} restarts meanwhile, {begun_again} log lines with retries"),
        (restarts(agent) > before, "the hanging loader was replaced" if restarts(agent) > before else "it hangs on"),
    )


def _half_open(port: int, count: int, raw: bytes) -> list[socket.socket]:
    """Connections that never end their first request; those that are refused are left out."""
    found = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            sock = socket.create_connection(("127.0.0.1", port), timeout=5)
            found.append(sock)
            sock.settimeout(0.3)  # it need not read what it has no room for
            sock.sendall(raw)
    return found


def _probes(agents: Sequence[Agent], seconds: float) -> tuple[int, int, int]:
    """Keyed requests through the first agent to the second and here, and how often the peer was up."""
    good, asked, up, deadline = 0, 0, 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        for name in ("m", "k"):
            asked += 1
            answer = agents[0].request(
                "POST",
                CHAT,
                json.dumps({"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode(),
                as_key("bob"),
                timeout=5,
            )
            good += answer.status == 200
        with contextlib.suppress(ValueError, KeyError):
            up += agents[1].status()["peers"][0]["state"] == "up"
        time.sleep(0.5)
    return good, asked, up


@case(
    "half-open",
    "4",
    "ulimit -n 256; 100, then 400 sockets with half a header; bytes that drip in",
    "peers and keyed clients are served, logs grow less than 1 MB, the sockets are closed",
    limit_s=240,
)
def half_open(place: Place) -> Seen:
    """A header that is never ended; the plist's 8,192 descriptors only make it take longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with rack(place.folder, [model()], [model("k")], extra=keys()) as agents:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        logs = sum(len(log_of(agent)) for agent in agents)
        socks = _half_open(agents[0].port, 100, b"GET /health HTTP/1.1\r\nHos")
        first = _probes(agents, place.size(15, 8))
        socks += _half_open(agents[0].port, 400, b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ")
        done = threading.Event()
        threading.Thread(target=_drip, args=(socks, done), daemon=True).start()
        second = _probes(agents, place.size(25, 14))
        done.set()
        grown = sum(len(log_of(agent)) for agent in agents) - logs
        left = sum(_is_open(sock) for sock in socks)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    served = [f"{good} of {asked} requests served, peer up {up} times" for good, asked, up in (first, second)]
    return all_of(
        (first[0] == first[1] and first[2] > 0, f"100 sockets: {served[0]}"),
        (second[0] >= 0.95 * second[1] and second[2] > 0, f"500, dripping: {served[1]}"),
        (grown < 1_000_000, f"logs grew {grown / 1e3:.0f} kB"),
        (left < 150, f"{left} of {len(socks)} sockets are still open"),
    )


def _drip(socks: Sequence[socket.socket], done: threading.Event) -> None:
    while not done.wait(1):
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.sendall(b"x")


def _is_open(sock: socket.socket) -> bool:
    sock.settimeout(0.01)
    try:
        return sock.recv(4096) != b"" and _is_open(sock)
    except TimeoutError:
        return True
    except OSError:
        return False


@case(
    "web-pages",
    "7",
    "an agent without keys: Host and Origin of web pages, cross-site forms; then one with keys, without a token",
    "421 or 403 for pages, 200 for curl; /metrics and /debug need a token where keys are",
)
def web_pages(place: Place) -> Seen:
    """DNS rebinding reads answers; a simple cross-site POST needs no preflight."""
    agent = agent_of(place, [model()])
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
    page, json_type = {"Origin": "https://evil.example"}, {"Content-Type": "application/json"}
    foreign: list[tuple[str, dict[str, str]]] = [
        ("Host evil.example", {"Host": "evil.example"}),
        ("Host localhost.evil.example", {"Host": "localhost.evil.example:80"}),
        ("Host 127.0.0.1.evil.example", {"Host": "127.0.0.1.evil.example"}),
        ("no Host's port only", {"Host": "evil.example:8470"}),
        ("Origin, text/plain", {**page, "Content-Type": "text/plain"}),
        ("Origin, JSON", {**page, **json_type}),
        ("Origin null", {"Origin": "null", **json_type}),
        ("Sec-Fetch-Site", {"Sec-Fetch-Site": "cross-site", **json_type}),
        ("a form", {**page, "Content-Type": "application/x-www-form-urlencoded"}),
    ]
    got = {name: agent.request("POST", CHAT, body, headers).status for name, headers in foreign}
    got |= {
        f"GET {path} {name}": agent.request("GET", path, None, headers).status
        for path in ("/metrics", "/debug/rack", "/v1/models")
        for name, headers in (foreign[0], foreign[1])
    }
    ours = {
        "curl": agent.request("POST", CHAT, body, {"Content-Type": "application/x-www-form-urlencoded"}).status,
        "localhost": agent.request("POST", CHAT, body, {"Host": f"localhost:{agent.port}", **json_type}).status,
        "::1": agent.request("POST", CHAT, body, {"Host": "[::1]", **json_type}).status,
    }
    agent.stop()
    keyed = agent_of(place, [model()], keys(), "n2")
    closed = {path: keyed.get(path).status for path in ("/metrics", "/debug/rack")}
    passed = sorted(name for name, status in got.items() if status not in (400, 403, 415, 421))
    return all_of(
        (not passed, f"{len(got)} foreign requests, answered: {', '.join(passed) or 'none'}"),
        (set(ours.values()) == {200}, f"own clients {sorted(set(ours.values()))}"),
        (set(closed.values()) <= {401, 403}, f"with keys, without a token: {closed}"),
    )


@case(
    "body-bombs",
    "8",
    "60 unfinished 9.9 MB bodies; 8 x 9.9 MB of empty lists; 8 x 8 MB of unknown keys; unknown encodings",
    "the process stays below 450 MB; nothing is done before admission; 415",
)
def body_bombs(place: Place) -> Seen:
    """The peak is memory that the plan believes models have."""
    agent = agent_of(place, [model()], keys())
    nested = b'{"model":"m","messages":[' + b"[]," * 3_250_000 + b"[]]}"
    strange = b'{"model":"m","messages":[{"role":"user","content":"hi"}],%s}' % b",".join(
        b'"k%d":1' % number for number in range(600_000)
    )
    with Watch(agent) as unfinished:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\n{_lines(as_key('alice'))}Content-Length: 9900001\r\n\r\n"
        socks = _half_open(agent.port, 60, head.encode() + b"[" * 9_900_000)
        time.sleep(2)
        for sock in socks:
            sock.close()
    peaks, codes = {"unfinished": unfinished}, set()
    for name, body in (("lists", nested), ("keys", strange)):
        with Watch(agent) as peaks[name]:
            threads = [threading.Thread(target=lambda body=body: codes.add(_posted(agent, body))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    encodings = {
        agent.request("POST", CHAT, b"x", {**as_key("alice"), "Content-Encoding": e}).status for e in ("br", "x")
    }
    told = ", ".join(f"{name} {seen.peak_mb:.0f} MB (health {seen.slowest_s:.1f} s)" for name, seen in peaks.items())
    return all_of(
        (max(seen.peak_mb for seen in peaks.values()) < 450, told),
        (codes <= {400, 413, 429, 503, 200}, f"statuses {sorted(codes)}"),
        (encodings == {415}, f"unknown encodings {sorted(encodings)}"),
    )


def _posted(agent: Agent, body: bytes) -> int:
    return agent.request("POST", CHAT, body, {**as_key("alice"), "Content-Type": "application/json"}).status


def _lines(headers: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


@case(
    "endless-template",
    "12",
    "a model whose chat template never ends, one that makes 3 GB of text; another model beside them",
    "the request fails within a bound, memory is bounded, the other model is served",
    limit_s=360,
)
def endless_template(place: Place) -> Seen:
    """A folder from elsewhere may carry any template."""
    templates = {
        "loop": TEMPLATE
        + "{% for a in range(99999) %}{% for b in range(99999) %}{% if b < 0 %}x{% endif %}{% endfor %}{% endfor %}",
        "size": TEMPLATE + "{{ 'x' * 3000000000 }}",
    }
    tables = [model("fine")]
    for number, (name, template) in enumerate(templates.items()):
        write_tiny_model(place.folder / name, seed=number, template=template)
        tables.append({"name": name, "path": str(place.folder / name), "rows": 1, "plan_context_tok": 512})
    agent = agent_of(place, tables, "[limits]\nstuck_s = 20\nfirst_token_s = 20\nrequest_s = 90\n")
    seen: dict[str, tuple[int, float]] = {}

    def asks(name: str) -> None:
        began = time.monotonic()
        status = agent.chat("hi", model=name).status
        seen[name] = (status, time.monotonic() - began)

    threads = [threading.Thread(target=asks, args=(name,)) for name in templates]
    for thread in threads:
        thread.start()
    peak, fine, asked = 0.0, 0, 0
    while any(thread.is_alive() for thread in threads):
        asked += 1
        fine += agent.chat("hi", model="fine").status == 200
        peak = max(peak, *(_child_mb(agent) or [0.0]))
        time.sleep(0.3)
    told = ", ".join(f"{name}: {status} after {took:.0f} s" for name, (status, took) in sorted(seen.items()))
    return all_of(
        (all(status >= 400 and took < 60 for status, took in seen.values()), told),
        (fine == asked, f"the other model served {fine} of {asked}"),
        (peak < 2500, f"largest loader {peak:.0f} MB"),
    )


def _child_mb(agent: Agent) -> list[float]:
    assert agent.process is not None
    found = []
    for child in psutil.Process(agent.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(child.memory_info().rss / 1e6)
    return found
