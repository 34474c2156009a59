"""Which served name caused which part of each node's cost: busy time by loader, idle time by memory and work. Pure.

A loader is one (node, model, version) of the engines' records. What a name was answered at a worker belongs to the
loader there with its name and version; a name that stands for another model's loader (an alias, or a name that a swap
gave away) has none, and its work belongs to the loaders of that node and version, in proportion to their time. The
prefill time of a loader is divided by uncached prompt tokens, its decode time by answer tokens: an answer token takes
much longer than a token of a prompt. Parts are exact fractions until they are money; parts of money add up.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Literal, NamedTuple, TypeVar

import msgspec

from aggregator.window import ServedSum, Window

MILLION = Decimal(1_000_000)
Loader = tuple[str, str]
"""Model and version, on one node."""
Times = tuple[Fraction, Fraction]
"""Microseconds of prefill and of decode."""
Kind = Literal["model", "unattributed", "idle", "silent"]
K = TypeVar("K", str, Loader, int)
_NOBODY = ""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a node's cost: a model's work there, ``unattributed`` (work that answered nobody), ``idle``, or
    ``silent`` (owned time in which it did not report). The rows of a node add up to its cost. ``busy_s`` are seconds of
    work, ``quiet_s`` those of the other two; ``tokens`` are the model's prompt and answer tokens there, of all
    outcomes."""

    node: str
    model: str
    kind: Kind
    busy_s: float
    cost: Decimal
    quiet_s: float = 0.0
    tokens: int = 0


class Payable(NamedTuple):
    """A priced node's cost in three parts, and the seconds of the last two."""

    busy: Decimal
    idle: Decimal
    silent: Decimal
    idle_s: float
    silent_s: float


class Work:
    """Requests, tokens and time of one served name, at some nodes."""

    def __init__(self) -> None:
        self.requests = self.cut = self.prompt_tok = self.cached_tok = self.completion_tok = 0
        self.prefill_us = self.decode_us = Fraction(0)

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens."""
        return self.prompt_tok + self.completion_tok

    @property
    def busy_us(self) -> Fraction:
        """Prefill and decode."""
        return self.prefill_us + self.decode_us

    def answer(self, served: ServedSum) -> None:
        """Count requests of any outcome."""
        if served.outcome == "ok":
            self.requests += served.requests
            self.cut += served.requests if served.finish == "length" else 0
        self.prompt_tok += served.prompt_tok
        self.cached_tok += served.cached_tok
        self.completion_tok += served.completion_tok

    def take(self, times: Times) -> None:
        """Count a loader's time."""
        self.prefill_us += times[0]
        self.decode_us += times[1]


class Sum:
    """One served name: its work at all nodes and at priced ones, and its cost. Whatever is divided into money, or
    divides it, is that of priced nodes."""

    def __init__(self) -> None:
        self.whole, self.priced = Work(), Work()
        self.direct: Decimal | None = None
        self.prefill = self.idle = Decimal(0)
        self.nodes: set[str] = set()


class Allocated(NamedTuple):
    """Every served name's sums, and the rows of all priced nodes."""

    sums: dict[str, Sum]
    rows: tuple[Row, ...]


def allocate(window: Window, nodes: Mapping[str, Payable | None]) -> Allocated:
    """Allocate the cost of every node of a span; None is a node without a price, whose work counts all the same."""
    sums, tokens = _counted(window, {node for node, payable in nodes.items() if payable is not None})
    rows: list[Row] = []
    for node, payable in nodes.items():
        parts = shares(window, node)
        for names in parts.values():
            for name, times in names.items():
                sums[name].whole.take(times)
                if payable is not None:
                    sums[name].priced.take(times)
                    sums[name].nodes.add(node)
        if payable is not None:
            rows += _rows(window, node, payable, parts, sums, tokens)
    return Allocated(sums, tuple(rows))


def _counted(window: Window, priced: set[str]) -> tuple[dict[str, Sum], dict[tuple[str, str], int]]:
    """Requests and tokens of every served name, and the tokens of each at each worker."""
    sums: dict[str, Sum] = {}
    tokens: dict[tuple[str, str], int] = {}
    for served in window.served:
        if not served.model:
            continue
        total = sums.setdefault(served.model, Sum())
        total.whole.answer(served)
        at = (served.worker, served.model)
        tokens[at] = tokens.get(at, 0) + served.prompt_tok + served.completion_tok
        if served.worker in priced:
            total.priced.answer(served)
    return sums, tokens


def loaders(window: Window, node: str) -> dict[Loader, tuple[int, int]]:
    """A node's loaders: microseconds of prefill and decode."""
    found: dict[Loader, tuple[int, int]] = {}
    for one in window.engines:
        if one.node == node:
            prefill, decode = found.get((one.model, one.version), (0, 0))
            found[one.model, one.version] = (prefill + one.busy_prefill_us, decode + one.busy_decode_us)
    return dict(sorted(found.items()))


def shares(window: Window, node: str) -> dict[Loader, dict[str, Times]]:
    """The time of a node's loaders, divided between the served names that they worked for."""
    busy = loaders(window, node)
    work: dict[str, dict[str, tuple[int, int]]] = {}
    for served in window.served:
        if served.worker == node and served.model:
            names = work.setdefault(served.version, {})
            uncached, answer = names.get(served.model, (0, 0))
            uncached += max(0, served.prompt_tok - served.cached_tok)
            names[served.model] = (uncached, answer + served.completion_tok)
    return {(model, version): _joined(model, _alike(busy, version), work.get(version, {})) for model, version in busy}


def _alike(busy: Mapping[Loader, tuple[int, int]], version: str) -> dict[str, tuple[int, int]]:
    return {model: times for (model, v), times in busy.items() if v == version}


def _joined(model: str, alike: Mapping[str, tuple[int, int]], work: Mapping[str, tuple[int, int]]) -> dict[str, Times]:
    """One loader's time by served name; ``alike`` are all loaders of its node and version, ``work`` the uncached prompt
    tokens and answer tokens of each name there."""
    found: dict[str, list[Fraction]] = {}
    for kind in (0, 1):
        mine, all_us = alike[model][kind], sum(times[kind] for times in alike.values())
        if not mine:
            continue
        # a name without a loader of its own was answered by all of them, each in proportion to its time
        part = {model: Fraction(1)} | {name: Fraction(mine, all_us) for name in work if name not in alike}
        weights = {name: work[name][kind] * share for name, share in part.items() if name in work}
        if total := sum(weights.values()):
            for name, weight in weights.items():
                found.setdefault(name, [Fraction(0), Fraction(0)])[kind] = mine * weight / total
    return {name: (prefill, decode) for name, (prefill, decode) in sorted(found.items()) if prefill + decode}


def _rows(
    window: Window,
    node: str,
    payable: Payable,
    parts: Mapping[Loader, Mapping[str, Times]],
    sums: Mapping[str, Sum],
    tokens: Mapping[tuple[str, str], int],
) -> list[Row]:
    """Allocate one node's cost to the names, and write it down."""
    busy = loaders(window, node)
    mine = {name: _added(names.get(name) for names in parts.values()) for names in parts.values() for name in names}
    lost = sum(map(sum, busy.values())) - sum((sum(times) for times in mine.values()), Fraction(0))
    direct = divided(payable.busy, {_NOBODY: lost} | {name: sum(times, Fraction(0)) for name, times in mine.items()})
    rows = []
    for name, times in sorted(mine.items()):
        us, money, total = sum(times, Fraction(0)), direct.get(name, Decimal(0)), sums[name]
        total.direct = (total.direct or Decimal(0)) + money
        total.prefill += rounded(Fraction(money) * times[0] / us)
        count = tokens.get((node, name), 0)
        rows.append(Row(node=node, model=name, kind="model", busy_s=in_s(us), cost=money, tokens=count))
    for loader, money in divided(payable.idle, _idle_weights(window, node, busy)).items():
        names = {name: sum(times, Fraction(0)) for name, times in parts[loader].items()}
        left = sum(busy[loader]) - sum(names.values(), Fraction(0))
        for name, part in divided(money, {_NOBODY: left} | names).items():
            if name != _NOBODY:
                sums[name].idle += part
    if lost_money := payable.busy - sum((row.cost for row in rows), Decimal(0)):
        rows.append(Row(node=node, model="", kind="unattributed", busy_s=in_s(lost), cost=lost_money))
    quiet: tuple[tuple[Kind, Decimal, float], ...] = (
        ("idle", payable.idle, payable.idle_s),
        ("silent", payable.silent, payable.silent_s),
    )
    rows += [
        Row(node=node, model="", kind=kind, busy_s=0.0, cost=cost, quiet_s=round(lasted_s, 3))
        for kind, cost, lasted_s in quiet
        if cost or lasted_s
    ]
    return rows


def _added(times: Iterable[Times | None]) -> Times:
    known = [one for one in times if one is not None]
    return sum((p for p, _ in known), Fraction(0)), sum((d for _, d in known), Fraction(0))


def _idle_weights(window: Window, node: str, busy: Mapping[Loader, tuple[int, int]]) -> dict[Loader, Fraction]:
    """Weights for idle cost: pinned loaders by memory over time, the rest by busy time."""
    ready = [r for r in window.residents if r.node == node and r.state == "ready"]
    held = {at: sum((r.need_bytes or 0) * r.length_ms for r in ready if (r.model, r.version) == at) for at in busy}
    pinned = {at: h for at, h in held.items() if any(r.pinned for r in ready if (r.model, r.version) == at)}
    free = {at: sum(us) for at, us in busy.items() if at not in pinned}
    bytes_, free_us = sum(pinned.values()), sum(free.values())
    if not bytes_:
        return {at: Fraction(sum(us)) for at, us in busy.items()}
    if not free_us:
        return {at: Fraction(h) for at, h in pinned.items()}
    whole = sum(held.values())
    weights = {at: Fraction(h, whole) for at, h in pinned.items()}
    return weights | {at: Fraction(whole - bytes_, whole) * us / free_us for at, us in free.items()}


def divided(money: Decimal | None, weights: Mapping[K, Fraction | int]) -> dict[K, Decimal]:
    """Divide an amount by weights; the last part in order takes the rounding remainder, so that the parts add up.
    Empty without an amount or a weight."""
    wanted = sorted((key, weight) for key, weight in weights.items() if weight > 0)
    if money is None or not wanted:
        return {}
    left, total = money, sum(weight for _, weight in wanted)
    found: dict[K, Decimal] = {}
    for key, weight in wanted[:-1]:
        found[key] = rounded(Fraction(money) * weight / total)
        left -= found[key]
    found[wanted[-1][0]] = left
    return found


def rounded(value: Decimal | Fraction) -> Decimal:
    """To millionths, half to even: the precision of all money in reports."""
    return Decimal(round(Fraction(value) * 1_000_000)).scaleb(-6)


def per_m(money: Decimal | None, tokens: int) -> Decimal | None:
    """The price of a million tokens."""
    return rounded(Fraction(money) / tokens * 1_000_000) if money is not None and tokens > 0 else None


def in_s(us: Fraction | int) -> float:
    """Seconds, to milliseconds."""
    return float(round(Fraction(us) / 1_000_000, 3))
