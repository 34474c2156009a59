"""`make recompute`: every made rack, by the aggregator and by this program; a table of what differs."""

import argparse
import shutil
import sys
import time
from pathlib import Path

from tests.aggregator.ten_racks import write

from . import drive, facts, sentences
from .compare import Outcome, compare
from .more_racks import ALL

OUT = drive.ROOT / "build" / "recompute"


def main() -> int:
    """Exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="make recompute", description=__doc__)
    parser.add_argument("racks", nargs="*", help="names of racks; all of them if left out")
    parser.add_argument("--again", action="store_true", help="compare the reports of the last run")
    parser.add_argument("--most", type=int, default=12, help="differences to print of each rack")
    args = parser.parse_args()
    if unknown := set(args.racks) - set(ALL):
        parser.error(f"no rack named {', '.join(sorted(unknown))}; there are: {', '.join(ALL)}")
    print(f"{'rack':30} {'compared':>9} {'differ':>7} {'verdicts':>9} {'not derivable':>14} {'s':>6}")
    found = [_rack(name, args.again, args.most) for name in args.racks or ALL]
    bad = sum(len(one.differences) + len(one.verdicts) for one in found)
    print(f"{sum(one.compared for one in found):,} figures of {len(found)} racks, {bad} that differ")
    for reason in sorted({reason for one in found for reason in one.skipped}):
        print(f"not recomputed: {sum(one.skipped.get(reason, 0) for one in found):,} x {reason}")
    print(f"sentences to read: {sentences.write(OUT, list(args.racks or ALL), OUT).relative_to(drive.ROOT)}")
    return 1 if bad else 0


def _rack(name: str, again: bool, most: int) -> Outcome:
    made, folder, since = ALL[name], OUT / sentences.slug(name), time.monotonic()
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        drive.run(write(made, folder).config, made.now_ms, made.weeks, made.months)
    found = compare(folder / "aggregator.toml", made.now_ms, made.weeks, made.months)
    found.verdicts += [(told, "", "") for told in _contradictions(name, folder)]
    left = sum(found.skipped.values())
    took = time.monotonic() - since
    bad = (len(found.differences), len(found.verdicts))
    print(f"{name:30} {found.compared:9,} {bad[0]:7} {bad[1]:9} {left:14,} {took:6.1f}", flush=True)
    for path, theirs, ours in [*found.verdicts, *found.differences][:most]:
        print(f"    {path}: {theirs}, recomputed {ours}")
    return found


def _contradictions(name: str, folder: Path) -> list[str]:
    """One fact with two values."""
    reports = folder / "bucket" / "report" / "v1"
    found = [told for week in ALL[name].weeks for told in facts.of_week(reports / "weekly" / week)]
    return found + [told for month in ALL[name].months for told in facts.of_month(reports / "monthly" / month)]


if __name__ == "__main__":
    sys.exit(main())
