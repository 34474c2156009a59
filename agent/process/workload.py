"""What a loader has still to do, and how fast it is. Pure: the time is an argument.

Both travel in beats, so that a door can say how long a request would take there. Speeds are measured from what comes
back, never configured; what has not been measured is None.
"""

import msgspec

from agent.wire.frames import Working

STALE_S = 30.0
"""A measurement is so long good. A node that was slow and got no work since has to be tried again to be known."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests in a loader: how many, and prompt tokens that are still to be computed."""

    requests: int = 0
    prefill_tok: int = 0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens a second; microseconds between two tokens of an answer that is alone, where a full batch is taken
    to need twice as long; tokens of an answer."""

    prefill_tps: float | None = None
    gap_us: int | None = None
    answer_tok: int | None = None


class _Mean:
    """A mean in which the past counts less and less: ``decay`` is what is left of it after one more measurement."""

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
        if self._at_s is None or now_s - self._at_s > STALE_S:
            return None
        return self._sum / self._weight


class _Open:
    __slots__ = ("begun", "left_tok")

    def __init__(self, left_tok: int) -> None:
        self.left_tok, self.begun = left_tok, False


class Throughput:
    """One loader's requests from their beginning to their end."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._open: dict[int, _Open] = {}
        self._prefill = _Mean(0.7)
        self._gap = _Mean(0.7)
        self._answer = _Mean(0.95)
        self.prefill_tok = 0

    def begin(self, number: int, prompt_tok: int) -> None:
        """A request is sent to the loader; ``prompt_tok`` is a guess."""
        self._open[number] = _Open(prompt_tok)
        self.prefill_tok += prompt_tok

    def accepted(self, number: int, prompt_tok: int, cached_tok: int) -> None:
        """It is in the engine, which knows."""
        one = self._open.get(number)
        if one is not None and not one.begun:
            self.prefill_tok += prompt_tok - cached_tok - one.left_tok
            one.left_tok = prompt_tok - cached_tok

    def token(self, number: int) -> None:
        """Some of the answer, so the prompt is done."""
        one = self._open.get(number)
        if one is None:
            return
        if not one.begun:
            one.begun = True
            self.prefill_tok -= one.left_tok
            one.left_tok = 0

    def done(self, now_s: float, number: int, completion_tok: int) -> None:
        """It ended."""
        if completion_tok:
            self._answer.add(now_s, completion_tok)
        self.end(number)

    def worked(self, now_s: float, working: Working) -> None:
        """What the engine did in the last second or so. On its own clock: this process may have been asleep."""
        if working.prefill_tok and working.prefill_us:
            self._prefill.add(now_s, working.prefill_us / 1e6, working.prefill_tok)
        if working.decode_steps and working.decode_us:
            rows = working.decode_tok / working.decode_steps
            crowding = 1.0 + min(rows, self._rows) / self._rows
            self._gap.add(now_s, working.decode_us / working.decode_steps / 1e6 / crowding)

    def end(self, number: int) -> None:
        """It is over, however it ended."""
        one = self._open.pop(number, None)
        if one is not None:
            self.prefill_tok -= one.left_tok

    @property
    def workload(self) -> Workload:
        """What there is to do now."""
        return Workload(requests=len(self._open), prefill_tok=max(0, self.prefill_tok))

    def speed(self, now_s: float) -> Speed:
        """What was measured lately."""
        per_tok, gap, answer = (one.value(now_s) for one in (self._prefill, self._gap, self._answer))
        return Speed(
            prefill_tps=None if not per_tok else 1.0 / per_tok,
            gap_us=None if gap is None else int(gap * 1e6),
            answer_tok=None if answer is None else int(answer),
        )
