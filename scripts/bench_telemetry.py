"""What telemetry costs a node: a core and memory at rest, tokens a second under load, bytes of a batch, and what a
day's backlog that is sent at last does to answers that are being given.

    python -m scripts.bench_telemetry [--rest 130] [--rounds 8]

At rest an agent is as it is delivered (a look at the sensors every 2 s, a window every 60 s). Under load one that
closes and sends its windows fifteen times as often, so that each round has some, stands beside one that looks and tells
as seldom as the configuration lets it: the same streams at both in turn, and the other one stopped meanwhile. Exits 1
when a bound is passed.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path

import aiohttp
import psutil

from agent.telemetry.sensors.host import hardware_id
from agent.telemetry.spool import Spool
from scripts.fetch_demo_model import MAIN, default_folder
from scripts.seaweed import SeaweedFS, free_port
from shared.batch import Batch, unseal
from shared.records import HostSample, Served

MOST_CORE, MOST_RSS, MOST_LOSS, MOST_BATCH, MOST_SLOWER = 0.01, 95_000_000, 0.02, 4 << 10, 0.05
HOURS, SETTLED_H, MOST_GROWTH = 24, 2, 1_000_000
"""A simulated day; from this hour on the daemon may not grow by more."""
DAYS, QUIET_S = 4, 12.0
"""Backlog to be sent, in days of minutes; how long to look before and after."""
STREAMS, TOKENS, ROUND_S = 4, 64, 8.0
OFTEN = "[telemetry]\nsample_s = 60\nupload_s = 60\npoll_s = 2\n"
HURRIED = "[telemetry]\nsample_s = 4\nupload_s = 4\npoll_s = 2\n"
MANUAL = "[telemetry]\nsample_s = 3600\nupload_s = 3600\npoll_s = 2\nspool_days = 3650\n"
SELDOM = "[telemetry]\nsample_s = 86400\nupload_s = 86400\npoll_s = 5\n"


class Agent:
    """One agent process in a folder of its own."""

    def __init__(self, folder: Path, models: str, telemetry: str, store: str = "") -> None:
        self.folder = folder
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        store = store or f'[store]\nkind = "directory"\npath = {json.dumps(str(folder / "bucket"))}\n'
        self._config = folder / "agent.toml"
        self._config.write_text(
            f'[node]\nid = "n1"\nrack = "bench"\n[listen]\nport = {self.port}\n'
            f"[paths]\nstate = {json.dumps(str(folder / 'state'))}\n{store}{telemetry}{models}"
        )
        program = Path(sys.executable).with_name("mlxrack-agent")
        self.process = subprocess.Popen(
            [program, "run", "--config", self._config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    async def ready(self) -> None:
        """Until it serves everything it has."""
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://127.0.0.1:{self.port}/ready") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.1)

    async def drain(self) -> None:
        """Have it send everything that waits."""
        token = (self.folder / "state" / "admin.token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(f"http://127.0.0.1:{self.port}/admin/v1/seal", json={}) as answer:
                sent = (await answer.json())["sent"]
            if sent < DAYS * 24 * 60:
                raise SystemExit(f"only {sent} batches were sent")

    def cpu_s(self) -> float:
        """What the daemon has used so far; its loaders are the engine's business."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss(self) -> int:
        """Resident bytes of the daemon."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It takes no time from who is measured."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def agents(*them: Agent) -> Iterator[None]:
    """Ends them whatever happens."""
    try:
        yield
    finally:
        for one in them:
            one.close()


def fake(name: str) -> str:
    """A model without weights."""
    return f'[[models]]\nname = "{name}"\nengine = "fake"\npath = "weights of {name}"\nneed_bytes = 10\n'


async def stream(session: aiohttp.ClientSession, port: int, model: str, number: int, tokens: int = TOKENS) -> int:
    """Tokens of one answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"tell me about {number}"}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
        return int((await answer.json())["usage"]["completion_tokens"])


async def rate(port: int, model: str, seconds: float) -> float:
    """Tokens a second of a few streams, each beginning anew when it ends."""
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
    """Share of a core and resident bytes of a daemon with a model that nobody asks and an S3 store."""
    with SeaweedFS(folder / "store") as server:
        server.store("bench").create_bucket()
        agent = Agent(folder / "n", fake("m"), OFTEN, s3(server, folder))
        with agents(agent):
            await agent.ready()
            await asyncio.sleep(5)
            before, began = agent.cpu_s(), time.monotonic()
            await asyncio.sleep(seconds)
            return (agent.cpu_s() - before) / (time.monotonic() - began), agent.rss()


def s3(server: SeaweedFS, folder: Path) -> str:
    """The store's table for a real S3 server."""
    for name, secret in zip(("access", "secret"), SeaweedFS.ADMIN, strict=True):
        (folder / name).write_text(secret)
        (folder / name).chmod(0o600)
    keys = "".join(f"{name}_key = {json.dumps(f'file:{folder / name}')}\n" for name in ("access", "secret"))
    return f'[store]\nkind = "s3"\nendpoint = "{server.endpoint}"\nbucket = "bench"\n{keys}'


def over_a_day(folder: Path) -> list[int]:
    """Resident bytes of a daemon with an S3 store at its start and after each hour of a simulated day."""
    with SeaweedFS(folder / "store") as server:
        server.store("bench").create_bucket()
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "agent.toml"
        config.write_text(
            f'[node]\nid = "n1"\nrack = "bench"\n[listen]\nport = {free_port()}\n'
            f"[paths]\nstate = {json.dumps(str(folder / 'state'))}\n{s3(server, folder)}{MANUAL}{fake('m')}"
        )
        command = [sys.executable, "-m", "scripts.hurried_day", "--config", str(config), "--hours", str(HOURS)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    rss: list[int] = json.loads(found.stdout.splitlines()[-1])
    print("  a simulated day, MB after each hour:", " ".join(f"{one / 1e6:.1f}" for one in rss), flush=True)
    return rss


async def under_load(folder: Path, rounds: int) -> tuple[float, float]:
    """Medians of tokens a second, with telemetry and with next to none."""
    path = default_folder() / MAIN
    model = f'[[models]]\nname = "m"\npath = {json.dumps(str(path))}\nrows = {STREAMS}\n'
    often, seldom = Agent(folder / "often", model, HURRIED), Agent(folder / "seldom", model, SELDOM)
    with agents(often, seldom):
        await asyncio.gather(often.ready(), seldom.ready())
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
    agent = Agent(folder, "".join(fake(name) for name in names), OFTEN.replace("60", "5"))
    with agents(agent):
        await agent.ready()
        async with aiohttp.ClientSession() as session:
            began = time.monotonic()
            while time.monotonic() - began < 16:
                asks = (stream(session, agent.port, name, n, 3 + n) for n, name in enumerate(names * 3))
                await asyncio.gather(*asks)
    segments = [path for path in (folder / "bucket").rglob("*") if path.is_file() and "raw" in path.parts]
    found = []
    for path in segments:
        with contextlib.suppress(Exception):
            batches = unseal(path.read_bytes())
            if len(batches) == 1:
                found.append((path.stat().st_size, len(batches[0].records)))
    return max(found)


def fill(folder: Path) -> None:
    """A day of minutes in each of several epochs, as an agent would have left them."""
    served = [Served(model=name, requests=7, prompt_tok=900, completion_tok=400) for name in ("chat", "code")]
    host = HostSample(cpu_ppm=250_000, memory_used_bytes=8 << 30, package_temp_mc=61_000, system_power_mw=21_000)
    for _ in range(DAYS):
        hardware = hardware_id()
        spool = Spool(folder, node="n1", rack="bench", hardware=hardware, max_bytes=1 << 30, max_batches=10**6)
        for minute in range(1, 24 * 60 + 1):
            spool.append(
                Batch(
                    rack="bench",
                    node="n1",
                    epoch=spool.epoch,
                    seq=minute,
                    t_start_ms=60_000 * (minute - 1),
                    t_end_ms=60_000 * minute,
                    records=(*served, host),
                )
            )
        spool.close(clean=True)


async def gaps(port: int, until: asyncio.Event) -> list[float]:
    """Seconds between the words of streams that run until then."""
    found: list[float] = []
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4000, "stream": True}

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
    """The p95 gap in seconds: while a backlog goes out, and without."""
    fill(folder / "n" / "state" / "spool")
    with SeaweedFS(folder / "store") as server:
        server.store("bench").create_bucket()
        agent = Agent(folder / "n", fake("m") + "fake_step_s = 0.01\n", MANUAL, s3(server, folder))
        with agents(agent):
            await agent.ready()
            before = await p95(agent.port, asyncio.sleep(QUIET_S))
            began = time.monotonic()
            during = await p95(agent.port, agent.drain())
            took_s = time.monotonic() - began
            after = await p95(agent.port, asyncio.sleep(QUIET_S))
    print(
        f"  {DAYS} days in {took_s:.0f} s; p95 gap {before * 1000:.2f} ms before, {during * 1000:.2f} ms while they go "
        f"out, {after * 1000:.2f} ms after"
    )
    return during, (before + after) / 2


async def p95(port: int, meanwhile: Awaitable[object]) -> float:
    """The p95 gap of streams that run while something else does."""
    over = asyncio.Event()
    streams = asyncio.create_task(gaps(port, over))
    await meanwhile
    over.set()
    return statistics.quantiles(await streams, n=20)[-1]


async def measured(folder: Path, rest_s: float, rounds: int) -> bool:
    """Print everything; whether all bounds hold."""
    core, rss = await at_rest(folder / "rest", rest_s)
    day = over_a_day(folder / "day")
    grown = day[-1] - day[SETTLED_H]
    over = f"at most {max(day) / 1e6:.1f} MB, {grown / 1e6:+.2f} MB from hour {SETTLED_H} on"
    size, records = await batch_bytes(folder / "batch")
    draining, quiet = await while_draining(folder / "drain")
    slower = draining / quiet - 1
    often, seldom = await under_load(folder / "load", rounds)
    loss = 1 - often / seldom
    lines = [
        (core <= MOST_CORE, f"a core at rest: {core:.2%} (at most {MOST_CORE:.0%})"),
        (rss <= MOST_RSS, f"resident at rest: {rss / 1e6:.1f} MB (at most {MOST_RSS / 1e6:.0f})"),
        (
            max(day) <= MOST_RSS and grown <= MOST_GROWTH,
            f"resident over {HOURS} simulated hours: {over} (at most {MOST_GROWTH / 1e6:.0f})",
        ),
        (size <= MOST_BATCH, f"a batch of four models, compressed: {size} bytes of {records} records ({MOST_BATCH})"),
        (
            loss <= MOST_LOSS,
            f"tokens/s: {often:.1f} with, {seldom:.1f} without; {loss:+.1%} lost (at most {MOST_LOSS:.0%})",
        ),
    ]
    lines.append((slower <= MOST_SLOWER, f"p95 gap while days go out: {slower:+.1%} (at most {MOST_SLOWER:.0%})"))
    for ok, line in lines:
        print(f"{'ok  ' if ok else 'MISS'} {line}")
    return all(ok for ok, _ in lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rest", type=float, default=130.0, help="seconds at rest (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    if os.getloadavg()[0] > 0.7:
        print("this machine is busy; the figures will say little", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="mlxrack-bench-") as folder:
        return 0 if asyncio.run(measured(Path(folder), args.rest, args.rounds)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
