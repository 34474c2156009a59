"""The engine over one mlx-lm model: continuous batching with isolation between requests.

Prompts are prefilled in chunks, the shortest first; decoding rows wait for one chunk at most. Rows of very unequal
length are decoded in different batches. KV states of prompts are kept in a radix tree; requests that share a long
prefix wait for the first of them instead of computing it again. A batch that fails is rebuilt from the known tokens of
its rows, and their answers are unchanged.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from agent.loader.blas import REFERENCE
from agent.loader.disk_cache import DiskCache
from agent.loader.generation import Lately, Prepared
from agent.loader.mlx import kv, sampling, scores
from agent.loader.mlx.batch import Batch, Entry
from agent.loader.mlx.model import TextModel, cannot_load
from agent.loader.mlx.pooling import EmbeddingQueue
from agent.loader.mlx.row import Row
from agent.loader.mlx.states import PromptStates
from agent.loader.prompt_cache import as_tokens, common
from agent.loader.scheduling import (
    FIRST_TOKEN_TOK,
    SMALLEST_CHUNK_TOK,
    STEP_TOK,
    Block,
    PrefillCost,
    chunk_tok,
    first,
    fits,
    place,
    together,
    yields,
)
from agent.loader.stopping import StopText
from agent.wire.frames import (
    Accepted,
    Ask,
    Embed,
    Failed,
    Frame,
    Generate,
    Message,
    Ready,
    Reported,
    Tokens,
    Working,
)
from shared.errors import Refused

_WARM_PROMPT = "Say hello to everybody who came today. " * 12
SHARE_TOK = 64
"""A common prefix of this many tokens is worth waiting for the request that computes it."""
GROWTH_TOK = 256
"""Room for the first tokens of an answer that is required to admit a row."""
_MEASURED_TOK = 32
"""Smaller chunks are not used to measure the speed of prefill."""
MAX_BREAKS = 3
PRESSED = 4
"""Under memory pressure, prefill chunks are smaller by this factor."""


class MLXEngine:
    """Engine over one mlx-lm model folder. Raises Refused from the constructor when it cannot be loaded.

    ``kv_tok`` limits the tokens of all rows together, padding included; ``reuse_bytes`` the freed buffers kept by MLX.
    """

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
        self._model = TextModel(Path(path), limit_tok=kv_tok, default_max_tokens=default_max_tokens)
        self._blas = blas
        self._rows_limit = rows
        self._kv_tok = -(-kv_tok // STEP_TOK) * STEP_TOK
        self._chunk = prefill_chunk_tok
        self._stall_s = stall_s
        self._rate_tok_per_s = 0.0
        self._cost = PrefillCost()
        self._decode_s = 0.0
        self._waiting: list[Row] = []
        self._prefilling: list[Row] = []
        self._rows: dict[int, Row] = {}
        self._batches: list[Batch] = []
        self._embeddings = EmbeddingQueue(self._model.weights)
        self._due: list[Frame] = []
        self._faults = 0
        self._pressed = False
        self._cache = PromptStates(self._model.weights, cache_bytes, disk)
        self._weights_tok = 0.0
        self._window: dict[str, int] = {}
        self._lately = Lately()
        self._reported_cache = (0, 0, 0, 0)
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
        )

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._embeddings.busy or self._due)

    def prepare(self, request: Ask) -> Prepared | Failed:
        if isinstance(request, Embed):
            return self._model.prepare_embedding(request)
        prepared = self._model.prepare(request)
        if isinstance(prepared, Failed):
            return prepared
        restored = self._cache.read_back(as_tokens(prepared.prompts[0]), self._cost.seconds)
        return replace(prepared, restored=restored)

    def submit(self, prepared: Prepared) -> Frame:
        request = prepared.request
        if isinstance(request, Embed):
            return self._embeddings.take(request.id, prepared.prompts)
        prompt = prepared.prompts[0]
        array = as_tokens(prompt)
        if prepared.restored is not None:
            self._count("disk_restored_tok", self._cache.put_back(array, prepared.restored))
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
            self._due.append(row.done(finish))
            return Accepted(id=request.id, prompt_tok=len(prompt), cached_tok=expected)
        self._rows[request.id] = row
        self._waiting.append(row)
        self._queue_behind(self._prefilling, [row])
        self._window["queue_max"] = max(self._window.get("queue_max", 0), len(self._waiting))
        return Accepted(id=request.id, prompt_tok=len(prompt), cached_tok=expected)

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
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        self._count("wasted_tok", len(row.made))
        if row in self._waiting:
            self._waiting.remove(row)
            if row.partial is not None:
                self._cache.keep(row.partial)
        else:
            self._cache.keep(self._taken_out(row))
        self._release(row)

    def step(self) -> list[Frame]:
        began = time.perf_counter()
        answers, self._due = self._due, []
        answers += self._planned(began)
        before_tok = self._before_tok()
        largest = self._chunk_tok(before_tok)
        prompt_s, generated = 0.0, 0
        for batch in list(self._batches):
            try:
                worked = batch.step(largest)
            except Exception:  # noqa: BLE001  # one row's failure must not end the others
                answers += self._rebuild(batch)
                continue
            self._count_padding(batch)
            for response in worked.prefilled:
                self._progress(batch.rows[response.uid], response)
            for response in worked.generated:
                answers += self._advanced(batch, response)
            self._measure(worked.prompt_tok, before_tok, worked.prompt_s)
            prompt_s += worked.prompt_s
            generated += len(worked.generated)
        self._count("decode_tok", generated)
        self._close_idle()
        if not prompt_s:
            self._decode_s = 0.5 * (self._decode_s + time.perf_counter() - began)
        if self._embeddings.busy:
            embedded_at = time.perf_counter()
            answers += self._embeddings.step(self._chunk_tok)
            prompt_s += time.perf_counter() - embedded_at
        prefill_us = int(prompt_s * 1e6)
        self._count("busy_prefill_us", prefill_us)
        decode_us = max(0, int((time.perf_counter() - began) * 1e6) - prefill_us)
        self._count("busy_decode_us", decode_us)
        self._count("steps", 1)
        self._lately.prefilled(0, prefill_us)
        self._lately.decoded(generated, decode_us)
        return answers

    def report(self) -> Reported:
        window, self._window = self._window, {}
        before, self._reported_cache = self._reported_cache, self._cache.counts
        hits, misses, saved, evictions = (
            after - earlier for after, earlier in zip(self._reported_cache, before, strict=True)
        )
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return Reported(
            **window,
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
            kv_bytes=self.kv_bytes,
            cache_bytes=self._cache.bytes,
            waits=tuple(row.request.id for row in self._waiting),
            **self._lately.taken(),
        )

    def relieve(self, level: Literal["calm", "soft", "hard"]) -> None:
        self._pressed = level != "calm"
        if level == "hard":
            self._cache.shrink(0, "memory")
            # buffers read by a running command must not be reused
            mx.synchronize()
            mx.clear_cache()

    def close(self) -> None:
        for batch in self._batches:
            batch.close()
        self._batches.clear()
        self._cache.close()
        mx.synchronize()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the running rows' KV cache, padding included."""
        return sum(batch.kv_bytes for batch in self._batches)

    # scheduling

    def _planned(self, now_s: float) -> list[Frame]:
        """Make room and start the next rows. A failure rebuilds all batches; MAX_BREAKS in a row are raised."""
        try:
            self._make_room()
            self._schedule(now_s)
        except Exception:
            self._faults += 1
            if self._faults >= MAX_BREAKS:
                raise
            return [frame for batch in list(self._batches) for frame in self._rebuild(batch)]
        self._faults = 0
        return []

    def _schedule(self, now_s: float) -> None:
        """Start the next prompts when none is being prefilled, or in place of one that yields."""
        ready = [row for row in self._waiting if row.behind is None]
        if not ready:
            return
        rate = self._rate_tok_per_s
        best = self._rows[first([row.turn(now_s) for row in ready], rate).id]
        if len(self._prefilling) == 1:
            current = self._prefilling[0]
            if yields(current.turn(now_s), best.turn(now_s), rate) and self._room_for(best):
                self._set_aside(current)
        if self._prefilling or (best.left_tok > FIRST_TOKEN_TOK and self._first_token_due()):
            return
        if self._room_for(best):
            self._begin(self._group(best, ready, now_s), now_s)

    def _first_token_due(self) -> bool:
        """Whether a row is a step or two from its first token, which a long chunk would delay."""
        return any(
            not row.made and row not in self._prefilling for batch in self._batches for row in batch.rows.values()
        )

    def _room_for(self, row: Row) -> bool:
        running = sum(len(batch.rows) for batch in self._batches)
        if self._pressed and running:
            return False  # under memory pressure no row is added to running ones
        if running - len(self._prefilling) >= self._rows_limit:
            return False
        return self._placed(row, [batch.block for batch in self._batches], self._shut()) is not None

    def _placed(self, row: Row, blocks: list[Block], shut: set[int]) -> int | None:
        """Index of the batch that a row joins, ``len(blocks)`` for a new one; None when it does not fit in memory."""
        length = _planned_tok(row)
        open_to = [] if row.breaks > 1 else [at for at in range(len(blocks)) if at not in shut]
        best = place([blocks[at] for at in open_to], length, self._weights_tok)
        at = len(blocks) if best is None else open_to[best]
        others = [block for number, block in enumerate(blocks) if number != at and block.rows]
        joined = blocks[at].joined(length) if at < len(blocks) else Block(1, length)
        return at if fits(others, joined, self._kv_tok) else None

    def _shut(self) -> set[int]:
        """Batches that no row may join: a row that failed with others must first succeed alone."""
        return {at for at, batch in enumerate(self._batches) if any(r.breaks > 1 for r in batch.rows.values())}

    def _group(self, best: Row, ready: list[Row], now_s: float) -> list[Row]:
        """Rows prefilled with ``best`` in one chunk: short prompts of which none waits for another's prefix."""
        if best.breaks or not self._cache.sliceable:
            return [best]  # some recurrent models process the padding of unequal prompts as text
        others = [row for row in ready if row is not best and not row.breaks]
        self._queue_behind([best], others)
        turns = [row.turn(now_s) for row in others if row.behind is None]
        largest = self._chunk_tok(best.length_tok - best.left_tok)
        ids = together(best.turn(now_s), turns, self._rate_tok_per_s, largest)
        group: list[Row] = []
        for row in (self._rows[number] for number in ids):
            self._queue_behind(group, [row])
            if row.behind is None:
                group.append(row)
        return group

    def _begin(self, group: list[Row], now_s: float) -> None:
        """Add rows to batches while there is room."""
        room = self._rows_limit - sum(len(batch.rows) for batch in self._batches)
        blocks, shut = [batch.block for batch in self._batches], self._shut()
        chosen: dict[int, list[Row]] = {}
        for row in group[:room]:
            at = self._placed(row, blocks, shut)
            if at is None:
                break
            blocks += [Block(0, 0)] * (at + 1 - len(blocks))
            blocks[at] = blocks[at].joined(_planned_tok(row))
            chosen.setdefault(at, []).append(row)
        while len(self._batches) < len(blocks):
            self._batches.append(Batch(self._model.weights, self._model.ends, self._rows_limit, self._chunk))
        for at, rows in chosen.items():
            self._join(self._batches[at], rows, now_s)

    def _join(self, batch: Batch, rows: list[Row], now_s: float) -> None:
        joining, entries = [], []
        for row in rows:
            self._waiting.remove(row)
            row.begun_s = row.begun_s or now_s
            try:
                entries.append(self._entry(row))
                joining.append(row)
            except Exception:  # noqa: BLE001  # one row's failure must not affect the others
                self._fail(row)
        if not joining:
            return
        try:
            batch.add(joining, entries)
        except Exception:  # noqa: BLE001  # mlx-lm raises before it changes anything
            for row in joining:
                self._fail(row)
            return
        self._prefilling += joining

    def _entry(self, row: Row) -> Entry:
        tokens = row.prompt + row.made
        if row.partial is not None:
            (layers, held), row.partial = row.partial, None
            cached = len(held)
        else:
            self._learn_from_company(row)
            layers, cached = self._cache.find(row.tokens)
        if not row.looked_up:
            row.looked_up, row.cached_tok = True, min(cached, len(row.prompt))
            self._count("cached_tok", cached)
            self._count("queue_us", int((row.begun_s - row.since_s) * 1e6))
        row.left_tok = len(tokens) - cached
        request, position = row.request, len(row.made)
        return Entry(
            fresh=tokens[cached:],
            held=tokens[:cached],
            layers=layers,
            max_tokens=row.max_tokens - position,
            sampler=sampling.sampler(request.temperature, request.top_p, request.seed, position),
            processors=[self._guarded(row, process) for process in self._processors(row)],
        )

    def _guarded(self, row: Row, process: sampling.Processor) -> sampling.Processor:
        """A row whose processor raises fails alone; the batch continues with the row's unchanged logits."""

        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            try:
                return process(tokens, logits)
            except Exception:  # noqa: BLE001  # a grammar may reject its input
                row.broken = True
                return logits

        return guarded

    def _processors(self, row: Row) -> list[sampling.Processor]:
        """A row's logits processors; created again when a batch is rebuilt."""
        request, begin = row.request, len(row.prompt)
        found: list[sampling.Processor] = []
        if request.frequency_penalty or request.presence_penalty:
            found.append(sampling.penalty(request.frequency_penalty, request.presence_penalty, begin))
        if request.logit_bias:
            found.append(sampling.bias(request.logit_bias))
        if row.extra.grammar is not None:
            matcher = self._model.matcher(row.extra.grammar)
            extra = row.extra
            found.append(sampling.constraint(matcher, begin, self._model.ends, extra.after, extra.opening))
        return found

    def _set_aside(self, row: Row) -> None:
        """Preempt a row: remove it from the batch with its partial state; it resumes at its next turn."""
        held = self._taken_out(row)
        if held is not None:
            row.partial = (kv.detached(held[0]), held[1])
            if any(other.behind is row for other in self._waiting):
                self._cache.keep(held)
        self._release(row)
        self._waiting.append(row)

    def _make_room(self) -> None:
        """When the rows exceed the memory planned for them, preempt the youngest; it resumes later."""
        while sum(batch.block.padded_tok for batch in self._batches) > self._kv_tok:
            running = [row for batch in self._batches for row in batch.rows.values()]
            if len(running) < 2:
                return
            youngest = max(running, key=lambda row: row.begun_s)
            self._cache.keep(self._taken_out(youngest))
            self._again(youngest)

    def _again(self, row: Row) -> None:
        """Requeue a row, to be recomputed from its known tokens."""
        row.partial, row.batch = None, None
        row.left_tok = row.length_tok - self._cache.peek(row.tokens)
        self._release(row)
        self._waiting.append(row)

    def _taken_out(self, row: Row) -> tuple[kv.Layers, list[int]] | None:
        if row in self._prefilling:
            self._prefilling.remove(row)
        assert row.batch is not None
        return row.batch.remove(row)

    # shared prefixes

    def _queue_behind(self, leaders: list[Row], rows: list[Row]) -> None:
        """Let rows that share a long prefix with one in prefill wait for it."""
        if not self._cache.shared:
            return
        for row in rows:
            if row.partial is not None:
                continue
            most = len(row.prompt) - row.left_tok + SHARE_TOK
            for leader in leaders:
                shared = common(row.array[:-1], leader.array)
                if row is not leader and shared >= most:
                    row.behind, row.shared_tok, most = leader, shared, shared + 1

    def _release(self, leader: Row) -> None:
        for row in self._waiting:
            if row.behind is leader:
                row.behind = None

    def _progress(self, row: Row, response: Any) -> None:
        done, total = response.progress
        row.left_tok = 0 if response.end_of_prompt else max(1, total - done)
        if row.left_tok <= 1 and row in self._prefilling:
            self._prefilling.remove(row)  # its last token is computed in the next decode step
        held_tok = row.length_tok - row.left_tok
        ready = [
            other
            for other in self._waiting
            if other.behind is row and (other.shared_tok <= held_tok or row.left_tok <= 1)
        ]
        if ready:
            assert row.batch is not None
            self._cache.keep(row.batch.state(row))
        for other in ready:
            other.behind = None
            other.left_tok = other.length_tok - self._cache.peek(other.tokens)

    def _learn_from_company(self, row: Row) -> None:
        """Cache the state of a running row whose common prefix with this one is longer than the cached one."""
        if not self._cache.shared:
            return
        tokens = row.tokens[:-1]
        best, most = None, self._cache.peek(row.tokens) + SHARE_TOK
        for batch in self._batches:
            for other in batch.rows.values():
                shared = min(common(tokens, other.tokens), other.length_tok - other.left_tok)
                if shared >= most:
                    best, most = other, shared
        if best is not None and best.batch is not None:
            self._cache.keep(best.batch.state(best))

    # output

    def _advanced(self, batch: Batch, response: Any) -> list[Frame]:
        """One row's token; a row whose processors or detokenizer raise fails alone."""
        row = batch.rows[response.uid]
        try:
            if not row.broken:
                return self._advance(batch, row, response)
        except Exception:  # noqa: BLE001  # a detokenizer may meet an unknown id
            row.broken = True
        if row.batch is not None and response.finish_reason is None:
            batch.remove(row)
        elif row.batch is not None:
            batch.forget(row)
        self._fail(row)
        return []

    def _advance(self, batch: Batch, row: Row, response: Any) -> list[Frame]:
        finish = response.finish_reason
        said, stopped = row.take(response.token, finish)
        if finish is not None:
            batch.forget(row)
            self._cache.finished((response.prompt_cache, response.all_tokens), private=row.request.private)
        elif stopped:
            self._cache.finished(batch.remove(row), private=row.request.private)
        by_model = finish == "stop"
        wanted = row.request.logprobs
        scored = (
            (scores.scored(response, wanted, self._model.token_bytes),) if wanted is not None and not by_model else ()
        )
        token = int(response.token)
        answers: list[Frame] = [
            Tokens(
                id=row.id,
                text=said.text,
                count=1,
                reasoning=said.reasoning,
                calls=said.calls,
                scored=scored,
                ids=(token,),
            )
        ]
        if finish is not None or stopped:
            del self._rows[row.id]
            answers.append(row.done("stop" if stopped or by_model else "length"))
        return answers

    def _fail(self, row: Row) -> None:
        """End a row that cannot be continued."""
        del self._rows[row.id]
        self._release(row)
        self._due.append(Failed(id=row.id, code="engine_failed", message="the engine cannot continue this request"))

    def _rebuild(self, batch: Batch) -> list[Frame]:
        """Discard a failed batch; its rows restart from their known tokens.

        The culprit is unknown: a row that is in a second failed batch without progress gets a batch of its own, and at
        the next failure it ends.
        """
        self._count("rebuilds", 1)
        batch.close()
        self._batches.remove(batch)
        for row in list(batch.rows.values()):
            if row in self._prefilling:
                self._prefilling.remove(row)
            row.breaks += 1
            if row.breaks >= MAX_BREAKS:
                self._fail(row)
            else:
                self._again(row)
        failed, self._due = self._due, []
        return failed

    # counters

    def _chunk_tok(self, before_tok: float) -> int:
        decoding = any(row not in self._prefilling for batch in self._batches for row in batch.rows.values())
        decode_s = max(self._decode_s, 1e-6) if decoding else 0.0
        largest = max(SMALLEST_CHUNK_TOK, self._chunk // PRESSED) if self._pressed else self._chunk
        return chunk_tok(self._cost, self._stall_s, decode_s, before_tok, largest)

    def _before_tok(self) -> float:
        """Mean number of tokens before the chunks that are being prefilled."""
        held = [row.length_tok - row.left_tok for row in self._prefilling]
        return sum(held) / len(held) if held else 0.0

    def _measure(self, prompt_tok: int, before_tok: float, prompt_s: float) -> None:
        self._count("prefill_tok", prompt_tok)
        self._lately.prefilled(prompt_tok, 0)
        if prompt_tok < _MEASURED_TOK or prompt_s <= 0:
            return
        # a chunk that took far longer than expected was delayed by something else; a real change shows in the next ones
        foreseen_s = self._cost.seconds(prompt_tok, before_tok) if self._cost.known else prompt_s
        self._cost.learn(prompt_tok, before_tok, min(prompt_s, 3 * foreseen_s))
        rate = prompt_tok / prompt_s
        self._rate_tok_per_s = rate if not self._rate_tok_per_s else 0.7 * self._rate_tok_per_s + 0.3 * rate

    def _count_padding(self, batch: Batch) -> None:
        decoding = [row.length_tok for row in batch.rows.values() if not row.prefilling]
        if decoding:
            self._count("padding_tok", len(decoding) * max(decoding) - sum(decoding))
        self._window["kv_peak_bytes"] = max(self._window.get("kv_peak_bytes", 0), self.kv_bytes)

    def _close_idle(self) -> None:
        idle = [batch for batch in self._batches if not batch.rows]
        for batch in idle if len(idle) < len(self._batches) else idle[1:]:
            batch.close()
            self._batches.remove(batch)

    def _warm_up(self) -> None:
        """Compile the kernels before the first request waits for them, and verify that the model generates."""
        request = Generate(id=0, model="", messages=(Message(role="user", content="-"),), max_tokens=4, temperature=0.0)
        prompt = self._model.encode(_WARM_PROMPT)[: max(1, self._model.context_tok - 8)]
        prepared = self._model.prepared(request, prompt, 4)
        mx.reset_peak_memory()
        self.submit(prepared)
        while self._rows:
            for answer in self.step():
                if isinstance(answer, Failed):
                    raise Refused("warm-up: the model cannot generate; its files may not fit mlx-lm", code="bad_model")
            row = next(iter(self._rows.values()), None)
            if row is not None and row.batch is not None and not row.prefilling:
                self._measure_weights(row)
        self._warm_tok = len(prompt) + 4
        self._warm_peak = mx.get_peak_memory()
        self._cache.clear()
        self._close_idle()
        self._warm_active = mx.get_active_memory()
        self._window = {}
        self._lately.taken()
        self._reported_cache = self._cache.counts

    def _measure_weights(self, row: Row) -> None:
        """Measure the cost of reading the weights, in tokens of KV cache."""
        assert row.batch is not None
        held = row.batch.state(row)
        if held is not None:
            each = kv.layers_nbytes(held[0]) / max(1, len(held[1]))
            self._weights_tok = self._model.weights_bytes / each if each else 0.0

    def _count(self, name: str, amount: int) -> None:
        self._window[name] = self._window.get(name, 0) + amount


def _planned_tok(row: Row) -> int:
    """Tokens that a row is expected to occupy soon: its current ones and the first of its answer."""
    return row.length_tok + min(GROWTH_TOK, row.max_tokens - len(row.made))
