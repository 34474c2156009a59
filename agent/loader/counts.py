"""What an engine counts: since the last report, and since the last heartbeat."""

_LATELY = ("prefill_tok", "prefill_us", "decode_tok", "decode_us", "decode_steps")


class Lately:
    """Work of an engine since the last call of ``taken``, on the engine's clock."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_LATELY, 0)

    def prefilled(self, tokens: int, us: int) -> None:
        """Add prefilled prompt tokens, or time spent on prefill."""
        self._sums["prefill_tok"] += tokens
        self._sums["prefill_us"] += us

    def decoded(self, tokens: int, us: int) -> None:
        """Add one decode step with its tokens; a step without tokens is ignored."""
        if tokens:
            self._sums["decode_tok"] += tokens
            self._sums["decode_us"] += us
            self._sums["decode_steps"] += 1

    def taken(self) -> dict[str, int]:
        """Return the fields of Working and reset the sums."""
        sums, self._sums = self._sums, dict.fromkeys(_LATELY, 0)
        return sums


class Counts:
    """Fields of Reported by name, and of Working in ``lately``."""

    def __init__(self) -> None:
        self._window: dict[str, int] = {}
        self.lately = Lately()

    def add(self, name: str, amount: int) -> None:
        """Add to a sum."""
        self._window[name] = self._window.get(name, 0) + amount

    def highest(self, name: str, value: int) -> None:
        """Note a value of which the highest is reported."""
        self._window[name] = max(self._window.get(name, 0), value)

    def stepped(self, prefill_us: int, decode_us: int, generated_tok: int) -> None:
        """Add a step's time and tokens."""
        self.add("decode_tok", generated_tok)
        self.add("busy_prefill_us", prefill_us)
        self.add("busy_decode_us", decode_us)
        self.add("steps", 1)
        self.lately.prefilled(0, prefill_us)
        self.lately.decoded(generated_tok, decode_us)

    def taken(self) -> dict[str, int]:
        """Return the fields of Reported and reset them."""
        window, self._window = self._window, {}
        return window
