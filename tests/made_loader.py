"""A loader of a made node: requests wait in line, and each window does as much of their work as fits into it.

What is counted for requests (``Served``) and for the loader (``EngineWindow``) is the same work: over time the prompt
tokens that were computed and the answer tokens agree, only that a request counts in the window in which it ends.
"""

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import msgspec

from shared.records import EngineWindow, Served, prompt_bucket
from shared.sketch import Sketch, SketchWire
from tests.made_machine import least_gap_us, prefill_us, step_us, version

FULL = 0.97
"""Share of a window that a loader can be busy."""
MOST_WAITING = 3
"""Where more requests of one model wait than this many for each of its rows, the next ones are refused."""
_Z = tuple(NormalDist().inv_cdf((n + 0.5) / 8) for n in range(8))


class MadeModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model and its traffic. ``share`` of a prompt is in the prompt cache; requests come ``burst`` at a time.

    A token takes part in ``params`` parameters, which hold ``weights_bytes``; a token of context holds ``kv_tok_bytes``
    (the default is a model of 1.7 billion parameters with 8 bits each). ``need_bytes`` is the plan of its memory.
    ``files`` names its files if another name serves the same ones: equal files, equal versions. ``loader`` is the name
    whose loader answers this one as well.
    """

    name: str
    per_hour: float
    prompt_tok: float = 1_500.0
    answer_tok: float = 220.0
    share: float = 0.55
    burst: int = 1
    params: float = 1.7e9
    weights_bytes: int = 1_950_000_000
    kv_tok_bytes: int = 28_000
    rows: int = 6
    need_bytes: int = 6_000_000_000
    pinned: bool = False
    nodes: tuple[str, ...] = ()
    key: str = "app"
    files: str = ""
    loader: str = ""


class Arrived(msgspec.Struct, kw_only=True):
    """The requests for one name in one window, their tokens, and how much of their work is still to be done."""

    model: MadeModel
    at_ms: int
    count: int
    prompt_tok: int
    cached_tok: int
    answer_tok: int
    cut: float
    failed: int = 0
    refused: tuple[Served, ...] = ()
    begun_ms: int = -1
    prefilled_tok: int = 0
    decoded_tok: int = 0


class _Done(NamedTuple):
    """The outcome of a group of requests and how many of them had it."""

    outcome: str
    finish: str
    requests: int


class Loader:
    """One loader. ``available`` from when on it can work: a load takes time."""

    def __init__(self, node: str, model: MadeModel, dice: random.Random) -> None:
        self._node, self.model, self._dice = node, model, dice
        self.name, self.number = model.name, 1
        self.version = version(model.files or model.name)
        self.restarts = 0
        self.available_ms = 0
        self._line: deque[Arrived] = deque()
        row_bytes = model.kv_tok_bytes * (model.prompt_tok + model.answer_tok / 2)
        self._row_bytes = row_bytes
        self.gap_us = step_us(model.weights_bytes, row_bytes, 1)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return sum(job.count for job in self._line)

    def next_version(self) -> str:
        """The version that a swap brings."""
        self.number += 1
        return version(self.model.files or self.name, self.number)

    def work(
        self, arrived: Sequence[Arrived], start_ms: int, end_ms: int, slow: float
    ) -> tuple[list[Served], EngineWindow]:
        """One window: what ended in it, and what was computed."""
        served = self._enqueued(arrived)
        engine = _Counts()
        # not even with noise does a loader compute for longer than a window lasts
        left_us = max(0.0, (end_ms - max(start_ms, self.available_ms)) * 1000 * FULL)
        length_us = max(1, end_ms - start_ms) * 1000
        noise = (max(0.91, min(1.1, self._dice.gauss(1, 0.03))), max(0.91, min(1.1, self._dice.gauss(1, 0.03))))
        prompt_us = prefill_us(self.model.params) * slow * noise[0]
        rows, rho = self._rows(prompt_us, length_us)
        step = step_us(self.model.weights_bytes, self._row_bytes, rows) * slow * noise[1]
        engine.queue_max = min(self.waiting, MOST_WAITING * self.model.rows)
        while self._line and left_us > step:
            job = self._line[0]
            prefill, decode = _left(job)
            job.begun_ms = max(start_ms, self.available_ms) if job.begun_ms < 0 else job.begun_ms
            full_us = prefill * prompt_us + math.ceil(decode / rows) * step
            part = min(1.0, left_us / full_us) if full_us else 1.0
            tokens = (prefill, decode) if part >= 1 else (int(prefill * part), int(decode * part))
            left_us -= engine.compute(tokens, prompt_us, step, rows)
            job.prefilled_tok += tokens[0]
            job.decoded_tok += tokens[1]
            if part < 1:
                break
            self._line.popleft()
            waited_us = (job.begun_ms - job.at_ms) * 1000 + _queued(rho, full_us / max(1, job.count))
            first = 45_000 + waited_us + (job.prompt_tok - job.cached_tok) / max(1, job.count) * prompt_us
            served += self._ended(job, engine, first + step, step)
            engine.queue_us += int(waited_us * job.count)
        return served, engine.window(self.model, self.name, self.version)

    def _enqueued(self, arrived: Iterable[Arrived]) -> list[Served]:
        """Put requests in line; those that find it too long are refused."""
        found: list[Served] = []
        for one in arrived:
            name, key = one.model.name, one.model.key
            if one.failed:
                found.append(Served(model=name, worker="", key_id=key, outcome="failed", requests=one.failed))
            if one.count and self.waiting > MOST_WAITING * self.model.rows:
                refused = Served(model=name, key_id=key, outcome="refused", finish="capacity", requests=one.count)
                found.append(refused)
            elif one.count:
                self._line.append(one)
        return found

    def _rows(self, prompt_us: float, length_us: int) -> tuple[float, float]:
        """Rows of a decode step, and the share of the window that the line would take alone."""
        prefill, decode = (sum(values) for values in zip((0, 0), *map(_left, self._line), strict=True))
        rho = (prefill * prompt_us + decode * self.gap_us) / length_us
        most = min(self.model.rows, max(1, self.waiting))
        return min(float(most), 1 + 1.2 * rho), rho

    def _ended(self, job: Arrived, engine: "_Counts", ttft: float, gap: float) -> list[Served]:
        dice = self._dice
        cut, left = _share(dice, job.count, job.cut), _share(dice, job.count, 0.006)
        parts = [_Done("ok", "length", min(cut, job.count - left)), _Done("cancelled", "", left)]
        parts.insert(0, _Done("ok", "stop", job.count - sum(p.requests for p in parts)))
        found = []
        tokens = [_cut(n, [p.requests for p in parts]) for n in (job.prompt_tok, job.cached_tok, job.answer_tok)]
        for part, prompt, cached, answer in zip(parts, *tokens, strict=True):
            if not part.requests:
                continue
            if part.outcome == "cancelled":
                engine.wasted_tok += answer
            gaps = max(1, answer - part.requests) if answer else 0
            long = ttft + answer / part.requests * gap
            found.append(
                Served(
                    model=job.model.name,
                    version=self.version,
                    worker=self._node,
                    key_id=job.model.key,
                    outcome=part.outcome,
                    finish=part.finish,
                    prompt_bucket_tok=prompt_bucket(int(job.model.prompt_tok)),
                    requests=part.requests,
                    prompt_tok=prompt,
                    cached_tok=cached,
                    completion_tok=answer,
                    ttft_us=_sketch(dice, ttft, 0.3, part.requests),
                    itl_us=_sketch(dice, gap, 0.06, gaps, least_gap_us(self.model.weights_bytes) * 1.02),
                    total_us=_sketch(dice, long, 0.3, part.requests),
                )
            )
        hits = _share(dice, job.count, job.cached_tok / job.prompt_tok if job.prompt_tok else 0.0)
        engine.cache_hits += hits
        engine.cache_misses += job.count - hits
        engine.cached_tok += job.cached_tok
        return found


class _Counts:
    """The work of a window so far."""

    def __init__(self) -> None:
        self.prefill_us = self.decode_us = 0.0
        self.prefill_tok = self.decode_tok = self.steps = self.wasted_tok = self.cached_tok = 0
        self.queue_max = self.queue_us = self.cache_hits = self.cache_misses = 0

    def compute(self, tokens: tuple[int, int], prompt_us: float, step: float, rows: float) -> float:
        """Microseconds that these prompt and answer tokens took."""
        prefill, decode = tokens
        steps = math.ceil(decode / rows)
        self.prefill_us += prefill * prompt_us
        self.decode_us += steps * step
        self.prefill_tok += prefill
        self.decode_tok += decode
        self.steps += steps
        return prefill * prompt_us + steps * step

    def window(self, model: MadeModel, name: str, version_: str) -> EngineWindow:
        """The record."""
        return EngineWindow(
            model=name,
            version=version_,
            busy_prefill_us=int(self.prefill_us),
            busy_decode_us=int(self.decode_us),
            prefill_tok=self.prefill_tok,
            cached_tok=self.cached_tok,
            decode_tok=self.decode_tok,
            wasted_tok=self.wasted_tok,
            steps=self.steps,
            queue_max=self.queue_max,
            queue_us=self.queue_us,
            cache_hits=self.cache_hits,
            cache_misses=self.cache_misses,
            cache_saved_tok=self.cached_tok,
            active_bytes=model.weights_bytes,
            peak_bytes=int(0.9 * model.need_bytes),
        )


def _left(job: Arrived) -> tuple[int, int]:
    """Prompt and answer tokens of a job that are still to be computed."""
    return job.prompt_tok - job.cached_tok - job.prefilled_tok, job.answer_tok - job.decoded_tok


def _queued(rho: float, each_us: float) -> float:
    """How long a request waits for others on average, as in a queue with one server."""
    return min(0.8, rho) / (1 - min(0.8, rho)) * each_us * 0.5


def _share(dice: random.Random, count: int, share: float) -> int:
    """How many of so many."""
    if count > 40:
        return min(count, max(0, round(count * share)))
    return sum(dice.random() < share for _ in range(count))


def _cut(total: int, weights: Sequence[int]) -> list[int]:
    """A whole number in parts by weight that add up to it."""
    whole, seen, given, found = sum(weights), 0, 0, []
    for weight in weights:
        seen += weight
        upto = total * seen // whole if whole else 0
        found.append(upto - given)
        given = upto
    return found


def _sketch(dice: random.Random, median: float, sigma: float, count: int, least: float = 0.0) -> SketchWire:
    """Values around a median; few draws stand for many, as in a short window."""
    sketch, left = Sketch(), count
    shift = dice.gauss(0, 0.3)
    draws = min(count, 8)
    for place in range(draws):
        times = left // (draws - place)
        z = _Z[place] if draws == 8 else dice.gauss(0, 1)
        sketch.add(int(max(least, median * math.exp(sigma * (z + shift)))), times)
        left -= times
    return sketch.to_wire()
