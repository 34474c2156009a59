"""One ``BatchGenerator`` of mlx-lm's and the rows in it, by its public-shaped calls only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_lm.generate import BatchGenerator

from agent.loader.mlx.kv import Layers
from agent.loader.mlx.sampling import Processor, Sampler
from agent.loader.scheduling import Block

if TYPE_CHECKING:
    from agent.loader.mlx.row import Row


class Entry(NamedTuple):
    """What a row goes in with: tokens to compute after ``held`` ones that its state covers."""

    fresh: list[int]
    held: list[int]
    layers: Layers
    max_tokens: int
    sampler: Sampler | None
    processors: list[Processor]


class Worked(NamedTuple):
    """What one step did: mlx-lm's responses, and how many prompt tokens took how many seconds."""

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

    @property
    def block(self) -> Block:
        """How much memory it takes."""
        return Block(len(self.rows), max((row.length_tok for row in self.rows.values()), default=0))

    def add(self, rows: Sequence["Row"], entries: Sequence[Entry]) -> None:
        """Rows join; they are prefilled side by side."""
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

    def remove(self, row: "Row") -> tuple[Layers, list[int]] | None:
        """A row leaves with its state and the tokens that this holds; None when it holds nothing yet."""
        found = self.generator.remove([row.uid], return_prompt_caches=True)
        self.forget(row)
        return _held(found.values())

    def forget(self, row: "Row") -> None:
        """A row that has ended by itself."""
        del self.rows[row.uid]
        row.batch = None

    def state(self, row: "Row") -> tuple[Layers, list[int]] | None:
        """A row's state and the tokens that it holds, while it stays."""
        return _held(self.generator.extract_cache([row.uid]).values())

    def step(self, chunk_tok: int) -> Worked:
        """A token for every decoding row and at most ``chunk_tok`` of each prompt. Raises whatever a row provokes."""
        self.generator.prefill_step_size = chunk_tok
        with self.generator.stats() as stats:
            prefilled, generated = self.generator.next()
        return Worked(prefilled, generated, int(stats.prompt_tokens), float(stats.prompt_time))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, padding included."""
        return int(self.generator.prompt_cache_nbytes)

    def close(self) -> None:
        """Give everything back."""
        self.generator.close()


def _held(found: Any) -> tuple[Layers, list[int]] | None:
    for layers, tokens in found:
        if tokens and not any(layer.empty() for layer in layers):
            return layers, list(tokens)
    return None
