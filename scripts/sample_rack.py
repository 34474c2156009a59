"""``make sample-rack``: five weeks of a synthetic rack, rolled up and reported, to explore reports without a rack.

Writes build/sample/: the bucket as a directory, its aggregator.toml, and the newest artifacts in one folder.
"""

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from aggregator import cli
from scripts.bench_aggregate import segments
from scripts.common import parser
from shared.keys import MOST_REPORT_BYTES
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.made_rack import WEEK_MS, Change, MadeModel, MadeRack, batches, list_price

BUILD = Path("build/sample")
SINCE_MS = 1_792_972_800_000
"""2026-10-26 00:00 UTC, a Monday."""
WEEKS = 5


def rack() -> MadeRack:
    """Four nodes, four models, and prompt cache hits that cease in the last week."""
    return MadeRack(
        seed=11,
        rack="sample",
        nodes=("mini-1", "mini-2", "mini-3", "mini-4"),
        models=(
            MadeModel(name="chat", per_hour=420, nodes=("mini-1", "mini-2"), key="support"),
            MadeModel(
                name="code", per_hour=160, prompt_tok=5200, share=0.82, answer_tok=180, nodes=("mini-2", "mini-3")
            ),
            MadeModel(
                name="extract", per_hour=700, prompt_tok=700, answer_tok=60, nodes=("mini-3", "mini-4"), key="etl"
            ),
            MadeModel(name="long", per_hour=25, prompt_tok=18_000, share=0.2, need_bytes=21 * 10**9, nodes=("mini-4",)),
        ),
        since_ms=SINCE_MS,
        faults=0.8,
        skewed=("mini-3",),
        metered=("mini-1", "mini-2"),
        changes=(Change(cause="cache_miss", since_ms=SINCE_MS + (WEEKS - 1) * WEEK_MS, model="code"),),
    )


CONFIG = """\
rack = "sample"
timezone = "Europe/Berlin"
[store]
kind = "directory"
path = "{bucket}"
{nodes}
[[compare]]
model = "chat"
same_as = "llama-3.1-8b-instruct"
frontier = "openai/gpt-4o"
[[compare]]
model = "code"
same_as = "qwen3-32b"
frontier = "anthropic/claude-sonnet-4-5"
[[compare]]
model = "extract"
same_as = "qwen3-8b"
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
    config.write_text(CONFIG.format(bucket=(BUILD / "bucket").resolve(), nodes=nodes))
    last = datetime.fromtimestamp((SINCE_MS + WEEKS * WEEK_MS - 86_400_000) / 1000, UTC)
    year, week, _ = last.isocalendar()
    for words in (["rollup"], ["weekly", "--week", f"{year}-W{week:02d}"], ["monthly", "--month", "2026-11"]):
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
