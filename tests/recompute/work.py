"""Whose work a loader did: its busy time, divided between the served names that it answered."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from .raw import Batch

LoaderKey = tuple[str, str, str]
"""Node, model, version."""


@dataclass
class Tokens:
    """Of one name at one pool or key: requests of all outcomes."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0

    @property
    def uncached(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt - self.cached

    @property
    def whole(self) -> int:
        """Prompt and answer."""
        return self.prompt + self.answer

    def add(self, other: "Tokens") -> None:
        """These as well."""
        self.prompt += other.prompt
        self.cached += other.cached
        self.answer += other.answer


@dataclass
class Pool:
    """Loaders of one node whose work is divided together, and the tokens of those who used it."""

    node: str
    loaders: list[str] = field(default_factory=list)
    prefill_us: int = 0
    decode_us: int = 0
    names: dict[str, Tokens] = field(default_factory=lambda: defaultdict(Tokens))

    @property
    def busy_us(self) -> int:
        """Of its loaders."""
        return self.prefill_us + self.decode_us

    def parts(self) -> dict[str, tuple[Fraction, Fraction]]:
        """Prefill and decode time of each name, in microseconds. The key "" is work nobody was answered for."""
        uncached = sum(one.uncached for one in self.names.values())
        answer = sum(one.answer for one in self.names.values())
        found = {
            name: (_part(self.prefill_us, one.uncached, uncached), _part(self.decode_us, one.answer, answer))
            for name, one in sorted(self.names.items())
        }
        lost = (Fraction(0 if uncached else self.prefill_us), Fraction(0 if answer else self.decode_us))
        return found | ({"": lost} if sum(lost) else {})


def _part(us: int, tokens: int, whole: int) -> Fraction:
    return Fraction(us * tokens, whole) if whole else Fraction()


def pools(batches: Iterable[Batch]) -> list[Pool]:
    """Of every node."""
    counted = list(batches)
    loaders = _loaders(counted)
    found = {key: Pool(key[0], [key[1]], *both) for key, both in sorted(loaders.items())}
    served = served_tokens(counted)
    for (worker, name, version), _ in sorted(served.items()):
        if (worker, name, version) not in loaders:
            _join(found, worker, version)
    for (worker, name, version), tokens in sorted(served.items()):
        if pool := found.get((worker, name, version)) or _any(found, worker, version):
            pool.names[name].add(tokens)
    return list({id(pool): pool for pool in found.values()}.values())


def _any(found: dict[LoaderKey, Pool], node: str, version: str) -> Pool | None:
    return next((pool for key, pool in found.items() if (key[0], key[2]) == (node, version)), None)


def _join(found: dict[LoaderKey, Pool], node: str, version: str) -> None:
    """The loaders of a node and version become one pool: a name is served there that has no loader of its own."""
    keys = [key for key in found if (key[0], key[2]) == (node, version)]
    parts = list({id(found[key]): found[key] for key in keys}.values())
    if len(parts) > 1:
        one = Pool(
            node,
            [name for pool in parts for name in pool.loaders],
            sum(pool.prefill_us for pool in parts),
            sum(pool.decode_us for pool in parts),
        )
        found |= dict.fromkeys(keys, one)


def _loaders(batches: Iterable[Batch]) -> dict[LoaderKey, tuple[int, int]]:
    sums: dict[LoaderKey, list[int]] = defaultdict(lambda: [0, 0])
    for batch in batches:
        for one in batch.of("engine"):
            both = sums[batch.node, one["model"], one["version"]]
            both[0] += one.get("busy_prefill_us", 0)
            both[1] += one.get("busy_decode_us", 0)
    return {key: (both[0], both[1]) for key, both in sums.items()}


def served_tokens(batches: Iterable[Batch], outcome: str = "") -> dict[LoaderKey, Tokens]:
    """Tokens by worker, name and version; of all outcomes or of one."""
    found: dict[LoaderKey, Tokens] = defaultdict(Tokens)
    for one in (record for batch in batches for record in batch.of("served")):
        if outcome and one.get("outcome", "ok") != outcome:
            continue
        tokens = Tokens(one.get("prompt_tok", 0), one.get("cached_tok", 0), one.get("completion_tok", 0))
        found[one.get("worker", ""), one["model"], one.get("version", "")].add(tokens)
    return {key: one for key, one in found.items() if one.whole}


def busy_us(batches: Iterable[Batch]) -> dict[str, int]:
    """Busy time of each node."""
    found: dict[str, int] = defaultdict(int)
    for batch in batches:
        for one in batch.of("engine"):
            found[batch.node] += one.get("busy_prefill_us", 0) + one.get("busy_decode_us", 0)
    return found
