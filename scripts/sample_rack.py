"""``make sample-rack``: five weeks of a synthetic rack, rolled up and reported, to explore reports without a rack.

Writes build/sample/: the bucket as a directory, its aggregator.toml, and the newest artifacts in one folder.
"""

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from aggregator import cli
from scripts.bench_aggregate import segments
from scripts.common import parser
from shared.keys import MOST_REPORT_BYTES
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.made_models import CHAT, CODE, COMPARE, EXTRACT, LONG, TRANSLATE
from tests.made_rack import HOUR_MS, WEEK_MS, Change, MadeRack, Outage, batches, list_price

BUILD = Path("build/sample")
SINCE_MS = 1_788_134_400_000
"""2026-08-31 00:00 UTC, a Monday: September is whole, and over."""
WEEKS = 5
DAY_MS = 24 * HOUR_MS
_BUSY_MS = SINCE_MS + 15 * DAY_MS + 9 * HOUR_MS
"""An hour in which a batch of somebody's leaves no room for half of the requests for ``code``."""
NODES = ("mini-1", "mini-2", "mini-3", "mini-4")


def rack() -> MadeRack:
    """Four nodes and five models as people run them: an 8B for chat, a 32B for code, a 4B that extracts, a 14B for long
    documents, and a 27B that translates now and then and shares a node that cannot hold it beside the others. The
    building loses power once, one release is rolled out, one model gets a new version, requests are refused now and
    then, and in the last week the prompt cache of ``code`` hardly helps any more."""
    return MadeRack(
        seed=11,
        rack="sample",
        nodes=NODES,
        models=(
            replace(CHAT, nodes=("mini-1", "mini-2")),
            replace(CODE, nodes=("mini-2", "mini-3")),
            replace(EXTRACT, nodes=("mini-3", "mini-4")),
            replace(LONG, nodes=("mini-4",)),
            replace(TRANSLATE, nodes=("mini-4",)),
        ),
        since_ms=SINCE_MS,
        faults=0.25,
        hot=0.2,
        intake_c=(22.0, 22.0, 23.0, 27.0),
        skewed=("mini-3",),
        metered=("mini-1", "mini-2"),
        changes=(
            Change(cause="cache_miss", since_ms=SINCE_MS + (WEEKS - 1) * WEEK_MS, model="code", strength=0.8),
            Change(cause="full", since_ms=_BUSY_MS, until_ms=_BUSY_MS + HOUR_MS, model="code", strength=0.5),
            Change(cause="swap", since_ms=SINCE_MS + 9 * DAY_MS + 10 * HOUR_MS, model="chat"),
        ),
        planned=(*_power_cut(SINCE_MS + 17 * DAY_MS + 3 * HOUR_MS), *_release(SINCE_MS + 23 * DAY_MS + 6 * HOUR_MS)),
    )


def _power_cut(at_ms: int) -> tuple[Outage, ...]:
    """Every node is without power for 47 minutes, and boots at its own pace."""
    return tuple(Outage(node, at_ms, at_ms + 47 * 60_000 + n * 7_000, "power") for n, node in enumerate(NODES))


def _release(at_ms: int) -> tuple[Outage, ...]:
    """The agent's next release, on one node after the other."""
    return tuple(
        Outage(node, at_ms + n * 240_000, at_ms + n * 240_000 + 28_000, "deploy") for n, node in enumerate(NODES)
    )


CONFIG = """\
rack = "sample"
timezone = "Europe/Berlin"
[store]
kind = "directory"
path = "{bucket}"
{nodes}
"""


def main() -> int:
    """The command line."""
    parser(__doc__).parse_args()
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    made = rack()
    bucket = DirectoryStore(BUILD / "bucket")
    for node in made.nodes:
        count = 0
        for key, body in segments(batches(made, node, SINCE_MS + WEEKS * WEEK_MS), 60):
            bucket.put(key, body)
            count += 1
        print(f"{node}: {count} segments", flush=True)
    nodes = "".join(f'[[nodes]]\nid = "{node}"\nprice = {list_price():g}\n' for node in made.nodes)
    config = BUILD / "aggregator.toml"
    config.write_text((CONFIG + COMPARE).format(bucket=(BUILD / "bucket").resolve(), nodes=nodes))
    last = datetime.fromtimestamp((SINCE_MS + WEEKS * WEEK_MS - 86_400_000) / 1000, UTC)
    year, week, _ = last.isocalendar()
    for words in (["rollup"], ["weekly", "--week", f"{year}-W{week:02d}"], ["monthly", "--month", "2026-09"]):
        print(" ".join(words), flush=True)
        status = cli.main([*words, "--config", str(config)])
        if status:
            return status
    for listed in list_all(bucket, "report/"):
        target = BUILD / listed.key.rsplit("/", 1)[-1].replace("-r1", "")
        target.write_bytes(bucket.get(listed.key, MOST_REPORT_BYTES).body)
    print(f"open {BUILD}/*.html and {BUILD}/report.pdf; for further reports pass --config {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
