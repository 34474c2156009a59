"""Whose work a loader did: its busy time, divided between the served names that it answered."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from .raw import Batch

Two = tuple[Fraction, Fraction]
ZERO = Fraction()
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
    """A loader, and the tokens that each served name had from it: uncached prompt tokens and answer tokens."""

    node: str
    loader: str
    version: str
    prefill_us: int = 0
    decode_us: int = 0
    names: dict[str, Two] = field(default_factory=lambda: defaultdict(lambda: (ZERO, ZERO)))

    @property
    def busy_us(self) -> int:
        """Of the loader."""
        return self.prefill_us + self.decode_us

    def parts(self) -> dict[str, Two]:
        """Prefill and decode time of each name, in microseconds. The key "" is work nobody was answered for."""
        uncached, answer = (sum((one[n] for one in self.names.values()), ZERO) for n in (0, 1))
        found = {
            name: (_part(self.prefill_us, one[0], uncached), _part(self.decode_us, one[1], answer))
            for name, one in sorted(self.names.items())
        }
        lost = (Fraction(0 if uncached else self.prefill_us), Fraction(0 if answer else self.decode_us))
        return found | ({"": lost} if sum(lost) else {})

    def add(self, name: str, uncached: Fraction, answer: Fraction) -> None:
        """Tokens of a name as well."""
        had = self.names[name]
        self.names[name] = (had[0] + uncached, had[1] + answer)


def _part(us: int, tokens: Fraction, whole: Fraction) -> Fraction:
    return us * tokens / whole if whole else ZERO


def pools(batches: Iterable[Batch]) -> list[Pool]:
    """Of every node. A name without a loader of its own had its tokens from those of its node and version, in
    proportion to their prefill and decode time."""
    counted = list(batches)
    found = {key: Pool(*key, *both) for key, both in sorted(_loaders(counted).items())}
    for (worker, name, version), tokens in sorted(served_tokens(counted).items()):
        own = found.get((worker, name, version))
        mine = [own] if own else [p for p in found.values() if (p.node, p.version) == (worker, version)]
        prefill, decode = sum(p.prefill_us for p in mine), sum(p.decode_us for p in mine)
        for pool in mine:
            uncached = Fraction(tokens.uncached) * (
                1 if own else _part(pool.prefill_us, Fraction(1), Fraction(prefill))
            )
            answer = Fraction(tokens.answer) * (1 if own else _part(pool.decode_us, Fraction(1), Fraction(decode)))
            pool.add(name, uncached, answer)
    return list(found.values())


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
    for one in (record for batch in batches for record in batch.served):
        if outcome and one.get("outcome", "ok") != outcome:
            continue
        tokens = Tokens(one.get("prompt_tok", 0), one.get("cached_tok", 0), one.get("completion_tok", 0))
        found[one.get("worker", ""), one["model"], one.get("version", "")].add(tokens)
    return dict(found)


def busy_us(batches: Iterable[Batch]) -> dict[str, int]:
    """Busy time of each node."""
    found: dict[str, int] = defaultdict(int)
    for batch in batches:
        for one in batch.of("engine"):
            found[batch.node] += one.get("busy_prefill_us", 0) + one.get("busy_decode_us", 0)
    return found
