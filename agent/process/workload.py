"""Outstanding work of a loader, and its speed. Pure: the time is an argument.

Both are sent in heartbeats, so that a gateway can estimate how long a request would take there. Speeds are measured
from answers, never configured; what has not been measured is None.
"""

import msgspec

from agent.wire.frames import Working
from agent.wire.step_times import StepTimes

STALE_S = 30.0
"""Validity of a measurement. A node that was slow and received no work since must be tried again."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Number of requests in a loader, and of prompt tokens still to be prefilled."""

    requests: int = 0
    prefill_tok: int = 0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill in tokens per second; ITL in microseconds of a request that runs alone (a full batch is assumed to take
    twice as long, unless that was timed); tokens per answer."""

    prefill_tps: float | None = None
    gap_us: int | None = None
    answer_tok: int | None = None


class _Mean:
    """Exponentially weighted mean: ``decay`` is the weight that the past keeps with each new measurement."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = self._weight = 0.0
        self._at_s: float | None = None

    def add(self, now_s: float, amount: float, weight: float = 1.0) -> None:
        if self.value(now_s) is None:
            self._sum = self._weight = 0.0
        self._sum = self._sum * self._decay + amount
        self._weight = self._weight * self._decay + weight
        self._at_s = now_s

    def value(self, now_s: float) -> float | None:
        return None if self._at_s is None or now_s - self._at_s > STALE_S else self._sum / self._weight


class _Open:
    __slots__ = ("begun", "left_tok")

    def __init__(self, left_tok: int) -> None:
        self.left_tok, self.begun = left_tok, False


class Throughput:
    """Tracks one loader's requests from start to end."""

    def __init__(self, rows: int) -> None:
        self.rows, self.crowd = rows, 1.0
        """``crowd``: how a step grows with the share of rows in use."""
        self.timed: StepTimes | None = None
        self._open: dict[int, _Open] = {}
        self._prefill, self._gap, self._answer = _Mean(0.7), _Mean(0.7), _Mean(0.95)
        self.prefill_tok = 0

    def use(self, times: StepTimes) -> None:
        """Take a calibration's figures for what was not measured lately."""
        self.timed, self.crowd = times, times.crowd(self.rows)

    def begin(self, number: int, prompt_tok: int) -> None:
        """A request was sent to the loader; ``prompt_tok`` is an estimate."""
        self._open[number] = _Open(prompt_tok)
        self.prefill_tok += prompt_tok

    def accepted(self, number: int, prompt_tok: int, cached_tok: int) -> None:
        """The engine accepted it and reports the exact counts."""
        if (one := self._open.get(number)) is not None and not one.begun:
            self.prefill_tok += prompt_tok - cached_tok - one.left_tok
            one.left_tok = prompt_tok - cached_tok

    def token(self, number: int) -> None:
        """The first token arrived, so prefill has ended."""
        if (one := self._open.get(number)) is not None and not one.begun:
            one.begun = True
            self.prefill_tok -= one.left_tok
            one.left_tok = 0

    def done(self, now_s: float, number: int, completion_tok: int) -> None:
        """It finished with an answer."""
        if completion_tok:
            self._answer.add(now_s, completion_tok)
        self.end(number)

    def worked(self, now_s: float, working: Working) -> None:
        """Work of the engine in about the last second, on the loader's clock: this process may have been suspended."""
        if working.prefill_tok and working.prefill_us:
            self._prefill.add(now_s, working.prefill_us / 1e6, working.prefill_tok)
        if working.decode_steps and working.decode_us:
            rows = working.decode_tok / working.decode_steps
            crowding = 1.0 + self.crowd * min(rows, self.rows) / self.rows
            self._gap.add(now_s, working.decode_us / working.decode_steps / 1e6 / crowding)

    def end(self, number: int) -> None:
        """It ended, whatever the outcome."""
        if (one := self._open.pop(number, None)) is not None:
            self.prefill_tok -= one.left_tok

    @property
    def workload(self) -> Workload:
        """Current outstanding work."""
        return Workload(requests=len(self._open), prefill_tok=max(0, self.prefill_tok))

    def speed(self, now_s: float) -> Speed:
        """Recent measurements."""
        per_tok, gap, answer = (one.value(now_s) for one in (self._prefill, self._gap, self._answer))
        return Speed(
            prefill_tps=None if not per_tok else 1.0 / per_tok,
            gap_us=None if gap is None else int(gap * 1e6),
            answer_tok=None if answer is None else int(answer),
        )
