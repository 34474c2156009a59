"""``make bench-calibration``: predicted step times of a real model, beside what requests then measure.

The engine is calibrated as in an idle loader. Then requests go through it, in rounds that take every number of rows
and every length in turn. A prediction holds within 15 % of the median of its rounds, or inside their spread. Numbers of
rows between those that were timed are predicted too, at one length.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from agent.loader import blas
from agent.loader.measuring import Measuring
from agent.wire.frames import Calibrated, Frame, Generate, Tokens
from scripts.fetch_demo_model import MAIN, default_folder

CELLS = [(rows, tokens) for tokens in (64, 500, 1000, 2000) for rows in (1, 4, 8)] + [(2, 1000), (6, 1000)]
"""Rows and tokens of each."""
BAR, STEPS = 0.15, 5


def main() -> int:
    """Command line; 1 when a prediction does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=default_folder() / MAIN)
    args = parser.parse_args()
    name = blas.install()
    from agent.loader.mlx.engine import MLXEngine

    engine = MLXEngine(str(args.model), cache_bytes=1 << 30, blas=name)
    measuring, said = Measuring(engine), list[Frame]()
    while not said:
        said = measuring.step()
    assert isinstance(said[0], Calibrated)
    if (times := said[0].times) is None:
        return 1
    print(f"calibrated in {times.took_us / 1e6:.1f} s, {times.steps} steps, half within {times.spread_ppm / 1e4:.1f} %")
    found, failed = dict[tuple[int, int], list[float]](), 0
    for number in range(args.rounds):
        for rows, length in CELLS:
            found.setdefault((rows, length), []).append(stepped(engine, rows, length))
        print(f"  round {number + 1} of {args.rounds}", flush=True)
    print(f"{'rows':>5}{'tokens':>8}{'predicted':>12}{'median':>10}{'off':>8}   {'least .. most':20}")
    for (rows, length), us in found.items():
        told = times.step_us(rows, length)
        off, inside = told / statistics.median(us) - 1, min(us) <= told <= max(us)
        failed += not (holds := abs(off) <= BAR or inside)
        spread = f"{min(us) / 1e3:.1f} .. {max(us) / 1e3:.1f} ms"
        shown = f"{told / 1e3:9.1f} ms{statistics.median(us) / 1e3:7.1f} ms{off:+8.1%}   {spread:20}"
        print(f"{rows:5}{length:8}{shown}{'' if holds else 'DOES NOT HOLD'}")
    engine.close()
    return 1 if failed else 0


def stepped(engine: Any, rows: int, length: int) -> float:
    """Median microseconds of a few steps in which so many requests decode after a prompt that all of them share."""
    prompt = [(7 + 3 * n) % 4096 for n in range(length - STEPS)]
    for number in range(rows):
        request = Generate(id=number + 1, model="", prompt="-", max_tokens=40, temperature=0.0, ignore_eos=True)
        engine.submit(engine._model.prepared(request, prompt, 40))
    taken: list[float] = []
    while len(taken) < STEPS + 2:
        began = time.perf_counter()
        answers = engine.step()
        if sum(isinstance(one, Tokens) for one in answers) == rows:
            taken.append((time.perf_counter() - began) * 1e6)
    for number in range(rows):
        engine.cancel(number + 1)
    return statistics.median(taken[2:])


if __name__ == "__main__":
    raise SystemExit(main())
