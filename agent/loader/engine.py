"""The one adapter over MLX and mlx-lm; no other module imports either.

Drives mlx-lm's ``BatchGenerator`` by its public-shaped calls from the thread that made it: requests join and leave a
running batch, prompts are prefilled one at a time in chunks, and sampling draws each token's randomness from the
request's seed and the token's position alone, so company in the batch changes nothing and a broken batch can be
rebuilt where it stopped.
"""

import copy
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llguidance.hf
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import apply_top_p

from agent.frames import (
    Accepted,
    Candidate,
    Done,
    Failed,
    Frame,
    Generate,
    Message,
    Ready,
    Reported,
    Scored,
    Tokens,
)
from agent.loader.blas import REFERENCE
from agent.loader.prompt_cache import PromptCache
from agent.loader.scheduling import Turn, chunk_tok, first, yields
from agent.loader.stopping import StopText
from shared.errors import Refused

_WARM_PROMPT = "Say hello."
_MASK = (1 << 64) - 1

Processor = Callable[[mx.array, mx.array], mx.array]
"""(tokens so far, logits of one row) -> logits, as mlx-lm calls it."""


@dataclass
class _Row:
    """One request in the engine."""

    request: Generate
    prompt: list[int]
    cached_tok: int
    max_tokens: int
    detokenizer: Any
    stop: StopText
    since_s: float = field(default_factory=time.perf_counter)
    uid: int = -1
    made: list[int] = field(default_factory=list)
    left_tok: int = 0
    looked_up: bool = False
    partial: tuple[list[Any], list[int]] | None = None
    rebuilt: bool = False

    def turn(self, now_s: float) -> Turn:
        """How scheduling sees it."""
        return Turn(self.request.id, self.left_tok, now_s - self.since_s)


class MLXEngine:
    """Engine over one mlx-lm model folder. Raises Refused from the constructor when it cannot be loaded."""

    def __init__(
        self,
        path: str,
        *,
        rows: int = 8,
        prefill_chunk_tok: int = 256,
        stall_s: float = 0.75,
        cache_bytes: int = 0,
        default_max_tokens: int = 4096,
        blas: str = REFERENCE,
    ) -> None:
        began = time.perf_counter()
        _never_wire_memory()
        self._model, self._tokenizer, config = _loaded(Path(path))
        self._context_tok = int(config.get("max_position_embeddings") or 4096)
        self._vocabulary = int(config.get("vocab_size") or len(self._tokenizer.get_vocab()))
        self._default_max_tokens = default_max_tokens
        self._blas = blas
        self._rows_limit = rows
        self._chunk = prefill_chunk_tok
        self._stall_s = stall_s
        self._rate_tok_per_s = 0.0
        self._waiting: list[_Row] = []
        self._prefilling: _Row | None = None
        self._grammar_tokenizer: LLTokenizer | None = None
        self._rows: dict[int, _Row] = {}
        self._by_uid: dict[int, _Row] = {}
        self._cache: PromptCache[list[Any]] = PromptCache(cache_bytes)
        self._window: dict[str, int] = {}
        self._reported_cache = (0, 0, 0)
        self._batch = self._new_batch()
        self._warm_up()
        self._load_us = int((time.perf_counter() - began) * 1e6)

    def describe(self) -> Ready:
        return Ready(
            engine="mlx",
            context_tok=self._context_tok,
            load_us=self._load_us,
            active_bytes=mx.get_active_memory(),
            blas=self._blas,
        )

    @property
    def busy(self) -> bool:
        return bool(self._rows)

    def submit(self, request: Generate) -> Frame:
        try:
            prompt = self._prompt_tokens(request)
        except Exception as error:  # noqa: BLE001  # a template may raise anything; the text may quote the prompt
            return Failed(
                id=request.id,
                code="template_error",
                message=f"the model's chat template does not take these messages ({type(error).__name__})",
                param="messages",
            )
        room = self._context_tok - len(prompt)
        wanted = request.max_tokens if request.max_tokens is not None else min(self._default_max_tokens, room)
        if room < 1 or wanted > room:
            return Failed(
                id=request.id,
                code="context_length_exceeded",
                message=f"the prompt has {len(prompt)} tokens and max_tokens asks for {max(wanted, 1)}, "
                f"but the model's context holds {self._context_tok}",
                param="messages" if room < 1 else "max_tokens",
            )
        try:
            refusal = self._unfit(request)
        except Exception as error:  # noqa: BLE001  # a schema or a tokenizer may provoke anything
            refusal = Failed(
                id=request.id,
                code="invalid_value",
                message=f"this model cannot follow the request's constraints ({type(error).__name__})",
                param="response_format" if request.schema is not None else "logprobs",
            )
        if refusal is not None:
            return refusal
        row = _Row(request, prompt, 0, wanted, self._tokenizer.detokenizer, StopText(request.stop))
        expected = self._cache.peek(prompt)
        row.left_tok = len(prompt) - expected
        self._rows[request.id] = row
        self._waiting.append(row)
        self._window["queue_max"] = max(self._window.get("queue_max", 0), len(self._waiting))
        return Accepted(id=request.id, prompt_tok=len(prompt), cached_tok=expected)

    def cancel(self, request_id: int) -> None:
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        self._count("wasted_tok", len(row.made))
        if row in self._waiting:
            self._waiting.remove(row)
            if row.partial is not None:
                self._keep(row.partial[1], row.partial[0])
            return
        self._by_uid.pop(row.uid, None)
        if row is self._prefilling:
            self._prefilling = None
        self._remove_keeping_cache(row)

    def step(self) -> list[Frame]:
        began = time.perf_counter()
        try:
            self._schedule(began)
            with self._batch.stats() as stats:
                prefilled, generated = self._batch.next()
        except Exception:  # noqa: BLE001  # whatever one row did, the others go on
            return self._rebuild()
        for response in prefilled:
            self._progress(response)
        answers: list[Frame] = []
        for response in generated:
            answers += self._advance(response)
        if stats.prompt_tokens and stats.prompt_time > 0:
            rate = stats.prompt_tokens / stats.prompt_time
            self._rate_tok_per_s = rate if not self._rate_tok_per_s else 0.7 * self._rate_tok_per_s + 0.3 * rate
        prefill_us = int(stats.prompt_time * 1e6)
        self._count("busy_prefill_us", prefill_us)
        self._count("busy_decode_us", max(0, int((time.perf_counter() - began) * 1e6) - prefill_us))
        self._count("prefill_tok", int(stats.prompt_tokens))
        self._count("decode_tok", len(generated))
        self._count("steps", 1)
        return answers

    def report(self) -> Reported:
        window, self._window = self._window, {}
        cache = self._cache
        hits, misses, evictions = self._reported_cache
        self._reported_cache = (cache.hits, cache.misses, cache.evictions)
        return Reported(
            **window,
            cache_hits=cache.hits - hits,
            cache_misses=cache.misses - misses,
            cache_evictions=cache.evictions - evictions,
            cache_bytes=cache.bytes,
            active_bytes=mx.get_active_memory(),
        )

    def close(self) -> None:
        self._batch.close()
        self._cache.clear()
        mx.synchronize()

    def _schedule(self, now_s: float) -> None:
        """Put the next prompt into the batch when none is being worked on, or in the place of one that yields."""
        current, rate = self._prefilling, self._rate_tok_per_s
        if self._waiting:
            best = first([row.turn(now_s) for row in self._waiting], rate)
            if current is not None and yields(current.turn(now_s), best, rate):
                self._set_aside(current)
                current = None
            if current is None and len(self._by_uid) < self._rows_limit:
                row = self._rows[best.id]
                self._waiting.remove(row)
                self._insert(row)
                self._prefilling = row
        decoding = len(self._by_uid) > (self._prefilling is not None)
        self._batch.prefill_step_size = chunk_tok(rate, self._stall_s, self._chunk, decoding=decoding)

    def _progress(self, response: Any) -> None:
        row = self._by_uid[response.uid]
        done, total = response.progress
        row.left_tok = total - done
        if response.end_of_prompt and row is self._prefilling:
            self._prefilling = None

    def _set_aside(self, row: _Row) -> None:
        """Out of the batch with what was done so far; it comes back when it is its turn."""
        for layers, tokens in self._batch.remove([row.uid], return_prompt_caches=True).values():
            if tokens and not any(layer.empty() for layer in layers):
                row.partial = ([_detached(layer) for layer in layers], list(tokens))
        del self._by_uid[row.uid]
        self._prefilling = None
        self._waiting.append(row)

    def _advance(self, response: Any) -> list[Frame]:
        row = self._by_uid[response.uid]
        row.rebuilt = False  # it works again: another break is another story
        row.made.append(response.token)
        finish = response.finish_reason
        ended_by_model = finish == "stop"
        if not ended_by_model:
            row.detokenizer.add_token(response.token)
        if finish is not None:
            row.detokenizer.finalize()
        text, stopped = row.stop.feed(row.detokenizer.last_segment)
        if finish is not None:
            text += "" if stopped else row.stop.finish()
            self._keep(response.all_tokens, response.prompt_cache)
        elif stopped:
            self._remove_keeping_cache(row)
        request_id = row.request.id
        scored = (self._scored(row, response),) if row.request.logprobs is not None and not ended_by_model else ()
        answers: list[Frame] = [Tokens(id=request_id, text=text, count=1, scored=scored)]
        if finish is not None or stopped:
            del self._by_uid[response.uid]
            del self._rows[request_id]
            answers.append(
                Done(
                    id=request_id,
                    finish="stop" if stopped or ended_by_model else "length",
                    prompt_tok=len(row.prompt),
                    cached_tok=row.cached_tok,
                    completion_tok=len(row.made),
                )
            )
        return answers

    def _rebuild(self) -> list[Frame]:
        """A new batch from what is known of each row; a row that breaks it twice fails."""
        self._batch.close()
        self._batch = self._new_batch()
        broken = [row for row in self._rows.values() if row not in self._waiting]
        self._by_uid.clear()
        self._prefilling = None
        failed: list[Frame] = []
        for row in broken:
            if row.rebuilt:
                del self._rows[row.request.id]
                failed.append(
                    Failed(id=row.request.id, code="engine_failed", message="the engine failed on this request twice")
                )
                continue
            row.rebuilt, row.partial = True, None
            row.left_tok = len(row.prompt) + len(row.made)
            self._waiting.append(row)
        return failed

    def _insert(self, row: _Row) -> None:
        tokens = row.prompt + row.made
        if row.partial is not None:
            (cache, held), row.partial = row.partial, None
            cached = len(held)
        else:
            cache, cached = self._cached(tokens)
        if not row.looked_up:
            row.looked_up, row.cached_tok = True, cached
            self._count("cached_tok", cached)
        row.left_tok = len(tokens) - cached
        (row.uid,) = self._batch.insert_segments(
            [[tokens[cached:]]],
            max_tokens=[row.max_tokens - len(row.made)],
            caches=[cache],
            all_tokens=[tokens[:cached]],
            samplers=[_sampler(row.request, len(row.made))],
            logits_processors=[self._processors(row)],
        )
        self._by_uid[row.uid] = row

    def _cached(self, tokens: list[int]) -> tuple[list[Any], int]:
        """A cache to start from and how many of ``tokens`` it holds already."""
        hit = self._cache.find(tokens)
        if hit is not None:
            extra = hit.stored_tok - hit.common_tok
            if extra == 0 or can_trim_prompt_cache(hit.cache):
                # a layer's arrays are shared with the stored entry, its offset is not
                layers = [copy.copy(layer) for layer in hit.cache]
                if extra:
                    trim_prompt_cache(layers, extra)
                return layers, hit.common_tok
        return make_prompt_cache(self._model), 0

    def _remove_keeping_cache(self, row: _Row) -> None:
        for cache, tokens in self._batch.remove([row.uid], return_prompt_caches=True).values():
            self._keep(tokens, cache)

    def _keep(self, tokens: list[int], layers: list[Any]) -> None:
        """Store a finished row's cache, detached: as it comes it is a view that would keep the whole batch alive."""
        if not tokens or any(layer.empty() for layer in layers):
            return
        detached = [_detached(layer) for layer in layers]
        self._cache.put(list(tokens), detached, sum(layer.nbytes for layer in detached))

    def _new_batch(self) -> Any:
        return BatchGenerator(
            self._model,
            stop_tokens=[[token] for token in self._tokenizer.eos_token_ids],
            completion_batch_size=self._rows_limit,
            prefill_batch_size=1,
            prefill_step_size=self._chunk,
        )

    def _unfit(self, request: Generate) -> Failed | None:
        """Why this model cannot follow the request's constraints; None when it can."""
        if request.logprobs is not None:
            self._grammars()  # names the tokens' bytes; not every tokenizer can
        if request.schema is not None:
            is_error, said = LLMatcher.validate_grammar_with_warnings(_grammar(request.schema), self._grammars())
            if is_error:
                return Failed(
                    id=request.id,
                    code="invalid_value",
                    message=f"response_format: the schema cannot be followed: {said[0].splitlines()[0][:200]}",
                    param="response_format",
                )
        beyond = [token for token, _ in request.logit_bias if token >= self._vocabulary]
        if beyond:
            return Failed(
                id=request.id,
                code="invalid_value",
                message=f"logit_bias: token {beyond[0]} is not one of this model's {self._vocabulary}",
                param="logit_bias",
            )
        return None

    def _processors(self, row: _Row) -> list[Processor]:
        """What changes a row's logits before sampling; made anew when a batch is rebuilt."""
        request, begin = row.request, len(row.prompt)
        found: list[Processor] = []
        if request.frequency_penalty or request.presence_penalty:
            found.append(_penalty(request.frequency_penalty, request.presence_penalty, begin))
        if request.logit_bias:
            found.append(_bias(request.logit_bias))
        if request.schema is not None:
            matcher = LLMatcher(self._grammars(), _grammar(request.schema))
            found.append(_constraint(matcher, begin, sorted(self._tokenizer.eos_token_ids)))
        return found

    def _grammars(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, made when it is first needed (a third of a second)."""
        if self._grammar_tokenizer is None:
            inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
            ends = sorted(self._tokenizer.eos_token_ids)
            self._grammar_tokenizer = llguidance.hf.from_tokenizer(inner, n_vocab=self._vocabulary, eos_token=ends)
        return self._grammar_tokenizer

    def _scored(self, row: _Row, response: Any) -> Scored:
        wanted = row.request.logprobs or 0
        best: list[int] = []
        if wanted:
            likeliest: Any = mx.argpartition(-response.logprobs, wanted - 1)[:wanted].tolist()
            best = list(likeliest)
            best.sort(key=lambda token: -response.logprobs[token].item())
        return Scored(
            chosen=self._candidate(response.token, response.logprobs),
            top=tuple(self._candidate(token, response.logprobs) for token in best),
        )

    def _candidate(self, token: int, logprobs: mx.array) -> Candidate:
        raw = bytes(self._grammars().decode_bytes([token]))
        # an impossible token has no finite logarithm; JSON knows no infinity
        found: Any = logprobs[token].item()
        logprob = max(float(found), -9999.0)
        return Candidate(text=raw.decode("utf-8", "replace"), raw=raw, logprob=logprob)

    def _prompt_tokens(self, request: Generate) -> list[int]:
        if request.prompt is not None:
            return [int(t) for t in self._tokenizer.encode(request.prompt)] or [self._first_token()]
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        if getattr(self._tokenizer, "chat_template", None):
            tokens = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        else:
            text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
            tokens = self._tokenizer.encode(text)
        if not isinstance(tokens, list):
            tokens = list(tokens["input_ids"])
        return [int(t) for t in tokens]

    def _first_token(self) -> int:
        """What an empty prompt starts from."""
        first = self._tokenizer.bos_token_id
        return int(first if first is not None else next(iter(self._tokenizer.eos_token_ids)))

    def _warm_up(self) -> None:
        """Compile the kernels before the first caller waits for them, and prove that the model answers."""
        request = Generate(
            id=0,
            model="",
            messages=(Message(role="user", content=_WARM_PROMPT),),
            max_tokens=4,
            temperature=0.0,
        )
        prompt = self._tokenizer.encode(_WARM_PROMPT)
        row = _Row(request, [int(t) for t in prompt] or [0], 0, 4, self._tokenizer.detokenizer, StopText(()))
        self._rows[0] = row
        self._waiting.append(row)
        while self._rows:
            for answer in self.step():
                if isinstance(answer, Failed):
                    raise Refused("warm-up: the model cannot generate; its files may not fit mlx-lm", code="bad_model")
        self._cache.clear()
        self._window = {}
        self._reported_cache = (self._cache.hits, self._cache.misses, self._cache.evictions)

    def _count(self, name: str, amount: int) -> None:
        self._window[name] = self._window.get(name, 0) + amount


def _loaded(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    if not path.is_dir():
        raise Refused(f"model folder {path}: there is no such folder", code="bad_model")
    try:
        loaded: Any = load(str(path), tokenizer_config={"trust_remote_code": False}, return_config=True)
        model, tokenizer, config = loaded
        _evaluate_everything(model)
    except Exception as error:  # noqa: BLE001  # mlx-lm raises whatever the files provoke
        reason = str(error).splitlines()[0][:200] if str(error) else "no reason given"
        raise Refused(
            f"model folder {path}: cannot be loaded ({type(error).__name__}: {reason})", code="bad_model"
        ) from None
    return model, tokenizer, config


def _evaluate_everything(model: Any) -> None:
    """Evaluate private lazy arrays too (rotary frequencies), which ``parameters()`` leaves out."""
    mx.eval([v for module in model.modules() for v in vars(module).values() if isinstance(v, mx.array)])
    mx.eval(model.parameters())


def _never_wire_memory() -> None:
    """mlx-lm wires the whole working set by default, which has panicked base M4 machines; take that call out."""
    module = importlib.import_module("mlx_lm.generate")
    module.maybe_set_recommended_wired_limit = lambda: None  # type: ignore[attr-defined]


def _detached(layer: Any) -> Any:
    """A copy of one layer's cache that owns its arrays."""
    fresh = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, mx.array):
            # an addition makes a new array, where a slice or a copy may share the batch's
            owned = value + mx.zeros((), dtype=value.dtype)
            mx.eval(owned)
            setattr(fresh, name, owned)
    return fresh


def _sampler(request: Generate, position: int) -> Callable[[mx.array], mx.array] | None:
    """None for greedy; else a sampler whose n-th draw depends on the seed and n alone (n starts at ``position``)."""
    if request.temperature == 0:
        return None
    at = position

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal at
        key = mx.random.key(_mixed(request.seed, at))
        at += 1
        scaled = logprobs * (1.0 / request.temperature)
        if request.top_p < 1.0:
            scaled = apply_top_p(scaled - mx.logsumexp(scaled, axis=-1, keepdims=True), request.top_p)
        return mx.random.categorical(scaled, key=key)

    return sample


def _penalty(frequency: float, presence: float, begin: int) -> Processor:
    """OpenAI's penalties over the generated tokens: logit - count x frequency - (count > 0) x presence."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        made = tokens[begin:]
        if made.size == 0:
            return logits
        counts = mx.zeros(logits.shape[-1:], dtype=logits.dtype).at[made].add(1)
        return logits - frequency * counts - presence * (counts > 0)

    return process


def _bias(pairs: tuple[tuple[int, float], ...]) -> Processor:
    ids, values = mx.array([token for token, _ in pairs]), mx.array([value for _, value in pairs])

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, ids].add(values.astype(logits.dtype))

    return process


def _constraint(matcher: LLMatcher, begin: int, ends: list[int]) -> Processor:
    """Only tokens that a grammar allows, and the end when it is complete; the matcher follows what was generated."""
    consumed = 0

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal consumed
        fresh: Any = tokens[begin + consumed :].tolist()
        if fresh and not matcher.is_stopped():
            matcher.consume_tokens(fresh)
            consumed += len(fresh)
        if matcher.is_stopped():
            only_end = mx.full(logits.shape, -float("inf"), dtype=logits.dtype)
            only_end[:, mx.array(ends)] = 0.0
            return only_end
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]]
        return mx.where(mx.array(allowed.astype(bool)), logits, -float("inf"))

    return process


def _grammar(schema: str) -> str:
    """llguidance's grammar for a JSON schema, without room for endless white space."""
    grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    return grammar


def _mixed(seed: int, position: int) -> int:
    """SplitMix64 of the position-th step from ``seed`` (Steele, Lea and Flood 2014), a well-spread 63-bit number."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
