"""The seam between the loader's loop and an engine."""

from typing import Protocol

from agent.frames import Frame, Generate, Ready, Reported


class Engine(Protocol):
    """A model that answers several requests at a time. One thread owns it and makes every call."""

    def describe(self) -> Ready:
        """What was loaded."""
        ...

    @property
    def busy(self) -> bool:
        """Whether step() has work to do."""
        ...

    def submit(self, request: Generate) -> Frame:
        """Take a request in: Accepted, or Failed when this one cannot be answered."""
        ...

    def cancel(self, request_id: int) -> None:
        """Forget a request; unknown ids are no error."""
        ...

    def step(self) -> list[Frame]:
        """One iteration of the scheduler: Tokens, Done and Failed for any of the requests taken in."""
        ...

    def report(self) -> Reported:
        """What happened since the last report."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
