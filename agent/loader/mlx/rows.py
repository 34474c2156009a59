"""The rows of an engine from submission to their end: waiting, in prefill or decoding; and who waits for whose prefix.

``agent.loader.mlx.scheduler`` says which row moves, this keeps the books of it and moves the states.
"""

import time
from collections.abc import Callable
from typing import Any

from agent.loader.mlx import kv
from agent.loader.mlx.batch import Batch
from agent.loader.mlx.constraint import TooComplex, too_complex
from agent.loader.mlx.row import Row
from agent.loader.mlx.states import Held, PromptStates
from agent.loader.prompt_cache import most_shared
from agent.loader.row_placement import Limits, Placed, Placement
from agent.wire.frames import Failed, Frame
from agent.wire.priority import Turns

SHARE_TOK = 64
"""A common prefix of this many tokens is worth waiting for the request that computes it."""
MAX_BREAKS = 3
"""A row ends when this many batches have failed with it and it made no progress."""


class Rows:
    """Rows by id, and where each of them is. ``due`` are frames for the next step; ``turns`` knows what each has waited
    for higher ranks."""

    def __init__(self, cache: PromptStates, new_batch: Callable[[], Batch]) -> None:
        self.cache, self._new_batch = cache, new_batch
        self.by_id: dict[int, Row] = {}
        self.turns = Turns()
        self.waiting: list[Row] = []
        self.prefilling: list[Row] = []
        self.batches: list[Batch] = []
        self.due: list[Frame] = []

    @property
    def running(self) -> list[Row]:
        """Rows in batches."""
        return [row for batch in self.batches for row in batch.rows.values()]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the running rows' KV cache, padding included."""
        return sum(batch.kv_bytes for batch in self.batches)

    @property
    def before_tok(self) -> float:
        """Mean number of tokens before the chunks that are being prefilled."""
        held = [row.length_tok - row.left_tok for row in self.prefilling]
        return sum(held) / len(held) if held else 0.0

    def placement(self, limits: Limits) -> Placement:
        """The batches as facts for a decision."""
        return Placement(tuple(tuple(map(self._placed, batch.rows.values())) for batch in self.batches), limits)

    def _placed(self, row: Row) -> Placed:
        return Placed(row.id, row.length_tok, row.begun_s, len(row.made), row in self.prefilling, row.apart)

    def add(self, row: Row) -> None:
        """Queue a new row."""
        self.by_id[row.id] = row
        self.turns.arrive(row.id, row.request.priority, row.since_s)
        self.waiting.append(row)
        self.queue_behind(self.prefilling, [row])

    def cancel(self, row_id: int) -> Row | None:
        """Forget a row and cache its state; None when it is unknown."""
        if (row := self.by_id.get(row_id)) is None:
            return None
        self.forget(row)
        if row in self.waiting:
            self.waiting.remove(row)
            self.cache.keep(row.partial)
        else:
            self.cache.keep(self._taken_out(row))
        self._release(row)
        return row

    def fail(self, row: Row) -> None:
        """End a row that cannot be continued."""
        self.forget(row)
        self._release(row)
        lost = Failed(id=row.id, code="engine_failed", message="the engine cannot continue this request")
        self.due.append(too_complex(row.request) if isinstance(row.broken, TooComplex) else lost)

    def forget(self, row: Row) -> None:
        """A row has ended."""
        del self.by_id[row.id]
        self.turns.leave(row.id)

    def taken_due(self) -> list[Frame]:
        """Return the frames that are due and forget them."""
        due, self.due = self.due, []
        return due

    def batch(self, at: int) -> Batch:
        """The batch of this index, a new one after the last."""
        if at == len(self.batches):
            self.batches.append(self._new_batch())
        return self.batches[at]

    def set_aside(self, row: Row) -> None:
        """Preempt a row: remove it from the batch with its partial state; it resumes at its next turn."""
        if (held := self._taken_out(row)) is not None:
            row.partial = (kv.detached(held[0]), held[1])
            if any(other.behind is row for other in self.waiting):
                self.cache.keep(held)
        self._release(row)
        self.turns.back(row.id, time.perf_counter())
        self.waiting.append(row)

    def put_back(self, row: Row) -> None:
        """Preempt a row and cache its state; it is computed again from its known tokens."""
        self.cache.keep(self._taken_out(row))
        self._requeue(row)

    def rebuild(self, batch: Batch) -> None:
        """Discard a failed batch; its rows restart from their known tokens. The culprit is unknown: a row that is in a
        second failed batch without progress gets a batch of its own, and at the next failure it ends."""
        batch.close()
        self.batches.remove(batch)
        for row in list(batch.rows.values()):
            if row in self.prefilling:
                self.prefilling.remove(row)
            row.breaks += 1
            if row.breaks >= MAX_BREAKS:
                self.fail(row)
            else:
                self._requeue(row)

    def close_idle(self) -> None:
        """Close batches without rows, except the last one."""
        idle = [batch for batch in self.batches if not batch.rows]
        for batch in idle if len(idle) < len(self.batches) else idle[1:]:
            batch.close()
            self.batches.remove(batch)

    def close(self) -> None:
        """Close all batches."""
        for batch in self.batches:
            batch.close()
        self.batches.clear()

    def state_of(self, row: Row) -> tuple[kv.Layers, int]:
        """The state that a row starts from, and the number of tokens that it covers."""
        if row.partial is not None:
            (layers, held), row.partial = row.partial, None
            return layers, len(held)
        self._learn_from_company(row)
        return self.cache.find(row.tokens)

    def queue_behind(self, leaders: list[Row], rows: list[Row]) -> None:
        """Let rows that share a long prefix with one in prefill wait for it."""
        if not self.cache.shared:
            return
        for row in rows:
            least_tok = len(row.prompt) - row.left_tok + SHARE_TOK
            found = most_shared(row.array[:-1], [leader.array for leader in leaders], least_tok)
            if found and row.partial is None:
                row.behind, row.shared_tok = leaders[found[0]], found[1]

    def progress(self, row: Row, response: Any) -> None:
        """Note how much of a prompt is computed; rows that wait for its prefix start when it is."""
        done, total = response.progress
        row.left_tok = 0 if response.end_of_prompt else max(1, total - done)
        if row.left_tok <= 1 and row in self.prefilling:
            self.prefilling.remove(row)  # its last token is computed in the next decode step
            row.rank = row.request.priority.rank  # it had its turn, however it came to it
        held_tok = row.length_tok - row.left_tok
        behind = [other for other in self.waiting if other.behind is row]
        if ready := [other for other in behind if other.shared_tok <= held_tok or row.left_tok <= 1]:
            self.cache.keep(row.state)
        for other in ready:
            other.behind = None
            other.left_tok = other.length_tok - self.cache.peek(other.tokens)

    def _learn_from_company(self, row: Row) -> None:
        """Cache the state of a running row whose common prefix with this one is longer than the cached one."""
        if not self.cache.shared:
            return
        running = self.running
        computed = [other.tokens[: other.length_tok - other.left_tok] for other in running]
        if found := most_shared(row.tokens[:-1], computed, self.cache.peek(row.tokens) + SHARE_TOK):
            self.cache.keep(running[found[0]].state)

    def _requeue(self, row: Row) -> None:
        row.partial = None
        if row.batch is not None:
            row.left_batch()
        row.left_tok = row.length_tok - self.cache.peek(row.tokens)
        self._release(row)
        self.turns.back(row.id, time.perf_counter())
        self.waiting.append(row)

    def _release(self, leader: Row) -> None:
        """Nobody waits any longer for this row's prefix."""
        for row in self.waiting:
            if row.behind is leader:
                row.behind = None

    def _taken_out(self, row: Row) -> Held | None:
        if row in self.prefilling:
            self.prefilling.remove(row)
        assert row.batch is not None
        return row.batch.remove(row)
