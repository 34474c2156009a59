"""The seam between the loader's loop and an engine."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agent.wire.frames import Ask, Failed, Frame, Ready, Reported, Working

_LATELY = ("prefill_tok", "prefill_us", "decode_tok", "decode_us", "decode_steps")


@dataclass(frozen=True)
class Prepared:
    """A request with all that can be done before an engine sees it; ``extra`` and ``restored`` are the engine's own.

    ``prompts`` are token ids: one conversation or text, or every input of an Embed.
    """

    request: Ask
    prompts: tuple[list[int], ...]
    max_tokens: int = 0
    extra: Any = None
    restored: Any = None


class Engine(Protocol):
    """A model that answers several requests at a time. One thread owns it and makes every call but ``prepare``."""

    def describe(self) -> Ready:
        """What was loaded."""
        ...

    @property
    def busy(self) -> bool:
        """Whether step() has work to do."""
        ...

    def prepare(self, request: Ask) -> Prepared | Failed:
        """Tokens, grammar and limits of a request; Failed when this one cannot be answered. Any one thread may call
        this while the owner steps, so that a huge prompt holds up nobody's tokens."""
        ...

    def submit(self, prepared: Prepared) -> Frame:
        """Take a request in: Accepted, or Failed."""
        ...

    def cancel(self, request_id: int) -> None:
        """Forget a request; unknown ids are no error."""
        ...

    def step(self) -> list[Frame]:
        """One iteration of the scheduler: Tokens, Embedded, Done and Failed for any of the requests taken in."""
        ...

    def report(self) -> Reported:
        """What happened since the last report."""
        ...

    def working(self) -> Working:
        """What it holds now."""
        ...

    def relieve(self, level: Literal["calm", "soft", "hard"]) -> None:
        """Memory is short, or no longer; see agent.wire.frames.Relieve."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Lately:
    """What an engine did since it was last asked, on its own clock."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_LATELY, 0)

    def prefilled(self, tokens: int, us: int) -> None:
        """Prompt tokens were computed, or time was spent on it."""
        self._sums["prefill_tok"] += tokens
        self._sums["prefill_us"] += us

    def decoded(self, tokens: int, us: int) -> None:
        """One step made so many tokens of answers; one that made none does not count."""
        if tokens:
            self._sums["decode_tok"] += tokens
            self._sums["decode_us"] += us
            self._sums["decode_steps"] += 1

    def taken(self) -> dict[str, int]:
        """The fields of Working, and a fresh start."""
        sums, self._sums = self._sums, dict.fromkeys(_LATELY, 0)
        return sums
