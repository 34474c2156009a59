"""One mlx-lm ``BatchGenerator`` and the rows in it, through its public methods only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_lm.generate import BatchGenerator

from agent.loader.mlx.kv import Layers
from agent.loader.mlx.sampling import Processor, Sampler
from agent.loader.prompt_cache import Tokens, as_tokens

if TYPE_CHECKING:
    from agent.loader.mlx.row import Row


class Entry(NamedTuple):
    """Input of a row: ``fresh`` tokens to compute after the ``held`` ones that its state covers."""

    fresh: list[int]
    held: list[int]
    layers: Layers
    max_tokens: int
    sampler: Sampler | None
    processors: list[Processor]


class Worked(NamedTuple):
    """Result of one step: mlx-lm's responses, and the number and time of prefilled prompt tokens."""

    prefilled: list[Any]
    generated: list[Any]
    prompt_tok: int
    prompt_s: float


class Batch:
    """Rows that are prefilled and decoded together."""

    def __init__(self, weights: Any, ends: Sequence[int], rows: int, chunk_tok: int) -> None:
        self.generator: Any = BatchGenerator(
            weights,
            stop_tokens=[[token] for token in ends],
            completion_batch_size=rows,
            prefill_batch_size=rows,
            prefill_step_size=chunk_tok,
        )
        self.rows: dict[int, Row] = {}

    def add(self, rows: Sequence["Row"], entries: Sequence[Entry]) -> None:
        """Add rows; they are prefilled together."""
        uids = self.generator.insert_segments(
            [[entry.fresh] for entry in entries],
            max_tokens=[entry.max_tokens for entry in entries],
            caches=[entry.layers for entry in entries],
            all_tokens=[entry.held for entry in entries],
            samplers=[entry.sampler for entry in entries],
            logits_processors=[entry.processors for entry in entries],
        )
        for row, uid in zip(rows, uids, strict=True):
            row.batch, row.uid = self, uid
            self.rows[uid] = row

    def remove(self, row: "Row") -> tuple[Layers, Tokens] | None:
        """Remove a row; returns its state and the tokens that it covers, None when it is empty."""
        found = self.generator.remove([row.uid], return_prompt_caches=True)
        self.forget(row)
        return _held(row, found.values())

    def forget(self, row: "Row") -> None:
        """Drop a row that has ended by itself."""
        del self.rows[row.uid]
        row.left_batch()

    def state(self, row: "Row") -> tuple[Layers, Tokens] | None:
        """A running row's state and the tokens that it covers."""
        return _held(row, self.generator.extract_cache([row.uid]).values())

    def step(self, chunk_tok: int) -> Worked:
        """A token for every decoding row and at most ``chunk_tok`` of each prompt. Raises whatever a row causes."""
        self.generator.prefill_step_size = chunk_tok
        with self.generator.stats() as stats:
            prefilled, generated = self.generator.next()
        return Worked(prefilled, generated, int(stats.prompt_tokens), float(stats.prompt_time))

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache, padding included."""
        return int(self.generator.prompt_cache_nbytes)

    def close(self) -> None:
        """Release all resources."""
        self.generator.close()


def _held(row: "Row", found: Any) -> tuple[Layers, Tokens] | None:
    for layers, tokens in found:
        if tokens and not any(layer.empty() for layer in layers):
            return layers, as_tokens(row.request.cache, tokens)
    return None
