"""Calibration: which step of a model is timed next while nobody asks for anything, and what the times say. Pure.

One prompt grows chunk by chunk; at each length that it passes, decode steps are timed at several numbers of rows, and
at one of them the forwards of several tokens that speculation would verify. All of that is a round. Rounds are repeated
while the budget lasts, so that a disturbance spoils one sample of each kind and not all samples of one kind. A model so
slow that a round would not fit is timed with fewer samples of a kind before it is timed at fewer lengths.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median, median_low
from typing import NamedTuple

from agent.wire.step_times import TYPICAL_TOK, RowTimes, StepTimes, Verified

LENGTHS_TOK = (64, 512, TYPICAL_TOK, 2_000)
"""The one at which single figures are quoted is among them, so that those are measured."""
ROWS = (1, 4, 8)
VERIFIED = tuple((rows, tokens) for rows in (1, 2) for tokens in (1, 2, 4, 8))
VERIFY_AT = 1
"""The length, by its index, at which verification is timed."""
STEPS = 3
"""Samples of one kind in one round."""
ROUNDS = 3
BUDGET_US = 60_000_000
PROMPT_SHARE = 0.4
"""Share of the budget that the prompt of a round may take; a slower model is timed at shorter ones."""
UNTIMED = 3
"""About so many steps of each kind only prepare the others: states are copied, kernels compiled."""
SPARE_ROWS = 2
"""A batch is made of copies of the prompt's state: it and one copy are in memory beside the batch. All of them are
needed: eight rows of 1,524 tokens, within a plan for 16,384, take at most as much as 16,954 tokens do (SmolLM2)."""
GROWTH_TOK = 256
APART = 1.25
"""Where the memory ends before the next length it is timed there, if that is farther by this factor than the last one:
beyond it steps grow as between the last two lengths, which says nothing if these are almost the same."""
LEAST_US = 1e-3
"""For a step that took no time on the clock."""


class Prefill(NamedTuple):
    """Compute ``tokens`` more of the prompt, of which ``done_tok`` are; 0 begins another prompt."""

    tokens: int
    done_tok: int


class Decode(NamedTuple):
    """A decode step of ``rows`` rows of ``context_tok`` tokens each."""

    rows: int
    context_tok: int


class Verify(NamedTuple):
    """A forward of ``tokens`` tokens in each of ``rows`` rows of ``context_tok`` tokens each."""

    rows: int
    tokens: int
    context_tok: int


Task = Prefill | Decode | Verify


class Bounds(NamedTuple):
    """What an engine allows: rows, tokens of all rows together, tokens of one row, tokens of a prefill chunk."""

    rows: int
    kv_tok: int
    context_tok: int
    chunk_tok: int


class Calibration:
    """One model's calibration. The engine performs ``next()``, tells ``learn`` what it took, and ``rest`` when it has
    given up the prompt because somebody asked for something."""

    def __init__(self, bounds: Bounds, budget_us: int = BUDGET_US) -> None:
        self._bounds, self._budget_us = bounds, budget_us
        self._samples: dict[Task, list[float]] = {}
        self._lengths = _lengths(bounds)
        self._todo: list[Task] = []
        self._held_tok = self._rounds = 0
        self.took_us = 0.0
        self._begin_round()

    @property
    def done(self) -> bool:
        """Whether nothing is left to be timed."""
        return not self._todo

    def next(self) -> Task | None:
        """What to time next; None when done."""
        if not self._todo:
            return None
        task = self._todo[0]
        wanted = task.done_tok + task.tokens if isinstance(task, Prefill) else task.context_tok
        if self._held_tok > wanted:
            self._held_tok = 0
        if self._held_tok < wanted:
            return Prefill(min(self._bounds.chunk_tok, wanted - self._held_tok), self._held_tok)
        return task

    def learn(self, task: Task, us: float | None, spent_us: float) -> None:
        """A step of a task took ``us``, None for one that only prepared it; ``spent_us`` is what it cost in all."""
        self.took_us += spent_us
        if isinstance(task, Prefill):
            self._held_tok = task.done_tok + task.tokens
        if us is not None:
            self._samples.setdefault(task, []).append(max(us, LEAST_US))
        if isinstance(task, Prefill):
            self._shorten()
        elif len(self._samples.get(task, ())) >= self._wanted():
            self._todo.pop(0)
        if self.took_us >= self._budget_us:
            self._todo.clear()
        elif not self._todo:
            self._end_round()

    def rest(self) -> None:
        """The prompt is not held any more; what was timed counts."""
        self._held_tok = 0

    def times(self) -> StepTimes | None:
        """The fitted times; None where too little was measured to tell. Of two samples in the middle the lower one
        counts: what disturbs a step makes it longer."""
        chunks = {t: us for t, us in self._samples.items() if isinstance(t, Prefill)}
        steps = {t: us for t, us in self._samples.items() if isinstance(t, Decode)}
        rows = sorted({t.rows for t in steps})
        if not chunks or 1 not in rows:
            return None
        prefill = fitted(
            [((1.0, t.tokens, t.tokens * (t.done_tok + t.tokens / 2)), median_low(us)) for t, us in chunks.items()]
        )
        verified = {t: median_low(us) for t, us in self._samples.items() if isinstance(t, Verify)}
        return StepTimes(
            prefill=(prefill[0], prefill[1], prefill[2]),
            decode=_decode(
                {r: {t.context_tok: median_low(us) for t, us in steps.items() if t.rows == r} for r in rows}
            ),
            verify=tuple(Verified(rows=t.rows, tokens=t.tokens, us=us) for t, us in verified.items()),
            context_tok=max(t.context_tok for t in steps),
            steps=sum(map(len, self._samples.values())),
            took_us=round(self.took_us),
            spread_ppm=_spread_ppm(list(self._samples.values())),
        )

    def _begin_round(self) -> None:
        for rows in self._rows:
            self._todo += [Decode(rows, length) for length in _within(self._lengths, self._most_tok(rows))]
        verified_tok = self._lengths[min(VERIFY_AT, len(self._lengths) - 1)]
        self._todo += [Verify(rows, tokens, verified_tok) for rows, tokens in VERIFIED if rows <= self._bounds.rows]
        self._todo.sort(key=_context_of)  # the prompt only grows within a round

    def _wanted(self) -> int:
        """Samples of one kind at the end of this round; one is enough where else a first round would not be whole."""
        hurried = not self._rounds and self.took_us + self._rest_us() > self._budget_us
        return 1 if hurried else STEPS * (self._rounds + 1)

    def _rest_us(self) -> float:
        """About what the rest of this round takes, if each of its steps is as long as the longest kind so far."""
        known = [(task, median_low(us)) for task, us in self._samples.items()]
        chunks = [(task.tokens, us) for task, us in known if isinstance(task, Prefill)]
        token_us = sum(us for _, us in chunks) / max(1, sum(tokens for tokens, _ in chunks))
        step_us = max((us for task, us in known if not isinstance(task, Prefill)), default=0.0)
        to_go_tok = max(0, _context_of(self._todo[-1]) - self._held_tok)
        return token_us * to_go_tok + step_us * len(self._todo) * (STEPS + UNTIMED)

    def _end_round(self) -> None:
        """Begin another round, of the lengths that the rest of the budget allows."""
        self._rounds += 1
        if self._rounds == ROUNDS:
            return
        self._held_tok = 0
        self._begin_round()
        self._todo = [task for task in self._todo if task in self._samples]
        while self._todo and self.took_us + self._cost_us(_context_of(self._todo[-1])) > self._budget_us:
            self._todo.pop()

    def _cost_us(self, to_tok: int) -> float:
        """What everything up to this length costs again."""
        known = [(task, median_low(us)) for task, us in self._samples.items()]
        return sum(
            us if isinstance(task, Prefill) else us * (STEPS + UNTIMED)
            for task, us in known
            if _context_of(task) < to_tok or (_context_of(task) == to_tok and not isinstance(task, Prefill))
        )

    def _shorten(self) -> None:
        """Leave out lengths that would take too much of the budget, at the rate of the last chunk."""
        chunks = {task: median_low(us) for task, us in self._samples.items() if isinstance(task, Prefill)}
        if not chunks or self._rounds:
            return
        last = max(chunks, key=lambda task: task.done_tok)
        left_us = PROMPT_SHARE * self._budget_us - sum(chunks.values())
        most_tok = max(self._lengths[0], self._held_tok, self._held_tok + left_us * last.tokens / chunks[last])
        self._todo = [task for task in self._todo if _context_of(task) <= most_tok]

    @property
    def _rows(self) -> list[int]:
        return sorted({min(rows, self._bounds.rows) for rows in ROWS})

    def _most_tok(self, rows: int) -> int:
        """The longest context of so many rows that fits into the memory planned for all of them."""
        each = self._bounds.kv_tok // (rows + SPARE_ROWS)
        return max(1, each - each % GROWTH_TOK - STEPS * 4) if each > GROWTH_TOK else max(1, each // 2)


def _lengths(bounds: Bounds) -> tuple[int, ...]:
    """Lengths that fit into the context of one row; three shorter ones where it is short."""
    most = max(8, min(bounds.context_tok - 2 * GROWTH_TOK, bounds.kv_tok // (1 + SPARE_ROWS) - GROWTH_TOK))
    if most < TYPICAL_TOK:
        return tuple(sorted({min(LENGTHS_TOK[0], max(1, most // 4)), max(1, most // 2), most}))
    return _within(LENGTHS_TOK, most)


def _within(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """The lengths up to ``most``, and ``most`` itself where longer ones are cut off and it is far enough from them."""
    fit = tuple(length for length in lengths if length <= most)
    return fit if fit and (len(fit) == len(lengths) or most < APART * fit[-1]) else (*fit, most)


def _decode(measured: Mapping[int, Mapping[int, float]]) -> tuple[RowTimes, ...]:
    """Times of each row count, ascending, from microseconds by length; and the line near them. At lengths that the
    memory allows fewer rows only, what more tokens add is that of the fewer rows, by the number of rows: each row's
    keys and values are read. The slope of its own last two points would carry a jump between them on and on."""
    found = list[RowTimes]()
    for rows, lengths in measured.items():
        points = rising(lengths)
        if found:
            fewer, (last_tok, last_us) = found[-1], points[-1]
            more = ((tok, us - fewer.us(last_tok)) for tok, us in fewer.points if tok > last_tok)
            points += tuple((tok, last_us + added_us * rows / fewer.rows) for tok, added_us in more)
        base_us, token_us = fitted([((1.0, tokens), us) for tokens, us in points])
        found.append(RowTimes(rows=rows, base_us=base_us, token_us=token_us, points=points))
    return tuple(found)


def rising(measured: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """(length, microseconds) by length, no longer one cheaper: of two that contradict each other the lower counts,
    since what disturbs a step makes it longer. A mean of both (pooled violators) would keep part of the disturbance,
    and a running maximum would carry all of it to the longer contexts."""
    found, least = list[tuple[int, float]](), math.inf
    for tokens, us in sorted(measured.items(), reverse=True):
        least = min(least, us)
        found.append((tokens, least))
    return tuple(reversed(found))


def _context_of(task: Task) -> int:
    return task.done_tok if isinstance(task, Prefill) else task.context_tok


def fitted(points: Sequence[tuple[Sequence[float], float]]) -> tuple[float, ...]:
    """Coefficients, none below 0, of the linear function through (terms, value) with the least squares of relative
    errors: the best of the fits with some of the terms left out. With fewer points than terms some are 0."""
    width = len(points[0][0])
    best, least = (0.0,) * width, math.inf
    for size in range(1, min(width, len(points)) + 1):
        for kept in combinations(range(width), size):
            found = _solved([([terms[k] / value for k in kept], 1.0) for terms, value in points])
            if found is None or min(found) < 0:
                continue
            named = dict(zip(kept, found, strict=True))
            error = sum(
                (sum(named.get(k, 0.0) * term for k, term in enumerate(terms)) / value - 1) ** 2
                for terms, value in points
            )
            if error < least - 1e-12:
                best, least = tuple(named.get(k, 0.0) for k in range(width)), error
    return best


def _solved(rows: Sequence[tuple[Sequence[float], float]]) -> list[float] | None:
    """Least squares by the normal equations, scaled; None where they have no single solution."""
    size = len(rows[0][0])
    scale = [math.sqrt(sum(terms[k] ** 2 for terms, _ in rows)) or 1.0 for k in range(size)]
    unit = [([term / s for term, s in zip(terms, scale, strict=True)], value) for terms, value in rows]
    table = [
        [*(sum(t[i] * t[j] for t, _ in unit) for j in range(size)), sum(t[i] * v for t, v in unit)] for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(table[row][i]))
        if abs(table[pivot][i]) < 1e-9:
            return None
        table[i], table[pivot] = table[pivot], table[i]
        table[i] = [value / table[i][i] for value in table[i]]
        for j in range(size):
            if j != i:
                table[j] = [one - table[j][i] * other for one, other in zip(table[j], table[i], strict=True)]
    return [row[-1] / s for row, s in zip(table, scale, strict=True)]


def _spread_ppm(samples: Sequence[Sequence[float]]) -> int:
    """The median distance of a sample from the median of its kind."""
    off = [abs(us / middle - 1) for kind in samples if len(kind) > 1 and (middle := median(kind)) for us in kind]
    return round(median(off) * 1e6) if off else 0
