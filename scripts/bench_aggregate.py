"""How long the aggregator takes, on a real S3 server on this machine: a month rolled up at first, a day's increment, a
day of single objects, the monthly numbers, and how it grows with the rack.

    python -m scripts.bench_aggregate [--nodes 8] [--days 30] [--growth 8,16,32,64]

Telemetry is made up (tests/made_rack.py) and goes through the real batches and segments. Every figure is of
`mlxrack-aggregator` as cron would start it. Exits 1 when a bound is passed.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.seaweed import SeaweedFS
from shared import keys
from shared.batch import Batch, seal
from shared.ids import NodeId
from shared.store_s3 import S3Store
from tests.made_rack import HOUR_MS, MadeModel, MadeRack, batches

SINCE_MS = 1_793_491_200_000
"""2026-11-01 00:00 UTC."""
DAY_MS = 24 * HOUR_MS
SEGMENT = 5
FIRST_S, DAY_S, SINGLE_S, MONTH_S, MONTH_RSS = 240.0, 30.0, 30.0, 5.0, 500_000_000
LINEAR = 1.15
"""Growth is called linear when a node costs at most this many times what it costs in the smallest rack."""
BUCKET = "bench"


class Timed(NamedTuple):
    """A command's seconds, highest resident bytes of its largest process, and what it printed."""

    seconds: float
    rss: int
    out: str


def rack(nodes: int) -> MadeRack:
    """Four models on every node, with everything that happens to real ones."""
    models = tuple(
        MadeModel(name=name, per_hour=40.0 * nodes, prompt_tok=size)
        for name, size in (("chat", 900.0), ("code", 2600.0), ("extract", 400.0), ("long", 9000.0))
    )
    ids = tuple(f"n{n:02d}" for n in range(1, nodes + 1))
    return MadeRack(seed=7, rack="bench", nodes=ids, models=models, since_ms=SINCE_MS, faults=0.5)


def store(endpoint: str, bucket: str) -> S3Store:
    """A client."""
    access_key, secret_key = SeaweedFS.ADMIN
    return S3Store(endpoint=endpoint, bucket=bucket, access_key=access_key, secret_key=secret_key)


def segments(made: Iterator[Batch], size: int) -> Iterator[tuple[str, bytes]]:
    """Batches as a node would upload them."""
    group: list[Batch] = []
    for one in made:
        if group and (len(group) == size or one.epoch != group[0].epoch):
            yield _segment(group)
            group = []
        group.append(one)
    if group:
        yield _segment(group)


def _segment(group: Sequence[Batch]) -> tuple[str, bytes]:
    first, last = group[0], group[-1]
    key = keys.RawKey(NodeId(first.node), first.incarnation, first.epoch, first.seq, last.seq)
    return keys.batch_key(key), seal(group)


def upload(job: tuple[str, str, int, str, int, int, int]) -> int:
    """One node's telemetry between two moments; returns the number of segments."""
    endpoint, bucket, nodes, node, since_ms, until_ms, size = job
    target, count = store(endpoint, bucket), 0
    made = (one for one in batches(rack(nodes), node, until_ms) if one.t_end_ms > since_ms)
    for key, body in segments(made, size):
        target.put(key, body)
        count += 1
    return count


def filled(endpoint: str, bucket: str, nodes: int, since_ms: int, until_ms: int, size: int) -> int:
    """All nodes' telemetry, by two processes."""
    made = rack(nodes)
    jobs = [(endpoint, bucket, nodes, node, since_ms, until_ms, size) for node in made.nodes]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sum(pool.map(upload, jobs, chunksize=1))


def configured(folder: Path, endpoint: str, bucket: str, nodes: int) -> Path:
    """aggregator.toml for a bucket."""
    for name, secret in zip(("access", "secret"), SeaweedFS.ADMIN, strict=True):
        (folder / name).write_text(secret)
        (folder / name).chmod(0o600)
    path = folder / f"{bucket}.toml"
    priced = "".join(f'[[nodes]]\nid = "{node}"\nprice = 1999\n' for node in rack(nodes).nodes)
    path.write_text(
        f'rack = "bench"\n[store]\nkind = "s3"\nendpoint = "{endpoint}"\nbucket = "{bucket}"\n'
        f"access_key = {json.dumps(f'file:{folder}/access')}\nsecret_key = {json.dumps(f'file:{folder}/secret')}\n"
        f'{priced}[[compare]]\nmodel = "chat"\nsame_as = "llama-3.1-8b-instruct"\nfrontier = "openai/gpt-4o"\n'
    )
    return path


def timed(config: Path, *words: str) -> Timed:
    """Run the aggregator."""
    program = Path(sys.executable).with_name("mlxrack-aggregator")
    began = time.monotonic()
    done = subprocess.run(
        ["/usr/bin/env", str(program), *words, "--config", str(config), "--json"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    scale = 1 if sys.platform == "darwin" else 1024
    return Timed(seconds, after.ru_maxrss * scale, done.stdout)


def month(folder: Path, endpoint: str, nodes: int, days: int) -> list[tuple[bool, str]]:
    """First rollup, an increment, the numbers."""
    server = store(endpoint, BUCKET)
    server.create_bucket()
    config = configured(folder, endpoint, BUCKET, nodes)
    until = SINCE_MS + days * DAY_MS
    count = filled(endpoint, BUCKET, nodes, SINCE_MS, until - DAY_MS, SEGMENT)
    print(f"  {count:,} segments of {SEGMENT} minutes uploaded ({nodes} nodes, {days - 1} days)", flush=True)
    first = timed(config, "rollup")
    made = json.loads(first.out)
    share = (days - 1) / days
    print(f"  first rollup: {first.seconds:.0f} s, {made['batches']:,} batches", flush=True)
    more = filled(endpoint, BUCKET, nodes, until - DAY_MS, until, SEGMENT)
    day = timed(config, "rollup")
    batches_now = json.loads(day.out)["batches"]
    whole_s = first.seconds + day.seconds
    numbers = measured_month(config)
    tables = {prefix: _size(server, prefix) for prefix in keys.TABLE_PREFIXES}
    sizes = ", ".join(
        f"{prefix.split('/')[0]} {count} files {size / 1e6:.1f} MB" for prefix, (count, size) in tables.items()
    )
    print(f"  tables: {sizes}", flush=True)
    return [
        (
            whole_s <= FIRST_S,
            (
                f"a month of {nodes} nodes ({count + more:,} segments, {batches_now:,} batches) rolled up from raw: "
                f"{whole_s:.0f} s (at most {FIRST_S:.0f}), of which the last day, as an increment, {day.seconds:.1f}; "
                f"the share of the first {share:.0%} in one run was {first.seconds:.0f} s"
            ),
        ),
        (day.seconds <= DAY_S, f"a day's increment: {day.seconds:.1f} s (at most {DAY_S:.0f})"),
        (numbers.seconds <= MONTH_S, f"the monthly numbers: {numbers.seconds:.2f} s (at most {MONTH_S:.0f})"),
        (numbers.rss <= MONTH_RSS, f"in at most {numbers.rss / 1e6:.0f} MB ({MONTH_RSS / 1e6:.0f})"),
    ]


def measured_month(config: Path) -> Timed:
    """The month's report from the tables, in a process of its own, so that its memory is its own."""
    code = (
        "import json,os,resource,sys,time\n"
        "began=time.monotonic()\n"
        "from pathlib import Path\n"
        "from aggregator import config as c, load\n"
        "from aggregator.report.contents import compose\n"
        "from aggregator.window import month\n"
        "from shared import config as s\n"
        "from shared.store_open import open_store\n"
        "config=s.load(Path(sys.argv[1]),c.AggregatorConfig,c.check)\n"
        "window=load.window(open_store(config.store,os.environ),month('2026-11','UTC'))\n"
        "report=compose(window,config,window.span.until_ms)\n"
        "rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([time.monotonic()-began,rss,report.volume.requests]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config)], check=True, capture_output=True, text=True)
    seconds, rss, requests = json.loads(done.stdout.splitlines()[-1])
    return Timed(seconds, rss * (1 if sys.platform == "darwin" else 1024), str(requests))


def _size(server: S3Store, prefix: str) -> tuple[int, int]:
    from shared.store import list_all

    listed = list_all(server, prefix)
    return len(listed), sum(one.size for one in listed)


def single(folder: Path, endpoint: str, nodes: int) -> list[tuple[bool, str]]:
    """A day in which every minute is an object."""
    store(endpoint, "single").create_bucket()
    config = configured(folder, endpoint, "single", nodes)
    count = filled(endpoint, "single", nodes, SINCE_MS, SINCE_MS + DAY_MS, 1)
    done = timed(config, "rollup")
    return [
        (done.seconds <= SINGLE_S, f"a day of {count:,} single objects: {done.seconds:.1f} s (at most {SINGLE_S:.0f})")
    ]


def growth(folder: Path, endpoint: str, sizes: Sequence[int]) -> list[tuple[bool, str]]:
    """One day of racks of several sizes."""
    found: list[tuple[int, int, float]] = []
    for nodes in sizes:
        bucket = f"grow{nodes}"
        store(endpoint, bucket).create_bucket()
        config = configured(folder, endpoint, bucket, nodes)
        count = filled(endpoint, bucket, nodes, SINCE_MS, SINCE_MS + DAY_MS, SEGMENT)
        done = timed(config, "rollup")
        found.append((nodes, count, done.seconds))
        each = done.seconds / nodes
        print(
            f"  {nodes:3d} nodes, one day: {count:6,} segments, {done.seconds:6.1f} s, {each:.2f} s a node", flush=True
        )
    base = found[0][2] / found[0][0]
    worst = max(seconds / nodes / base for nodes, _, seconds in found)
    text = ", ".join(f"{nodes}: {seconds:.1f} s" for nodes, _, seconds in found)
    return [(worst <= LINEAR, f"growth ({text}): a node costs at most {worst:.2f} x what it costs among {found[0][0]}")]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--growth", default="8,16,32,64", help="sizes of racks, one day each (default: %(default)s)")
    parser.add_argument("--only", choices=("month", "single", "growth"), default=None)
    args = parser.parse_args()
    if os.getloadavg()[0] > 0.7:
        print("this machine is busy; the figures will say little", file=sys.stderr)
    lines: list[tuple[bool, str]] = []
    with tempfile.TemporaryDirectory(prefix="mlxrack-bench-") as name:
        folder = Path(name)
        with SeaweedFS(folder / "store") as server:
            if args.only in (None, "month"):
                lines += month(folder, server.endpoint, args.nodes, args.days)
            if args.only in (None, "single"):
                lines += single(folder, server.endpoint, args.nodes)
            if args.only in (None, "growth"):
                lines += growth(folder, server.endpoint, [int(n) for n in args.growth.split(",")])
    for ok, line in lines:
        print(f"{'ok  ' if ok else 'MISS'} {line}")
    return 0 if all(ok for ok, _ in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
