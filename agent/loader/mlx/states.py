"""States of prompts that are kept: in memory by what they share, and on disk where that is wanted."""

from collections.abc import Callable
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from agent.loader.disk_cache import BLOCK_TOK, Array, DiskCache
from agent.loader.mlx import kv
from agent.loader.prompt_cache import PromptCache, Tokens, as_tokens

Held = tuple[kv.Layers, list[int]]
"""A row's state and the tokens that it holds."""
Restored = tuple[int, list[list[Array]]]
"""Number of the first block that was read from disk, and the blocks."""


class PromptStates:
    """The prompt cache of one model, at most ``budget_bytes`` in memory. ``sliceable`` says that states can be cut by
    tokens; only such are shared between running rows and kept on disk."""

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
        """What the states in memory occupy."""
        return self._memory.bytes

    @property
    def disk_bytes(self) -> int:
        """What those on disk occupy."""
        return self._disk.bytes if self._disk else 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Hits, misses, tokens saved and evictions since the beginning."""
        memory = self._memory
        return memory.hits, memory.misses, memory.saved_tok, memory.evictions.total()

    def peek(self, tokens: Tokens) -> int:
        """How many of the tokens ``find`` would find in memory."""
        return self._memory.peek(tokens)

    def find(self, tokens: Tokens) -> tuple[kv.Layers, int]:
        """A state to start from, of the row's own, and how many of the tokens it holds already."""
        hit = self._memory.find(tokens)
        if hit is None:
            return make_prompt_cache(self._weights), 0
        return (kv.join(hit.pieces) if self.sliceable else kv.detached(hit.pieces[0][0])), hit.common_tok

    def keep(self, held: Held | None) -> None:
        """Keep a row's state in memory; what is kept already is not kept again."""
        if held is None:
            return
        layers, tokens = held
        if self.sliceable:
            self._memory.put(as_tokens(tokens), lambda begin, end: kv.cut(layers, begin, end))
        else:
            self._memory.put(as_tokens(tokens), lambda begin, end: kv.detached(layers))

    def finished(self, held: Held | None, *, private: bool) -> None:
        """Keep what a row held at its end, on disk too unless it was ``private``."""
        self.keep(held)
        if held is not None and self._disk is not None and not private:
            layers, tokens = held
            self._disk.offer(as_tokens(tokens), lambda begin, end: kv.to_arrays(kv.cut(layers, begin, end)))

    def read_back(self, tokens: Tokens, prefill_s: Callable[[int, float], float]) -> Restored | None:
        """Blocks on disk that go on from what memory holds, where reading them is quicker than the ``prefill_s``
        seconds of (tokens, tokens before them).

        Called from the preparing thread: what memory holds may change meanwhile, so it is no more than a hint.
        """
        if self._disk is None:
            return None
        begin, end = self.peek(tokens) // BLOCK_TOK, self._disk.held(tokens) // BLOCK_TOK
        computing_s = prefill_s((end - begin) * BLOCK_TOK, begin * BLOCK_TOK)
        if end <= begin or self._disk.seconds(end - begin) > computing_s > 0:
            return None
        return begin, self._disk.read(tokens, begin, end)

    def put_back(self, tokens: Tokens, restored: Restored) -> int:
        """Blocks from disk into memory; the number of tokens that memory did not hold before."""
        begin, blocks = restored
        first, last = begin * BLOCK_TOK, (begin + len(blocks)) * BLOCK_TOK
        held = self.peek(tokens[: last + 1])
        if not blocks or held < first:
            return 0  # what they go on from has left memory meanwhile
        whole = kv.stacked([kv.from_arrays(block) for block in blocks])
        self._memory.put(tokens[:last], lambda start, end: kv.part(whole, start - first, end - first))
        return last - max(first, held)

    def shrink(self, to_bytes: int, reason: str) -> None:
        """Give up states in memory until at most so many bytes are held."""
        self._memory.shrink(to_bytes, reason)

    def clear(self) -> None:
        """Forget what is in memory."""
        self._memory.clear()

    def close(self) -> None:
        """Forget what is in memory, and finish writing to disk."""
        self._memory.clear()
        if self._disk is not None:
            self._disk.close()
