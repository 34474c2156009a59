"""The cost of telemetry to a node: CPU and memory at rest, tokens per second under load, bytes of a batch, and the
effect on ITL of pushing a backlog of several days.

    python -m scripts.bench_telemetry [--rest 130] [--rounds 8]

At rest an agent runs with the default configuration (sensors polled every 2 s, a window every 60 s). Under load, an
agent that closes and pushes windows fifteen times as often, so that each round has some, is compared with one that
polls and pushes as rarely as the configuration allows: the same streams to both in turn, the other one stopped
meanwhile. Exits 1 when a bound is exceeded.
"""

import asyncio
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import psutil

from agent.telemetry.sensors.host import hardware_id
from agent.telemetry.spool import Spool
from scripts.common import agent_toml, chat, parser, report_bounds, running, script, wait_started, warn_if_busy
from scripts.fetch_demo_model import MAIN, default_folder
from scripts.seaweed import SeaweedFS, free_port
from shared.batch import Batch, unseal
from shared.records import HostSample, Served

MOST_CORE, MOST_RSS, MOST_LOSS, MOST_BATCH, MOST_SLOWER = 0.01, 95_000_000, 0.02, 4 << 10, 0.05
HOURS, SETTLED_H, MOST_GROWTH = 24, 2, 1_000_000
"""A simulated day; the hour from which growth is measured; its bound in bytes."""
DAYS, QUIET_S = 4, 12.0
"""Backlog to push, in days of minutes; how long to measure before and after."""
STREAMS, TOKENS, ROUND_S = 4, 64, 8.0
OFTEN = "[telemetry]\nsample_s = 60\nupload_s = 60\npoll_s = 2\n"
HURRIED = "[telemetry]\nsample_s = 4\nupload_s = 4\npoll_s = 2\n"
MANUAL = "[telemetry]\nsample_s = 3600\nupload_s = 3600\npoll_s = 2\nspool_days = 3650\n[loader]\ncalibrate = false\n"
SELDOM = "[telemetry]\nsample_s = 86400\nupload_s = 86400\npoll_s = 5\n[loader]\ncalibrate = false\n"


@dataclass(frozen=True)
class Agent:
    """A running agent."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    async def drain(self) -> None:
        """Push everything that is spooled."""
        token = (self.folder / "state" / "admin.token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(f"http://127.0.0.1:{self.port}/admin/v1/seal", json={}) as answer:
                sent = (await answer.json())["sent"]
            if sent < DAYS * 24 * 60:
                raise SystemExit(f"bench: {sent} batches were pushed; expected at least {DAYS * 24 * 60}")

    def cpu_s(self) -> float:
        """CPU time of the daemon so far, without its loaders."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss(self) -> int:
        """Resident bytes of the daemon."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP until the block ends, so that it takes no CPU from the measured one."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def agent(folder: Path, models: str, telemetry: str, store: str = "") -> AsyncIterator[Agent]:
    """An agent with a folder of its own, once it serves every model."""
    port = free_port()
    config = agent_toml(folder, "n1", "bench", telemetry + models, port=port, store=store)
    log, ready = folder / "agent.log", f"http://127.0.0.1:{port}/ready"
    with running([script("mlxrack-agent"), "run", "--config", str(config)], log) as process:
        await asyncio.to_thread(
            wait_started, lambda: urllib.request.urlopen(ready, timeout=10).close(), process, log, 120.0
        )
        yield Agent(folder, port, process)


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[str]:
    """A real S3 server; yields the [store] table."""
    with SeaweedFS(folder / "store") as server:
        server.store("bench").create_bucket()
        yield server.table(folder, "bench")


def fake(name: str) -> str:
    """A model of the fake engine."""
    return f'[[models]]\nname = "{name}"\nengine = "fake"\npath = "weights of {name}"\nneed_bytes = 10\n'


async def stream(session: aiohttp.ClientSession, port: int, model: str, number: int, tokens: int = TOKENS) -> int:
    """Completion tokens of one answer."""
    body = chat(model, f"tell me about {number}", tokens, temperature=0)
    async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
        return int((await answer.json())["usage"]["completion_tokens"])


async def rate(port: int, model: str, seconds: float) -> float:
    """Tokens per second of concurrent requests, each followed by another one."""
    made, began = 0, time.monotonic()

    async def worker(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal made
        while time.monotonic() - began < seconds:
            made += await stream(session, port, model, number)
            number += STREAMS

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(worker(session, number) for number in range(STREAMS)))
    return made / (time.monotonic() - began)


async def at_rest(folder: Path, seconds: float) -> tuple[float, int]:
    """Share of a core and resident bytes of a daemon with an idle model and an S3 store."""
    with s3_store(folder) as store:
        async with agent(folder / "n", fake("m"), OFTEN, store) as one:
            await asyncio.sleep(5)
            before, began = one.cpu_s(), time.monotonic()
            await asyncio.sleep(seconds)
            return (one.cpu_s() - before) / (time.monotonic() - began), one.rss()


def over_a_day(folder: Path) -> list[int]:
    """Resident bytes of a daemon with an S3 store at its start and after each hour of a simulated day."""
    with s3_store(folder) as store:
        config = agent_toml(folder, "n1", "bench", MANUAL + fake("m"), port=free_port(), store=store)
        command = [sys.executable, "-m", "scripts.hurried_day", "--config", str(config), "--hours", str(HOURS)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    rss: list[int] = json.loads(found.stdout.splitlines()[-1])
    print("  a simulated day, MB after each hour:", " ".join(f"{one / 1e6:.1f}" for one in rss), flush=True)
    return rss


async def under_load(folder: Path, rounds: int) -> tuple[float, float]:
    """Median tokens per second, with frequent and with minimal telemetry."""
    path = default_folder() / MAIN
    model = f'[[models]]\nname = "m"\npath = {json.dumps(str(path))}\nrows = {STREAMS}\n'
    async with agent(folder / "often", model, HURRIED) as often, agent(folder / "seldom", model, SELDOM) as seldom:
        for one in (often, seldom):
            await rate(one.port, "m", 2.0)
        found: dict[str, list[float]] = {"often": [], "seldom": []}
        for number in range(rounds):
            pair = [("often", often), ("seldom", seldom)]
            for (name, one), (_, other) in itertools.permutations(pair if number % 2 else pair[::-1]):
                with other.stopped():
                    found[name].append(await rate(one.port, "m", ROUND_S))
            print(f"  round {number + 1}: {found['often'][-1]:.1f} and {found['seldom'][-1]:.1f} tokens/s", flush=True)
    return statistics.median(found["often"]), statistics.median(found["seldom"])


async def batch_bytes(folder: Path) -> tuple[int, int]:
    """Compressed bytes and records of the largest single batch of four busy models."""
    names = ("chat", "code", "embed", "vision")
    async with (
        agent(folder, "".join(fake(name) for name in names), OFTEN.replace("60", "5")) as one,
        aiohttp.ClientSession() as session,
    ):
        began = time.monotonic()
        while time.monotonic() - began < 16:
            await asyncio.gather(*(stream(session, one.port, name, n, 3 + n) for n, name in enumerate(names * 3)))
    found = []
    for path in (one for one in (folder / "bucket").rglob("*") if one.is_file() and "raw" in one.parts):
        with contextlib.suppress(Exception):
            batches = unseal(path.read_bytes())
            if len(batches) == 1:
                found.append((path.stat().st_size, len(batches[0].records)))
    return max(found)


def fill(folder: Path) -> None:
    """Spool a day of one-minute batches in each of several epochs, as an agent does."""
    served = [Served(model=name, requests=7, prompt_tok=900, completion_tok=400) for name in ("chat", "code")]
    host = HostSample(cpu_ppm=250_000, memory_used_bytes=8 << 30, package_temp_mc=61_000, system_power_mw=21_000)
    for _ in range(DAYS):
        spool = Spool(folder, node="n1", rack="bench", hardware=hardware_id(), max_bytes=1 << 30, max_batches=10**6)
        for minute in range(1, 24 * 60 + 1):
            end_ms = 60_000 * minute
            window = Batch(
                rack="bench", node="n1", epoch=spool.epoch, seq=minute, t_start_ms=end_ms - 60_000, t_end_ms=end_ms
            )
            spool.append(msgspec.structs.replace(window, records=(*served, host)))
        spool.close(clean=True)


async def gaps(port: int, until: asyncio.Event) -> list[float]:
    """Seconds between the chunks of streams that run until ``until`` is set."""
    found: list[float] = []
    body = chat("m", "x", 4000, stream=True)

    async def one(session: aiohttp.ClientSession) -> None:
        async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
            last = 0.0
            async for _ in answer.content.iter_any():
                now = time.monotonic()
                if last:
                    found.append(now - last)
                last = now
                if until.is_set():
                    return

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session) for _ in range(STREAMS)))
    return found


async def while_draining(folder: Path) -> tuple[float, float]:
    """ITL, p95, in seconds: while a backlog is pushed, and without one."""
    fill(folder / "n" / "state" / "spool")
    with s3_store(folder) as store:
        async with agent(folder / "n", fake("m") + "fake_step_s = 0.01\n", MANUAL, store) as one:
            before = await p95(one.port, asyncio.sleep(QUIET_S))
            began = time.monotonic()
            during = await p95(one.port, one.drain())
            took_s = time.monotonic() - began
            after = await p95(one.port, asyncio.sleep(QUIET_S))
    shown = ", ".join(
        f"{s * 1000:.2f} ms {when}" for s, when in ((before, "before"), (during, "during"), (after, "after"))
    )
    print(f"  {DAYS} days pushed in {took_s:.0f} s; ITL, p95: {shown}")
    return during, (before + after) / 2


async def p95(port: int, meanwhile: Awaitable[object]) -> float:
    """ITL, p95, of streams that run until ``meanwhile`` is done."""
    over = asyncio.Event()
    streams = asyncio.create_task(gaps(port, over))
    await meanwhile
    over.set()
    return statistics.quantiles(await streams, n=20)[-1]


async def measured(folder: Path, rest_s: float, rounds: int) -> bool:
    """Measure and print everything; whether all bounds hold."""
    core, rss = await at_rest(folder / "rest", rest_s)
    day = over_a_day(folder / "day")
    grown = day[-1] - day[SETTLED_H]
    over = f"max {max(day) / 1e6:.1f} MB, {grown / 1e6:+.2f} from hour {SETTLED_H} on (at most {MOST_GROWTH / 1e6:.0f})"
    size, records = await batch_bytes(folder / "batch")
    draining, quiet = await while_draining(folder / "drain")
    slower = draining / quiet - 1
    often, seldom = await under_load(folder / "load", rounds)
    loss = 1 - often / seldom
    lines = [
        (core <= MOST_CORE, f"CPU at rest: {core:.2%} of a core (at most {MOST_CORE:.0%})"),
        (rss <= MOST_RSS, f"RSS at rest: {rss / 1e6:.1f} MB (at most {MOST_RSS / 1e6:.0f})"),
        (max(day) <= MOST_RSS and grown <= MOST_GROWTH, f"RSS over {HOURS} simulated hours: {over}"),
        (size <= MOST_BATCH, f"a batch of four models, compressed: {size} bytes of {records} records ({MOST_BATCH})"),
        (loss <= MOST_LOSS, f"tokens/s: {often:.1f} with, {seldom:.1f} without; {loss:+.1%} (at most {MOST_LOSS:.0%})"),
        (slower <= MOST_SLOWER, f"ITL, p95, while a backlog is pushed: {slower:+.1%} (at most {MOST_SLOWER:.0%})"),
    ]
    return report_bounds(lines)


def main() -> int:
    """The command line."""
    words = parser(__doc__)
    words.add_argument("--rest", type=float, default=130.0, help="seconds at rest (default: %(default)s)")
    words.add_argument("--rounds", type=int, default=8)
    args = words.parse_args()
    warn_if_busy()
    with tempfile.TemporaryDirectory(prefix="mlxrack-bench-") as folder:
        return 0 if asyncio.run(measured(Path(folder), args.rest, args.rounds)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
