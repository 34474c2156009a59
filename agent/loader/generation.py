"""The interface between the loader's loop and an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agent.loader.calibration import Bounds, Task
from agent.wire.frames import Ask, Failed, Frame, Ready, Reported, Working


@dataclass(frozen=True)
class Prepared:
    """A request with everything computed ahead of the engine; ``extra`` and ``restored`` are private to the engine.
    ``prompts`` are token ids: one conversation or text, or every input of an Embed."""

    request: Ask
    prompts: tuple[list[int], ...]
    max_tokens: int = 0
    extra: Any = None
    restored: Any = None


Advance = Callable[[], None]


def nothing() -> None:
    """Nobody watches."""


class Engine(Protocol):
    """A model that serves several requests concurrently. One thread owns it and makes every call but ``prepare``."""

    def describe(self) -> Ready:
        """What was loaded."""

    @property
    def busy(self) -> bool:
        """Whether step() has work to do."""

    def prepare(self, request: Ask, advance: Advance = nothing) -> Prepared | Failed:
        """Tokens, grammar and limits of a request; Failed when it cannot be served. A single other thread may call this
        while the owner steps, so that a huge prompt delays no other request's tokens. Calls ``advance`` between parts
        of long work: without it for long, the loader is taken for stuck."""

    def submit(self, prepared: Prepared) -> Frame:
        """Accept a request: Accepted, or Failed."""

    def cancel(self, request_id: int) -> None:
        """Forget a request; unknown ids are no error."""

    def step(self) -> list[Frame]:
        """One iteration of the scheduler: Tokens, Embedded, Done and Failed for any of the accepted requests."""

    def report(self) -> Reported:
        """Counts since the last report."""

    def working(self) -> Working:
        """Its current memory, pending requests and speed."""

    def relieve(self, level: Literal["calm", "soft", "hard"]) -> None:
        """Set the memory pressure level; see agent.wire.frames.Relieve."""

    def bounds(self) -> Bounds | None:
        """What a calibration may use; None for an engine whose steps are not timed."""

    def measure(self, task: Task) -> float | None:
        """Perform one step of a calibration: its microseconds, None for one that only prepares the next. Called while
        there is nothing else to do; leaves no trace but in memory, until ``rest``."""

    def rest(self) -> None:
        """Give back what ``measure`` holds."""

    def close(self) -> None:
        """Release all resources."""
