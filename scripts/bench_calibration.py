"""``make bench-calibration``: predicted step times of a real model, beside what requests then measure.

The engine calibrates itself as a loader does when it is idle. Then requests go through the same engine, in rounds that
take every number of rows and every length in turn. A prediction holds if it is within 15 % of the median of its rounds,
or inside their spread.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from agent.loader import blas
from agent.loader.calibration import Calibration
from agent.wire.frames import Done, Generate, Tokens
from scripts.fetch_demo_model import MAIN, default_folder

ROWS, LENGTHS, PROMPTS = (1, 4, 8), (64, 500, 1000, 2000), (64, 500, 2000)
BAR = 0.15
STEPS = 5


def main() -> int:
    """Command line; 1 when a prediction does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=default_folder() / MAIN)
    args = parser.parse_args()
    name = blas.install()
    from agent.loader.mlx.engine import MLXEngine

    engine = MLXEngine(str(args.model), cache_bytes=1 << 30, blas=name)
    bounds = engine.bounds()
    assert bounds is not None
    calibration = Calibration(bounds)
    while (task := calibration.next()) is not None:
        began = time.perf_counter()
        calibration.learn(task, engine.measure(task), (time.perf_counter() - began) * 1e6)
    engine.rest()
    times = calibration.times()
    assert times is not None
    print(f"calibrated in {times.took_us / 1e6:.1f} s, {times.steps} steps, half within {times.spread_ppm / 1e4:.1f} %")
    found: dict[tuple[str, int, int], list[float]] = {}
    for number in range(args.rounds):
        for length in LENGTHS:
            for rows in ROWS:
                found.setdefault(("step", rows, length), []).append(stepped(engine, rows, length))
        for length in PROMPTS:
            found.setdefault(("prompt", 1, length), []).append(prefilled(engine, length, number))
        print(f"  round {number + 1} of {args.rounds}", flush=True)
    print(f"{'':8}{'rows':>5}{'tokens':>8}{'predicted':>12}{'median':>10}{'off':>8}   {'least .. most':20}")
    failed = 0
    for (what, rows, length), us in found.items():
        # a prompt's last token is computed in a step
        alone = times.step_us(1, length)
        told = times.step_us(rows, length) if what == "step" else times.prompt_us(length - 1, 512) + alone
        off, inside = told / statistics.median(us) - 1, min(us) <= told <= max(us)
        failed += not (holds := abs(off) <= BAR or inside)
        spread = f"{min(us) / 1e3:.1f} .. {max(us) / 1e3:.1f} ms"
        shown = f"{told / 1e3:9.1f} ms{statistics.median(us) / 1e3:7.1f} ms{off:+8.1%}   {spread:20}"
        print(f"{what:8}{rows:5}{length:8}{shown}{'' if holds else 'DOES NOT HOLD'}")
    engine.close()
    return 1 if failed else 0


def _ask(engine: Any, number: int, prompt: list[int]) -> None:
    request = Generate(id=number, model="", prompt="-", max_tokens=40, temperature=0.0, ignore_eos=True)
    engine.submit(engine._model.prepared(request, prompt, 40))


def stepped(engine: Any, rows: int, length: int) -> float:
    """Median microseconds of a few steps in which so many requests decode after a prompt that all of them share."""
    for number in range(rows):
        _ask(engine, number + 1, [(7 + 3 * n) % 4096 for n in range(length - STEPS)])
    taken: list[float] = []
    while len(taken) < STEPS + 2:
        began = time.perf_counter()
        answers = engine.step()
        if sum(isinstance(one, Tokens) for one in answers) == rows:
            taken.append((time.perf_counter() - began) * 1e6)
    for number in range(rows):
        engine.cancel(number + 1)
    return statistics.median(taken[2:])


def prefilled(engine: Any, length: int, seed: int) -> float:
    """Microseconds from a new prompt to its first token."""
    began = time.perf_counter()
    _ask(engine, 1, [(100 + length + 31 * seed + 5 * n) % 4096 for n in range(length)])
    while not any(isinstance(one, Tokens | Done) for one in engine.step()):
        pass
    took = (time.perf_counter() - began) * 1e6
    engine.cancel(1)
    return took


if __name__ == "__main__":
    raise SystemExit(main())
