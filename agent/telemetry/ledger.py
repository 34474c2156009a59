"""Requests as the gateway saw them, summed into the window's records; only counts and durations are kept."""

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from shared.records import Served, prompt_bucket
from shared.sketch import Sketch


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """One request that ended, or a further answer to it (``requests`` 0). Absent times are None: a refused request has
    no first token. ``itl_us`` are inter-token latencies (ITL) and how often each occurred. ``place`` and
    ``place_category`` (premises, outside) are those of the provider that answered, "" for the rack; ``usd_micro`` is
    what it costs there."""

    model: str
    version: str = ""
    worker: str = ""
    key_id: str = ""
    task_class: str = ""
    outcome: str
    finish: str = ""
    place: str = ""
    place_category: Literal["", "premises", "outside"] = ""
    requests: int = 1
    retries: int = 0
    continuations: int = 0
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0
    usd_micro: int = 0
    ttft_us: int | None = None
    itl_us: tuple[tuple[int, int], ...] = ()
    total_us: int = 0


class _Sum:
    def __init__(self) -> None:
        self.requests = self.retries = self.prompt_tok = self.cached_tok = self.completion_tok = self.usd_micro = 0
        self.ttft, self.itl, self.total = Sketch(), Sketch(), Sketch()


_LABELS = (
    *("model", "version", "worker", "key_id", "task_class", "outcome", "finish", "place", "place_category"),
    "prompt_bucket_tok",
)
Labels = tuple[str, str, str, str, str, str, str, str, str, int]


class Ledger:
    """Sums by label since the last ``drain``. ``on_answered`` receives each request, too (for live metrics)."""

    def __init__(self, on_answered: Callable[[Answered], None] = lambda _: None) -> None:
        self._sums: dict[Labels, _Sum] = {}
        self._on_answered = on_answered

    def record(self, one: Answered) -> None:
        """Count one request, once, at its gateway."""
        labels = (
            one.model,
            # an attempt in the rack may have gone before: what was answered elsewhere is no work of its nodes
            *(("", "") if one.place else (one.version, one.worker)),
            *(one.key_id, one.task_class, one.outcome, one.finish, one.place, one.place_category),
            prompt_bucket(one.prompt_tok) if one.prompt_tok else 0,
        )
        into = self._sums.setdefault(labels, _Sum())
        into.requests += one.requests
        into.retries += one.retries
        into.prompt_tok += one.prompt_tok
        into.cached_tok += one.cached_tok
        into.completion_tok += one.completion_tok
        into.usd_micro += one.usd_micro
        if one.ttft_us is not None:
            into.ttft.add(one.ttft_us)
        for gap, times in one.itl_us:
            into.itl.add(gap, times)
        into.total.add(one.total_us)
        self._on_answered(one)

    def so_far(self) -> list[Served]:
        """The open window's records."""
        return [_served(labels, one) for labels, one in sorted(self._sums.items())]

    def drain(self) -> list[Served]:
        """Return the window's records and reset the sums."""
        served, self._sums = self.so_far(), {}
        return served


def _served(labels: Labels, one: _Sum) -> Served:
    return Served(
        **dict[str, Any](zip(_LABELS, labels, strict=True)),
        requests=one.requests,
        retries=one.retries,
        prompt_tok=one.prompt_tok,
        cached_tok=one.cached_tok,
        completion_tok=one.completion_tok,
        usd_micro=one.usd_micro,
        ttft_us=one.ttft.to_wire(),
        itl_us=one.itl.to_wire(),
        total_us=one.total.to_wire(),
    )
