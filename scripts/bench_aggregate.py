"""Run time of the aggregator against a real S3 server on this machine: the first rollup of a month, a day's increment,
a day of single-batch objects, the monthly report, and how run time grows with the number of nodes.

    python -m scripts.bench_aggregate [--nodes 8] [--days 30] [--growth 8,16,32,64]

Telemetry is synthetic (tests/made_rack.py), written as real batches and segments. Every figure is of
`mlxrack-aggregator` as cron starts it. Exits 1 when a bound is exceeded.
"""

import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common import parser, report_bounds, script, warn_if_busy
from scripts.seaweed import SeaweedFS
from shared import keys
from shared.batch import Batch, seal
from shared.ids import NodeId
from shared.store import list_all
from shared.store_s3 import S3Store
from tests.made_rack import HOUR_MS, MadeModel, MadeRack, batches, list_price

SINCE_MS = 1_793_491_200_000
"""2026-11-01 00:00 UTC."""
DAY_MS = 24 * HOUR_MS
SEGMENT = 5
FIRST_S, DAY_S, SINGLE_S, MONTH_S, MONTH_RSS = 240.0, 30.0, 30.0, 5.0, 500_000_000
LINEAR = 1.15
"""Growth counts as linear while a node takes at most this many times what it takes in the smallest rack."""
BUCKET = "bench"
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Timed(NamedTuple):
    """A command's run time, peak resident bytes of its largest process, and its output."""

    seconds: float
    rss: int
    out: str


def rack(nodes: int) -> MadeRack:
    """Four models on every node, with the faults of real ones."""
    models = tuple(
        MadeModel(name=name, per_hour=40.0 * nodes, prompt_tok=size)
        for name, size in (("chat", 900.0), ("code", 2600.0), ("extract", 400.0), ("long", 9000.0))
    )
    ids = tuple(f"n{n:02d}" for n in range(1, nodes + 1))
    return MadeRack(seed=7, rack="bench", nodes=ids, models=models, since_ms=SINCE_MS, faults=0.5)


def segments(made: Iterator[Batch], size: int) -> Iterator[tuple[str, bytes]]:
    """Keys and bodies of a node's segments, each at most ``size`` batches of one epoch."""
    for _, batches_of in itertools.groupby(made, lambda one: one.epoch):
        while group := list(itertools.islice(batches_of, size)):
            first, last = group[0], group[-1]
            key = keys.RawKey(NodeId(first.node), first.incarnation, first.epoch, first.seq, last.seq)
            yield keys.batch_key(key), seal(group)


def upload(job: tuple[str, str, int, str, int, int, int]) -> int:
    """Upload one node's telemetry between two times; returns the number of segments."""
    endpoint, bucket, nodes, node, since_ms, until_ms, size = job
    access_key, secret_key = SeaweedFS.ADMIN
    target = S3Store(endpoint=endpoint, bucket=bucket, access_key=access_key, secret_key=secret_key)
    count = 0
    made = (one for one in batches(rack(nodes), node, until_ms) if one.t_end_ms > since_ms)
    for key, body in segments(made, size):
        target.put(key, body)
        count += 1
    return count


def filled(server: SeaweedFS, bucket: str, nodes: int, since_ms: int, until_ms: int, size: int) -> int:
    """Upload all nodes' telemetry with two processes; returns the number of segments."""
    jobs = [(server.endpoint, bucket, nodes, node, since_ms, until_ms, size) for node in rack(nodes).nodes]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sum(pool.map(upload, jobs, chunksize=1))


def configured(folder: Path, server: SeaweedFS, bucket: str, nodes: int) -> Path:
    """aggregator.toml for a new bucket."""
    server.store(bucket).create_bucket()
    path = folder / f"{bucket}.toml"
    priced = "".join(f'[[nodes]]\nid = "{node}"\nprice = {list_price():g}\n' for node in rack(nodes).nodes)
    path.write_text(
        f'rack = "bench"\n{server.table(folder, bucket)}{priced}'
        f'[[compare]]\nmodel = "chat"\nsame_as = "llama-3.1-8b-instruct"\nfrontier = "openai/gpt-4o"\n'
    )
    return path


def timed(config: Path, *words: str) -> Timed:
    """Run the aggregator."""
    command = ["/usr/bin/env", script("mlxrack-aggregator"), *words, "--config", str(config), "--json"]
    began = time.monotonic()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Timed(seconds, after.ru_maxrss * RSS_UNIT, done.stdout)


def month(folder: Path, server: SeaweedFS, nodes: int, days: int) -> list[tuple[bool, str]]:
    """The first rollup, an increment and the monthly report."""
    config = configured(folder, server, BUCKET, nodes)
    until = SINCE_MS + days * DAY_MS
    count = filled(server, BUCKET, nodes, SINCE_MS, until - DAY_MS, SEGMENT)
    print(f"  {count:,} segments of {SEGMENT} minutes uploaded ({nodes} nodes, {days - 1} days)", flush=True)
    first = timed(config, "rollup")
    made = json.loads(first.out)
    share = (days - 1) / days
    print(f"  first rollup: {first.seconds:.0f} s, {made['batches']:,} batches", flush=True)
    more = filled(server, BUCKET, nodes, until - DAY_MS, until, SEGMENT)
    day = timed(config, "rollup")
    batches_now = json.loads(day.out)["batches"]
    whole_s = first.seconds + day.seconds
    numbers = measured_month(config)
    tables = {prefix: list_all(server.store(BUCKET), prefix) for prefix in keys.TABLE_PREFIXES}
    sizes = ", ".join(
        f"{prefix.split('/')[0]} {len(listed)} files {sum(one.size for one in listed) / 1e6:.1f} MB"
        for prefix, listed in tables.items()
    )
    print(f"  tables: {sizes}", flush=True)
    whole = (
        f"a month of {nodes} nodes ({count + more:,} segments, {batches_now:,} batches) rolled up from raw: "
        f"{whole_s:.0f} s (at most {FIRST_S:.0f}), of which the last day, as an increment, {day.seconds:.1f}; "
        f"the share of the first {share:.0%} in one run was {first.seconds:.0f} s"
    )
    return [
        (whole_s <= FIRST_S, whole),
        (day.seconds <= DAY_S, f"a day's increment: {day.seconds:.1f} s (at most {DAY_S:.0f})"),
        (numbers.seconds <= MONTH_S, f"the monthly report: {numbers.seconds:.2f} s (at most {MONTH_S:.0f})"),
        (numbers.rss <= MONTH_RSS, f"its peak RSS: {numbers.rss / 1e6:.0f} MB (at most {MONTH_RSS / 1e6:.0f})"),
    ]


def measured_month(config: Path) -> Timed:
    """The month's report from the tables, in a separate process, so that its RSS is measured alone."""
    code = (
        "import json,os,resource,sys,time\n"
        "began=time.monotonic()\n"
        "from pathlib import Path\n"
        "from aggregator import config as c, load\n"
        "from aggregator.judgements import judge\n"
        "from aggregator.calendar import month\n"
        "from shared import config as s\n"
        "from shared.store_open import open_store\n"
        "config=s.load(Path(sys.argv[1]),c.AggregatorConfig,c.check)\n"
        "window=load.window(open_store(config.store,os.environ),month('2026-11','UTC'))\n"
        "report=judge(window,None,config,window.span.until_ms)\n"
        "rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([time.monotonic()-began,rss,report.volume.requests]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config)], check=True, capture_output=True, text=True)
    seconds, rss, requests = json.loads(done.stdout.splitlines()[-1])
    return Timed(seconds, rss * RSS_UNIT, str(requests))


def single(folder: Path, server: SeaweedFS, nodes: int) -> list[tuple[bool, str]]:
    """A day in which every minute is an object of its own."""
    config = configured(folder, server, "single", nodes)
    count = filled(server, "single", nodes, SINCE_MS, SINCE_MS + DAY_MS, 1)
    done = timed(config, "rollup")
    return [
        (done.seconds <= SINGLE_S, f"a day of {count:,} single objects: {done.seconds:.1f} s (at most {SINGLE_S:.0f})")
    ]


def growth(folder: Path, server: SeaweedFS, sizes: Sequence[int]) -> list[tuple[bool, str]]:
    """One day of racks of several sizes."""
    found: list[tuple[int, int, float]] = []
    for nodes in sizes:
        bucket = f"grow{nodes}"
        config = configured(folder, server, bucket, nodes)
        count = filled(server, bucket, nodes, SINCE_MS, SINCE_MS + DAY_MS, SEGMENT)
        done = timed(config, "rollup")
        found.append((nodes, count, done.seconds))
        each = done.seconds / nodes
        print(
            f"  {nodes:3d} nodes, one day: {count:6,} segments, {done.seconds:6.1f} s, {each:.2f} s a node", flush=True
        )
    base = found[0][2] / found[0][0]
    worst = max(seconds / nodes / base for nodes, _, seconds in found)
    text = ", ".join(f"{nodes}: {seconds:.1f} s" for nodes, _, seconds in found)
    return [(worst <= LINEAR, f"growth ({text}): per node at most {worst:.2f} x the time in a rack of {found[0][0]}")]


def main() -> int:
    """The command line."""
    words = parser(__doc__)
    words.add_argument("--nodes", type=int, default=8)
    words.add_argument("--days", type=int, default=30)
    words.add_argument("--growth", default="8,16,32,64", help="rack sizes, one day each (default: %(default)s)")
    words.add_argument("--only", choices=("month", "single", "growth"), default=None)
    args = words.parse_args()
    warn_if_busy()
    lines: list[tuple[bool, str]] = []
    with tempfile.TemporaryDirectory(prefix="mlxrack-bench-") as name, SeaweedFS(Path(name, "store")) as server:
        folder = Path(name)
        if args.only in (None, "month"):
            lines += month(folder, server, args.nodes, args.days)
        if args.only in (None, "single"):
            lines += single(folder, server, args.nodes)
        if args.only in (None, "growth"):
            lines += growth(folder, server, [int(n) for n in args.growth.split(",")])
    return 0 if report_bounds(lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
