"""``make abuse``: run the cases and print the table finding -> input -> intended -> seen."""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from scripts import abuse
from scripts.abuse import CASES, Case, Place, Seen, files, lan, load, store
from scripts.common import parser

__all__ = ["files", "lan", "load", "store"]  # importing them fills the table


def _alone(case: Case, place: Place, pipe: "multiprocessing.connection.Connection[object, object]") -> None:
    """In a process of its own; whatever it starts is in its group."""
    os.setpgid(0, 0)
    try:
        seen = case.run(place)
    except BaseException as error:  # noqa: BLE001  # a case that breaks is a case that failed
        where = traceback.extract_tb(error.__traceback__)[-1]
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        seen = Seen(False, f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {last[:300]}")
    pipe.send(tuple(seen))


def _seen(case: Case, quick: bool) -> tuple[Seen, float]:
    """Run one case for a bounded time; nothing of it is left afterwards."""
    began = time.monotonic()
    receive, send = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="abuse-", ignore_cleanup_errors=True) as folder:
        child = multiprocessing.Process(target=_alone, args=(case, Place(Path(folder), quick), send))
        child.start()
        limit_s = case.limit_s / 2 if quick else case.limit_s
        seen = Seen(*receive.recv()) if receive.poll(limit_s) else Seen(False, f"no end within {limit_s:.0f} s")
        assert child.pid is not None
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            child.kill()
        child.join()
    return seen, time.monotonic() - began


def _row(case: Case, seen: Seen, took_s: float) -> str:
    return (
        f"{'ok  ' if seen.ok else 'FAIL'} {case.finding:>3}  {case.name:<20} {took_s:6.1f} s\n"
        f"          given     {case.given}\n          intended  {case.expected}\n          seen      {seen.words}"
    )


def main() -> int:
    """The command line; exit status 1 if any case saw something else than intended."""
    options: argparse.ArgumentParser = parser(abuse.__doc__)
    options.add_argument("--quick", action="store_true", help="fewer repetitions: a few minutes")
    options.add_argument("--only", action="append", default=[], metavar="NAME", help="this case; may be repeated")
    options.add_argument("--list", action="store_true", help="print the cases and run none")
    options.add_argument("--json", type=Path, default=None, help="also write the table to this file")
    args = options.parse_args()
    if unknown := set(args.only) - {one.name for one in CASES}:
        options.error(f"no such case: {', '.join(sorted(unknown))}; --list prints them")
    rows, chosen = [], [one for one in CASES if not args.only or one.name in args.only]
    for one in chosen:
        if args.list:
            print(f"{one.finding:>3}  {one.name:<20} {one.given}")
            continue
        seen, took_s = _seen(one, args.quick)
        rows.append((one, seen, took_s))
        print(_row(one, seen, took_s), flush=True)
    failed = [one.name for one, seen, _ in rows if not seen.ok]
    if args.json is not None:
        tree = [{"case": c.name, "finding": c.finding, "ok": s.ok, "seen": s.words, "s": took} for c, s, took in rows]
        args.json.write_text(json.dumps(tree, indent=2))
    if rows:
        print(
            f"\n{len(rows) - len(failed)} of {len(rows)} as intended"
            + (f"; not: {', '.join(failed)}" if failed else "")
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
