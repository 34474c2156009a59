"""Key/value caches of earlier prompts, by their tokens: least recently used leaves first, counted in bytes.

Holds opaque caches; trimming and copying them is the engine's business. Finding the longest common prefix looks at
every entry, which is right for the tens of entries that fit beside a model.
"""

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

C = TypeVar("C")

MIN_PREFIX_TOK = 8
"""Shorter common prefixes are not worth a copy."""


class Hit(NamedTuple, Generic[C]):
    """A stored cache whose first ``common_tok`` of ``stored_tok`` tokens are also the prompt's."""

    cache: C
    common_tok: int
    stored_tok: int


class PromptCache(Generic[C]):
    """Entries up to ``budget_bytes``; 0 keeps none."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._entries: OrderedDict[tuple[int, ...], tuple[C, int]] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def find(self, prompt: list[int]) -> Hit[C] | None:
        """The entry that shares the longest beginning with ``prompt``; the last prompt token is never counted,
        because one token must be left to start generation from."""
        best, best_key = 0, None
        for key in self._entries:
            common = _common(key, prompt, len(prompt) - 1)
            if common > best:
                best, best_key = common, key
        if best_key is None or best < MIN_PREFIX_TOK:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(best_key)
        return Hit(self._entries[best_key][0], best, len(best_key))

    def peek(self, prompt: list[int]) -> int:
        """How many of the prompt's tokens ``find`` would find, without counting or renewing anything."""
        best = max((_common(key, prompt, len(prompt) - 1) for key in self._entries), default=0)
        return best if best >= MIN_PREFIX_TOK else 0

    def put(self, tokens: list[int], cache: C, size_bytes: int) -> None:
        """Keep a cache that holds exactly ``tokens``; entries that it makes needless go."""
        if size_bytes > self._budget or len(tokens) < MIN_PREFIX_TOK:
            return
        key = tuple(tokens)
        for old in [k for k in self._entries if len(k) <= len(key) and key[: len(k)] == k]:
            self.bytes -= self._entries.pop(old)[1]
        while self._entries and self.bytes + size_bytes > self._budget:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
            self.evictions += 1
        self._entries[key] = (cache, size_bytes)
        self.bytes += size_bytes

    def clear(self) -> None:
        """Drop everything; not counted as evictions."""
        self._entries.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)


def _common(stored: tuple[int, ...], prompt: list[int], limit: int) -> int:
    limit = min(limit, len(stored))
    return next((n for n in range(limit) if stored[n] != prompt[n]), limit)
