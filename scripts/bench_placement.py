"""Run time of the placement solver, its optimality gap, and the gap of the greedy heuristic alone.

    python -m scripts.bench_placement [--seeds 3]

Random racks, models initially placed where they happen to fit. Every plan's steps are simulated. Exits 1 when a bound
is exceeded: 8 x 20 in a second, 100 x 200 in two, greedy within 15 %.
"""

import statistics
import time
from typing import NamedTuple

from aggregator import moves, packing
from scripts.common import parser
from tests.aggregator.test_placement import case

SIZES = ((8, 20, 1.0), (30, 60, 2.0), (100, 200, 2.0))
FILLS = ((0.5, 0.45), (0.65, 0.5), (0.75, 0.6))
"""(memory, work) that the models need, as a share of the rack's capacity."""
OVER = (1.2, 0.5)
GREEDY = 0.15


class Solved(NamedTuple):
    """The result for one rack."""

    seconds: float
    gap: float | None
    greedy: float
    steps: int
    broken: int
    same: bool
    short: int


def solve(nodes: int, models: int, fill: float, load: float, seed: int) -> Solved:
    """Place one rack, twice."""
    made, rooms, now = case(seed, nodes, models, fill, load)
    began = time.monotonic()
    found = packing.pack(made, rooms, now)
    seconds = time.monotonic() - began
    ordered = moves.order(made, rooms, now, found.pairs)
    _, broken = moves.simulate(made, rooms, now, ordered.steps)
    again = packing.pack(list(reversed(made)), list(reversed(rooms)), now)
    worse = found.greedy_score / found.score - 1 if found.score > 1e-9 else 0.0
    short = sum(count for _, count in found.short)
    return Solved(seconds, found.gap, worse, len(ordered.steps), len(broken), again == found, short)


def main() -> int:
    """The command line."""
    words = parser(__doc__)
    words.add_argument("--seeds", type=int, default=3)
    args = words.parse_args()
    good, greedy = True, []
    print(f"{'rack':>10} {'memory':>7} {'work':>5} {'seconds':>8} {'gap':>7} {'greedy':>7} {'steps':>6}")
    for nodes, models, limit_s in SIZES:
        for fill, load in FILLS:
            for seed in range(args.seeds):
                one = solve(nodes, models, fill, load, seed)
                greedy.append(one.greedy)
                ok = one.seconds <= limit_s and not one.broken and one.same and one.gap is not None
                good &= ok
                gap = "none" if one.gap is None else f"{one.gap:.2%}"
                line = f"{nodes:>4} x {models:<3} {fill:>7.0%} {load:>5.0%} {one.seconds:>8.2f} {gap:>7}"
                print(f"{line} {one.greedy:>7.1%} {one.steps:>6}{'' if ok else '  MISS'}", flush=True)
    for nodes, models, _ in SIZES:
        one = solve(nodes, models, *OVER, 0)
        gap = "none" if one.gap is None else f"{one.gap:.1%}"
        print(
            f"{nodes:>4} x {models:<3} over-committed: {one.short} copies short, {one.seconds:.2f} s, gap reached {gap}"
        )
    median = statistics.median(greedy)
    within = sum(g <= GREEDY for g in greedy)
    print(f"greedy alone: median {median:.1%} above the solved score, {within} of {len(greedy)} within {GREEDY:.0%}")
    good &= median <= GREEDY
    print("ok" if good else "MISS")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
