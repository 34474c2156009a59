"""Cached KV states of prompts: in memory with shared prefixes stored once, and on disk if configured."""

from collections.abc import Callable
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from agent.loader.disk_cache import BLOCK_TOK, Array, DiskCache
from agent.loader.generation import Advance, nothing
from agent.loader.mlx import kv
from agent.loader.prompt_cache import PromptCache, Tokens

Held = tuple[kv.Layers, Tokens]
"""A row's state and the tokens that it covers."""
Restored = tuple[int, list[list[Array]]]
"""Number of the first block that was read from disk, and the blocks."""


class PromptStates:
    """The prompt cache of one model, at most ``budget_bytes`` in memory. ``sliceable``: states can be sliced by tokens;
    only then are they shared between running rows and stored on disk."""

    def __init__(self, weights: Any, budget_bytes: int, disk: DiskCache | None) -> None:
        self._weights = weights
        self.sliceable = kv.sliceable(make_prompt_cache(weights))
        self._memory: PromptCache[Any] = (
            PromptCache(budget_bytes, kv.nbytes, kv.split)
            if self.sliceable
            else PromptCache(budget_bytes, kv.layers_nbytes)
        )
        self._disk = disk if self.sliceable else None
        self.shared = self.sliceable and budget_bytes > 0

    @property
    def bytes(self) -> int:
        """Size of the states in memory."""
        return self._memory.bytes

    @property
    def disk_bytes(self) -> int:
        """Size of the states on disk."""
        return self._disk.bytes if self._disk else 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Hits, misses, tokens saved and evictions since the start."""
        memory = self._memory
        return memory.hits, memory.misses, memory.saved_tok, memory.evictions.total()

    def peek(self, tokens: Tokens) -> int:
        """Number of tokens that ``find`` would return from memory."""
        return self._memory.peek(tokens)

    def find(self, tokens: Tokens) -> tuple[kv.Layers, int]:
        """A state to start from, owned by the row, and the number of tokens that it covers."""
        if (hit := self._memory.find(tokens)) is None:
            return make_prompt_cache(self._weights), 0
        return (kv.join(hit.pieces) if self.sliceable else kv.detached(hit.pieces[0][0])), hit.common_tok

    def keep(self, held: Held | None) -> None:
        """Cache a row's state in memory; parts that are cached already are not stored again."""
        if held is None:
            return
        layers, tokens = held
        if self.sliceable:
            self._memory.put(tokens, lambda begin, end: kv.cut(layers, begin, end))
        else:
            self._memory.put(tokens, lambda begin, end: kv.detached(layers))

    def finished(self, held: Held | None, *, private: bool) -> None:
        """Cache a row's final state, on disk too unless it is ``private``."""
        self.keep(held)
        if held is not None and self._disk is not None and not private:
            layers, tokens = held
            self._disk.offer(tokens, lambda begin, end: kv.to_arrays(kv.cut(layers, begin, end)))

    def read_back(
        self, tokens: Tokens, prefill_s: Callable[[int, float], float], advance: Advance = nothing
    ) -> Restored | None:
        """Blocks on disk that continue the state in memory, if reading them is faster than prefill, which takes
        ``prefill_s`` seconds for (tokens, tokens before them). Called from the preparing thread: the state in memory
        may change meanwhile, so the result is only a hint."""
        if self._disk is None:
            return None
        begin, end = self.peek(tokens) // BLOCK_TOK, self._disk.held(tokens) // BLOCK_TOK
        computing_s = prefill_s((end - begin) * BLOCK_TOK, begin * BLOCK_TOK)
        if end <= begin or self._disk.seconds(end - begin) > computing_s > 0:
            return None
        return begin, self._disk.read(tokens, begin, end, advance)

    def put_back(self, tokens: Tokens, restored: Restored) -> int:
        """Move blocks from disk into memory; returns the number of tokens that were not in memory before."""
        begin, blocks = restored
        first, last = begin * BLOCK_TOK, (begin + len(blocks)) * BLOCK_TOK
        held = self.peek(tokens[: last + 1])
        if not blocks or held < first:
            return 0  # the state that they continue was evicted meanwhile
        whole = kv.stacked([kv.from_arrays(block) for block in blocks])
        self._memory.put(tokens[:last], lambda start, end: kv.part(whole, start - first, end - first))
        return last - max(first, held)

    def shrink(self, to_bytes: int, reason: str) -> None:
        """Evict states from memory until at most ``to_bytes`` are held."""
        self._memory.shrink(to_bytes, reason)

    def clear(self) -> None:
        """Clear the states in memory."""
        self._memory.clear()

    def close(self) -> None:
        """Clear the states in memory, and finish writing to disk."""
        self._memory.clear()
        if self._disk is not None:
            self._disk.close()
