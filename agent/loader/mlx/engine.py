"""The engine over one mlx-lm model: continuous batching with isolation between requests.

Prompts are prefilled in chunks, the shortest first; decoding rows wait for one chunk at most. Rows of very unequal
length are decoded in different batches. KV states of prompts are kept in a radix tree; requests that share a long
prefix wait for the first of them instead of computing it again. A batch that fails is rebuilt from the known tokens of
its rows, and their answers are unchanged.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from agent.loader.blas import REFERENCE
from agent.loader.calibration import Bounds, Task
from agent.loader.counts import Counts
from agent.loader.disk_cache import DiskCache
from agent.loader.generation import Advance, Prepared, nothing
from agent.loader.mlx import device, kv, scores
from agent.loader.mlx.batch import Batch
from agent.loader.mlx.model import TextModel, cannot_load
from agent.loader.mlx.pooling import EmbeddingQueue
from agent.loader.mlx.row import Row
from agent.loader.mlx.rows import MAX_BREAKS, Rows
from agent.loader.mlx.scheduler import Scheduler
from agent.loader.mlx.states import PromptStates
from agent.loader.mlx.timer import StepTimer
from agent.loader.prefill_pace import PrefillPace
from agent.loader.prompt_cache import as_tokens
from agent.loader.row_placement import STEP_TOK, Limits
from agent.loader.stopping import StopText
from agent.wire.frames import Accepted, Ask, Embed, Failed, Frame, Generate, Message, Ready, Reported, Tokens, Working
from shared.errors import Refused

_WARM_PROMPT = "Say hello to everybody who came today. " * 12


class MLXEngine:
    """Engine over one mlx-lm model folder. Raises Refused from the constructor when it cannot be loaded. ``kv_tok``
    limits the tokens of all rows together, padding included; ``reuse_bytes`` the freed buffers kept by MLX."""

    def __init__(
        self,
        path: str,
        *,
        rows: int = 8,
        prefill_chunk_tok: int = 512,
        stall_s: float = 0.75,
        cache_bytes: int = 0,
        default_max_tokens: int = 4096,
        kv_tok: int = 8 * 2048,
        disk: DiskCache | None = None,
        reuse_bytes: int | None = None,
        blas: str = REFERENCE,
    ) -> None:
        began = time.perf_counter()
        if reuse_bytes is not None:
            mx.set_cache_limit(reuse_bytes)  # freed buffers that MLX keeps count towards the process's memory
        self._model = model = TextModel(Path(path), limit_tok=kv_tok, default_max_tokens=default_max_tokens)
        self._blas = blas
        self._cache = PromptStates(model.weights, cache_bytes, disk)
        self._rows = Rows(self._cache, partial(Batch, model.weights, model.ends, rows, prefill_chunk_tok))
        self._pace, self._counts = PrefillPace(prefill_chunk_tok, stall_s), Counts()
        limits = Limits(rows, -(-kv_tok // STEP_TOK) * STEP_TOK)
        self._scheduler = Scheduler(self._rows, model, self._pace, self._counts, limits)
        self._embeddings = EmbeddingQueue(model.weights)
        self._timer = StepTimer(model.weights, model.vocabulary)
        self._faults, self._reported_cache = 0, self._cache.counts
        try:
            self._warm_up()
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001  # an unusual model may raise anything
            raise cannot_load(Path(path), error) from None
        self._load_us = int((time.perf_counter() - began) * 1e6)

    def describe(self) -> Ready:
        return Ready(
            engine="mlx",
            context_tok=self._model.context_tok,
            load_us=self._load_us,
            active_bytes=self._warm_active,
            peak_bytes=self._warm_peak,
            warm_tok=self._warm_tok,
            blas=self._blas,
            talks=self._model.talks,
            runtime=device.runtime(),
        )

    @property
    def busy(self) -> bool:
        return bool(self._rows.by_id or self._embeddings.busy or self._rows.due)

    def prepare(self, request: Ask, advance: Advance = nothing) -> Prepared | Failed:
        if isinstance(request, Embed):
            return self._model.prepare_embedding(request, advance)
        prepared = self._model.prepare(request, advance)
        if isinstance(prepared, Failed):
            return prepared
        tokens = as_tokens(request.cache, prepared.prompts[0])
        restored = self._cache.read_back(tokens, self._pace.cost.seconds, advance)
        return replace(prepared, restored=restored)

    def submit(self, prepared: Prepared) -> Frame:
        request = prepared.request
        if isinstance(request, Embed):
            return self._embeddings.take(request.id, prepared.prompts, request.dimensions)
        prompt = prepared.prompts[0]
        array = as_tokens(request.cache, prompt)
        if prepared.restored is not None:
            self._counts.add("disk_restored_tok", self._cache.put_back(array, prepared.restored))
        expected = self._cache.peek(array)
        row = Row(
            request=request,
            prompt=prompt,
            max_tokens=prepared.max_tokens,
            extra=prepared.extra,
            detokenizer=self._model.detokenizer(trims=request.prompt is None),
            stop=StopText(request.stop),
            speech=prepared.extra.speech(request),
            left_tok=len(prompt) - expected,
            array=array,
        )
        if finish := self._resumed(row):
            self._rows.due.append(row.done(finish))
        else:
            self._rows.add(row)
            self._counts.highest("queue_max", len(self._rows.waiting))
        return Accepted(id=request.id, prompt_tok=len(prompt), cached_tok=expected, ignored=row.extra.ignored)

    def _resumed(self, row: Row) -> str:
        """Advance a row to where another loader stopped; its finish reason if it ended there, "" if it continues."""
        for token in row.request.made:
            ends = token in self._model.ends
            if row.take(token, "stop" if ends else None)[1] or ends:
                return "stop"
        row.first_s = 0.0
        row.left_tok = row.length_tok - self._cache.peek(row.tokens)
        return "length" if len(row.made) >= row.max_tokens else ""

    def cancel(self, request_id: int) -> None:
        self._embeddings.cancel(request_id)
        if (row := self._rows.cancel(request_id)) is not None:
            self._counts.add("wasted_tok", len(row.made))

    def step(self) -> list[Frame]:
        began = time.perf_counter()
        answers = self._rows.taken_due() + self._planned(began)
        before_tok = self._rows.before_tok
        largest = self._scheduler.chunk_tok(before_tok)
        prompt_s, generated = 0.0, 0
        for batch in self._scheduler.due(began):
            try:
                worked = batch.step(largest)
            except Exception:  # noqa: BLE001  # one row's failure must not end the others
                answers += self._rebuilt(batch)
                continue
            self._count_padding(batch)
            for response in worked.prefilled:
                self._rows.progress(batch.rows[response.uid], response)
            for response in worked.generated:
                answers += self._advanced(batch, response)
            self._measure(worked.prompt_tok, before_tok, worked.prompt_s)
            prompt_s += worked.prompt_s
            generated += len(worked.generated)
        self._rows.close_idle()
        if not prompt_s:
            self._pace.decoded(time.perf_counter() - began)
        if self._embeddings.busy:
            embedded_at = time.perf_counter()
            answers += self._embeddings.step(self._scheduler.chunk_tok)
            prompt_s += time.perf_counter() - embedded_at
        prefill_us = int(prompt_s * 1e6)
        decode_us = max(0, int((time.perf_counter() - began) * 1e6) - prefill_us)
        self._counts.stepped(prefill_us, decode_us, generated)
        return answers

    def report(self) -> Reported:
        before, self._reported_cache = self._reported_cache, self._cache.counts
        hits, misses, saved, evictions = (
            after - earlier for after, earlier in zip(self._reported_cache, before, strict=True)
        )
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return Reported(
            **self._counts.taken(),
            cache_hits=hits,
            cache_misses=misses,
            cache_saved_tok=saved,
            cache_evictions=evictions,
            cache_bytes=self._cache.bytes,
            disk_bytes=self._cache.disk_bytes,
            active_bytes=mx.get_active_memory(),
            peak_bytes=peak,
        )

    def working(self) -> Working:
        return Working(
            active_bytes=mx.get_active_memory(),
            reuse_bytes=mx.get_cache_memory(),
            kv_bytes=self._rows.kv_bytes,
            cache_bytes=self._cache.bytes,
            waits=(*(row.id for row in (*self._rows.waiting, *self._rows.prefilling)), *self._embeddings.waits),
            **self._counts.lately.taken(),
        )

    def relieve(self, level: Literal["calm", "soft", "hard"]) -> None:
        self._pace.pressed = level != "calm"
        if level == "hard":
            self._cache.shrink(0, "memory")
            # buffers read by a running command must not be reused
            mx.synchronize()
            mx.clear_cache()

    def bounds(self) -> Bounds | None:
        limits = self._scheduler.limits
        # no longer than what decoding rows would wait for
        chunk_tok = self._pace.chunk_tok(0.0, decoding=True)
        return Bounds(limits.rows, limits.kv_tok, self._model.context_tok, chunk_tok)

    def measure(self, task: Task) -> float | None:
        return self._timer.measure(task)

    def rest(self) -> None:
        self._timer.rest()

    def close(self) -> None:
        self.rest()
        self._rows.close()
        self._cache.close()
        mx.synchronize()

    def _planned(self, now_s: float) -> list[Frame]:
        """Make room and start the next rows. A failure rebuilds all batches; MAX_BREAKS in a row are raised."""
        try:
            self._scheduler.plan(now_s)
        except Exception:
            self._faults += 1
            if self._faults >= MAX_BREAKS:
                raise
            return [frame for batch in list(self._rows.batches) for frame in self._rebuilt(batch)]
        self._faults = 0
        return []

    def _rebuilt(self, batch: Batch) -> list[Frame]:
        """The failures of rows that do not survive the rebuild of their batch."""
        self._counts.add("rebuilds", 1)
        self._rows.rebuild(batch)
        return self._rows.taken_due()

    def _advanced(self, batch: Batch, response: Any) -> list[Frame]:
        """One row's token; a row whose processors or detokenizer raise fails alone."""
        row = batch.rows[response.uid]
        try:
            if row.broken is None:
                return self._advance(batch, row, response)
        except Exception as error:  # noqa: BLE001  # a detokenizer may meet an unknown id
            row.broken = error
        if row.batch is not None and response.finish_reason is None:
            batch.remove(row)
        elif row.batch is not None:
            batch.forget(row)
        self._rows.fail(row)
        return []

    def _advance(self, batch: Batch, row: Row, response: Any) -> list[Frame]:
        finish = response.finish_reason
        said, stopped = row.take(response.token, finish)
        if finish is not None:
            batch.forget(row)
            tokens = as_tokens(row.request.cache, response.all_tokens)
            self._cache.finished((response.prompt_cache, tokens), private=row.request.private)
        elif stopped:
            self._cache.finished(batch.remove(row), private=row.request.private)
        by_model = finish == "stop"
        wanted = None if by_model else row.request.logprobs
        scored = () if wanted is None else (scores.scored(response, wanted, self._model.token_bytes),)
        token = Tokens(
            id=row.id,
            text=said.text,
            count=1,
            reasoning=said.reasoning,
            calls=said.calls,
            scored=scored,
            ids=(int(response.token),),
        )
        if finish is None and not stopped:
            return [token]
        self._rows.forget(row)
        return [token, row.done("stop" if stopped or by_model else "length")]

    def _measure(self, prompt_tok: int, before_tok: float, prompt_s: float) -> None:
        self._counts.add("prefill_tok", prompt_tok)
        self._counts.lately.prefilled(prompt_tok, 0)
        self._pace.prefilled(prompt_tok, before_tok, prompt_s)

    def _count_padding(self, batch: Batch) -> None:
        if decoding := [row.length_tok for row in batch.rows.values() if not row.prefilling]:
            self._counts.add("padding_tok", len(decoding) * max(decoding) - sum(decoding))
        self._counts.highest("kv_peak_bytes", self._rows.kv_bytes)

    def _warm_up(self) -> None:
        """Compile the kernels before the first request waits for them, and verify that the model generates."""
        request = Generate(id=0, model="", messages=(Message(role="user", content="-"),), max_tokens=4, temperature=0.0)
        prompt = self._model.encode(_WARM_PROMPT)[: max(1, self._model.context_tok - 8)]
        prepared = self._model.prepared(request, prompt, 4)
        mx.reset_peak_memory()
        self.submit(prepared)
        while self._rows.by_id:
            for answer in self.step():
                if isinstance(answer, Failed):
                    raise Refused("warm-up: the model cannot generate; its files may not fit mlx-lm", code="bad_model")
            row = next(iter(self._rows.by_id.values()), None)
            if row is not None and row.batch is not None and not row.prefilling:
                self._measure_weights(row)
        self._warm_tok = len(prompt) + 4
        self._warm_peak = mx.get_peak_memory()
        self._cache.clear()
        self._rows.close_idle()
        self._warm_active = mx.get_active_memory()
        self._counts.taken()
        self._counts.lately.taken()
        self._reported_cache = self._cache.counts

    def _measure_weights(self, row: Row) -> None:
        """Measure the cost of reading the weights, in tokens of KV cache."""
        if (held := row.state) is not None:
            each = kv.layers_nbytes(held[0]) / max(1, len(held[1]))
            weights_tok = self._model.weights_bytes / each if each else 0.0
            self._scheduler.limits = self._scheduler.limits._replace(weights_tok=weights_tok)
