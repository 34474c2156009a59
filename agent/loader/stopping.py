"""Stop strings over a stream of text: no part of a stop string is ever emitted, wherever the pieces are split."""


class StopText:
    """Feed text piece by piece; what may still become a stop string is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that may be emitted now, and whether a stop string was completed (the rest is dropped)."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        if found := [at for at in (text.find(stop) for stop in self._stops) if at >= 0]:
            self._held = ""
            return text[: min(found)], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """The text held back, once the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
