"""Times steps of a model apart from the engine's rows: nothing of it is counted, kept or sampled.

It goes through the same ``BatchGenerator`` as requests do. One row's prompt grows chunk by chunk; batches to decode are
made of copies of its state. Tokens are greedy, so no random state is touched.
"""

import time
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from agent.loader.calibration import UNTIMED, Decode, Prefill, Task, Verify

_WORDS = 97
"""Tokens of the prompt repeat after this many."""
_PROMPT_TOK = 4_096
"""More than is ever computed of it."""


class StepTimer:
    """``vocabulary`` is the number of tokens; those of the prompt are taken from it."""

    def __init__(self, weights: Any, vocabulary: int) -> None:
        self._weights, self._vocabulary = weights, vocabulary
        self._prompt: Any = None
        self._batch: tuple[Task, Any] | None = None
        self._steps = 0

    def measure(self, task: Task) -> float | None:
        """Perform one step of a task; its microseconds, None for one that is not timed."""
        if isinstance(task, Prefill):
            return self._prefilled(task)
        if self._batch is None or self._batch[0] != task:
            self._batch = None  # freed before the next one is made
            self._batch, self._steps = (task, self._made(task)), 0
        self._steps += 1
        held = self._batch[1]
        us = self._verified(task, held) if isinstance(task, Verify) else _timed(held.next)
        return us if self._steps > UNTIMED else None

    def rest(self) -> None:
        """Give back all memory."""
        if self._prompt is not None:
            self._batch = self._prompt = None
            mx.synchronize()
            mx.clear_cache()

    def _prefilled(self, task: Prefill) -> float:
        self._batch = None
        if not task.done_tok:
            self._prompt = None
            self._prompt = BatchGenerator(self._weights, completion_batch_size=1, prefill_batch_size=1)
            ids = [(7 + n % _WORDS) % self._vocabulary for n in range(_PROMPT_TOK)]
            self._prompt.insert_segments([[ids]], max_tokens=[1])
        self._prompt.prefill_step_size = task.tokens
        return _timed(self._prompt.next)

    def _made(self, task: Decode | Verify) -> Any:
        """A batch of copies of the prompt's state: a generator to decode, or the layers' caches to verify."""
        with mx.stream(self._prompt.stream):
            ((layers, _),) = self._prompt.extract_cache([0]).values()
            if isinstance(task, Verify):
                return [layer.merge([layer] * task.rows) for layer in layers]
        rows = task.rows
        batch: Any = BatchGenerator(self._weights, completion_batch_size=rows, prefill_batch_size=rows)
        batch.insert_segments([[[7]]] * rows, max_tokens=[_PROMPT_TOK] * rows, caches=[layers] * rows)
        return batch

    def _verified(self, task: Verify, layers: Any) -> float:
        ids = mx.array([[(11 + n) % self._vocabulary for n in range(task.tokens)]] * task.rows)

        def forward() -> None:
            mx.eval(mx.argmax(self._weights(ids, cache=layers), axis=-1))

        with mx.stream(self._prompt.stream):
            us = _timed(forward)
            if all(layer.is_trimmable() for layer in layers):
                for layer in layers:
                    layer.trim(task.tokens)
        return us


def _timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e6
