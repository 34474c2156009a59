"""``make bench-dispatch``: overhead of the gateway, compared with a minimal proxy and LiteLLM's proxy.

One mock backend serves all of them: directly, through forty lines of aiohttp that inspect nothing, through an agent
that has it as an authenticated peer, and through LiteLLM's proxy in its own virtual environment. They take turns in
interleaved rounds with the same requests; medians, their spread and ratios within the run are printed. Refuses to
measure on a busy machine.
"""

import asyncio
import contextlib
import json
import random
import shutil
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from scripts.common import agent_toml, parser, quantile, report_bounds, running, script, wait_started
from scripts.fetch_demo_model import default_folder
from scripts.seaweed import free_port

BUILD = Path("build/bench-dispatch")
SECRET = "the secret of the bench's rack, 81d3e07b52"
RIVAL_KEY = "sk-" + "0123456789abcdef" * 4
"""LiteLLM does not start without a key."""
BUSY = 0.6
CONNECTIONS = 32
ROUND_S = 3.0
RATE_PER_S = 50
STREAMS = 16
WORDS = 400
LITELLM = "litellm[proxy]==1.106.2"

MINIMAL = r"""
import sys
import aiohttp
from aiohttp import web

async def proxy(request):
    body = await request.read()
    async with request.app["session"].post(sys.argv[2] + request.path, data=body,
                                            headers={"Content-Type": "application/json"}) as answer:
        if answer.content_type != "text/event-stream":
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        return response

async def session(app):
    app["session"] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    yield
    await app["session"].close()

app = web.Application()
app.cleanup_ctx.append(session)
app.router.add_post("/v1/chat/completions", proxy)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
"""


class Program(NamedTuple):
    """A server of chat completions on a loopback port."""

    name: str
    port: int
    key: str = ""
    ca: str = ""


class Answers(NamedTuple):
    """One round: answers per second, and the latency of each in seconds."""

    per_s: float
    times: list[float]


# ---- clients ----


class _Client(asyncio.Protocol):
    """One connection with just enough HTTP to keep a server busy; a client library would dominate the measurement."""

    def __init__(self, request: bytes, done: Callable[[float, bytes], bytes | None]) -> None:
        self._request, self._done = request, done
        self._buffer, self._began = b"", 0.0
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.send(self._request)

    def send(self, request: bytes) -> None:
        self._began = time.perf_counter()
        assert self._transport is not None
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := _end_of(self._buffer)) is not None:
            status, rest = int(self._buffer[9:12]), self._buffer[end:]
            if status != 200:
                raise SystemExit(f"answered {self._buffer[:600]!r}")
            whole, self._buffer = self._buffer[:end], rest
            again = self._done(time.perf_counter() - self._began, whole)
            if again is None:
                assert self._transport is not None
                self._transport.close()
                return
            self.send(again)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def _end_of(buffer: bytes) -> int | None:
    """Where the first answer ends; None while it is incomplete."""
    head = buffer.find(b"\r\n\r\n")
    if head < 0:
        return None
    lines = buffer[:head].lower()
    at = lines.find(b"content-length:")
    if at >= 0:
        length = int(lines[at + 15 :].split(b"\r\n", 1)[0])
        return head + 4 + length if len(buffer) >= head + 4 + length else None
    end = buffer.find(b"0\r\n\r\n", head + 4)
    # only the last chunk has size 0; a "0" inside an event is followed by the end of its own line
    while end >= 0 and buffer[end - 2 : end] != b"\r\n":
        end = buffer.find(b"0\r\n\r\n", end + 1)
    return end + 5 if end >= 0 else None


def request_bytes(program: Program, *, stream: bool = False, words: int = 16) -> bytes:
    """A chat completion as HTTP on the wire."""
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. " * 20},
            {"role": "user", "content": "What is a rack? " * 8},
        ],
        "max_tokens": words,
        "stream": stream,
    }
    raw = json.dumps(body).encode()
    key = f"Authorization: Bearer {program.key}\r\n" if program.key else ""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{program.port}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


async def closed_loop(program: Program, seconds: float, connections: int = CONNECTIONS) -> Answers:
    """Closed loop: each connection sends its next request when the last one is answered."""
    request, times, until = request_bytes(program), [], time.perf_counter() + seconds

    def done(took: float, _: bytes) -> bytes | None:
        times.append(took)
        return request if time.perf_counter() < until else None

    began = time.perf_counter()
    await _connected(program, [request] * connections, done)
    return Answers(len(times) / (time.perf_counter() - began), times)


async def open_loop(program: Program, seconds: float, per_s: float) -> Answers:
    """Open loop: Poisson arrivals, independent of the answers."""
    rng, tasks, times = random.Random(7), [], []
    request = request_bytes(program)

    def done(took: float, _: bytes) -> bytes | None:
        times.append(took)
        return None

    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        tasks.append(asyncio.create_task(_connected(program, [request], done)))
        await asyncio.sleep(rng.expovariate(per_s))
    await asyncio.gather(*tasks)
    return Answers(len(times) / seconds, times)


async def streams(program: Program, count: int, words: int) -> Answers:
    """Events per second of concurrent streams."""
    events, produced = list[int](), list[int]()

    def done(_: float, answer: bytes) -> bytes | None:
        events.append(answer.count(b"data: "))
        produced.append(answer.count(b"word "))
        return None

    began = time.perf_counter()
    await _connected(program, [request_bytes(program, stream=True, words=words)] * count, done)
    took = time.perf_counter() - began
    # a gateway that lags behind its worker sends several tokens in one event
    assert sum(produced) >= count * words, "a stream was truncated"
    return Answers(sum(events) / took, [took])


async def _connected(program: Program, requests: list[bytes], done: Callable[[float, bytes], bytes | None]) -> None:
    loop = asyncio.get_running_loop()
    tls = ssl.create_default_context(cafile=program.ca) if program.ca else None
    clients = []
    for request in requests:
        make = partial(_Client, request, done)
        _, client = await loop.create_connection(make, "127.0.0.1", program.port, ssl=tls)
        clients.append(client.closed)
    await asyncio.gather(*clients)


# ---- servers ----


def litellm_config(folder: Path, backend: int) -> Path:
    """LiteLLM's proxy with one model."""
    path = folder / "litellm.yaml"
    path.write_text(
        "model_list:\n  - model_name: m\n    litellm_params:\n      model: openai/m\n"
        f"      api_base: http://127.0.0.1:{backend}/v1\n      api_key: none\n"
        "litellm_settings:\n  telemetry: false\n"
    )
    return path


def issue_certificates(folder: Path) -> None:
    """A CA, and certificates of the gateway and the mock."""
    shutil.rmtree(folder, ignore_errors=True)
    for verb in (["init"], ["issue", "gateway", "--ip", "127.0.0.1"], ["issue", "mock"]):
        command = [script("mlxrack-agent"), "tls", *verb, "--rack", "r", "--folder", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def litellm_program(folder: Path) -> str | None:
    """Its program in its own virtual environment, installed once; None when the installation fails."""
    venv = folder / "bench-litellm"
    program = venv / "bin" / "litellm"
    if not program.exists():
        print(f"installing {LITELLM} into {venv.name}, once", file=sys.stderr)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", LITELLM]
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False).returncode == 0
        if not made or subprocess.run(pip, check=False).returncode != 0:
            return None
    return str(program)


@contextlib.contextmanager
def programs(build: Path, *, with_litellm: bool, gap_s: float = 0.0) -> Iterator[list[Program]]:
    """The backend and the proxies in front of it."""
    build.mkdir(parents=True, exist_ok=True)
    found: list[Program] = []
    with contextlib.ExitStack() as stack:

        def start(program: Program, command: list[str], limit_s: float = 90.0, **environ: str) -> None:
            log = build / f"{program.name}.log"
            process = stack.enter_context(running(command, log, environ))
            wait_started(lambda: asyncio.run(closed_loop(program, 0.01, 1)), process, log, limit_s)
            found.append(program)

        backend, minimal, agent = (Program(name, free_port()) for name in ("direct", "minimal", "agent"))
        url = f"http://127.0.0.1:{backend.port}"
        secured, tls_port, folder = (
            Program("tls", free_port(), ca=str(build / "tls/ca.pem")),
            free_port(),
            build / "tls",
        )
        issue_certificates(folder)
        mock = [sys.executable, "-m", "scripts.mock_worker", "--port", str(backend.port), "--secret", SECRET]
        mock += ["--tls", str(folder / "mock"), "--tls-port", str(tls_port)]
        start(backend, [*mock, "--words", "100000", "--gap-s", str(gap_s)])
        start(minimal, [sys.executable, "-c", MINIMAL, str(minimal.port), url])
        peers = f'[peers]\nsecret = "env:BENCH_SECRET"\n[[peers.nodes]]\nid = "mock"\nurl = "{url}"\n'
        limits = "[limits]\nin_flight_per_model = 512\nin_flight_per_key = 512\n"
        config = agent_toml(build / "agent", "gateway", "r", limits + peers, port=agent.port)
        start(agent, [script("mlxrack-agent"), "run", "--config", str(config)], BENCH_SECRET=SECRET)
        files = {"certificate": "gateway.pem", "key": "gateway.key", "ca": "ca.pem"}
        tls = "[tls]\n" + "".join(
            f"{name} = {json.dumps(str((folder / one).resolve()))}\n" for name, one in files.items()
        )
        peers = peers.replace(url, f"https://127.0.0.1:{tls_port}") + tls
        config = agent_toml(build / "agent-tls", "gateway", "r", limits + peers, port=secured.port)
        start(secured, [script("mlxrack-agent"), "run", "--config", str(config)], BENCH_SECRET=SECRET)
        if with_litellm and (program := litellm_program(default_folder().parent)):
            rival = Program("litellm", free_port(), key=RIVAL_KEY)
            config = litellm_config(build, backend.port)
            command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(rival.port)]
            quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": RIVAL_KEY}
            start(rival, command, 180.0, **quiet)
        yield found


# ---- report ----


def interleaved(found: list[Program], rounds: int, once: Callable[[Program], Answers]) -> dict[str, list[Answers]]:
    """Each program once per round, in random order."""
    rng = random.Random(3)
    results: dict[str, list[Answers]] = {program.name: [] for program in found}
    for _ in range(rounds):
        for program in rng.sample(found, len(found)):
            results[program.name].append(once(program))
    return results


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):>8.1f}  ({min(values):.1f} to {max(values):.1f})"


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when a bound is missed."""
    words = parser(__doc__)
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--no-litellm", action="store_true")
    words.add_argument("--anyway", action="store_true", help="also measure on a busy machine")
    args = words.parse_args(argv)
    busy = psutil.cpu_percent(1.0) / 100
    if busy > BUSY and not args.anyway:
        print(f"bench: CPU is {busy:.0%} busy (at most {BUSY:.0%}); retry on an idle machine or pass --anyway")
        return 2
    with programs(BUILD, with_litellm=not args.no_litellm) as found:
        return 0 if report(found, args.rounds, with_litellm=not args.no_litellm) else 1


def report(found: list[Program], rounds: int, *, with_litellm: bool) -> bool:
    """All measurements and ratios."""
    medians: dict[str, float] = {}
    print(f"requests per second, {CONNECTIONS} connections, {rounds} interleaved rounds of {ROUND_S:g} s")
    for name, answers in interleaved(found, rounds, lambda p: asyncio.run(closed_loop(p, ROUND_S))).items():
        print(f"  {name:<8} {spread([one.per_s for one in answers])}")
        medians[name] = statistics.median([one.per_s for one in answers])
    direct: dict[float, float] = {}
    added: dict[float, float] = {}
    print(f"latency in ms at {RATE_PER_S} requests per second, {rounds} interleaved rounds of {ROUND_S:g} s")
    for name, answers in interleaved(found, rounds, lambda p: asyncio.run(open_loop(p, ROUND_S, RATE_PER_S))).items():
        times = [took * 1000 for one in answers for took in one.times]
        for share in (0.5, 0.99):
            if name == "direct":
                direct[share] = quantile(times, share)
            if name == "agent":
                added[share] = quantile(times, share) - direct[share]
        more = "  ".join(f"p{share * 100:.0f} {quantile(times, share):.2f}" for share in (0.5, 0.99))
        print(f"  {name:<8} {more}  added p50 {quantile(times, 0.5) - direct[0.5]:.2f}")
    chunks: dict[str, float] = {}
    print(f"events per second, {STREAMS} streams of {WORDS} words, {rounds} interleaved rounds")
    fast = [one for one in found if one.name != "litellm"]
    for name, answers in interleaved(fast, rounds, lambda p: asyncio.run(streams(p, STREAMS, WORDS))).items():
        print(f"  {name:<8} {spread([one.per_s for one in answers])}")
        chunks[name] = statistics.median([one.per_s for one in answers])
    return verdict(medians, added, chunks, with_litellm=with_litellm)


def verdict(
    medians: dict[str, float], added: dict[float, float], chunks: dict[str, float], *, with_litellm: bool
) -> bool:
    """Each bound, and whether it is met."""
    bounds: list[tuple[str, float, float, bool]] = [
        ("requests per second, agent / minimal proxy", medians["agent"] / medians["minimal"], 0.4, True),
        ("added p50, ms", added[0.5], 2.0, False),
        ("added p99, ms", added[0.99], 8.0, False),
        ("events per second", chunks["agent"], 8000.0, True),
    ]
    if "litellm" in medians:
        bounds.append(("requests per second, agent / LiteLLM", medians["agent"] / medians["litellm"], 15.0, True))
    for name, those in (("requests", medians), ("events", chunks)):
        print(f"{name} per second with TLS on / off: {those['tls'] / those['agent']:.2f}")
    lines = [] if "litellm" in medians or not with_litellm else [(False, "LiteLLM not installed; see --no-litellm")]
    for name, value, bound, at_least in bounds:
        line = f"{name}: {value:.2f} ({'at least' if at_least else 'at most'} {bound:g})"
        lines.append((value >= bound if at_least else value <= bound, line))
    return report_bounds(lines)


if __name__ == "__main__":
    sys.exit(main())
