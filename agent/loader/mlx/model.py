"""A loaded model folder: weights, tokenizer, chat template, grammars; and the preparation of requests."""

import importlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance.hf
import mlx.core as mx
import psutil
from llguidance import LLMatcher, LLTokenizer
from mlx.utils import tree_flatten
from mlx_lm import load
from transformers import PreTrainedTokenizerBase

from agent.loader import conversation
from agent.loader.generation import Prepared
from agent.loader.mlx.speech import Markers, Speech, parse_json_call
from agent.wire.frames import Embed, Failed, Generate
from shared.errors import Refused

_EFFORTS_OFF = ("none", "minimal")
_TEMPLATE_OWN = frozenset({"self", "messages", "tools", "bos_token", "eos_token", "raise_exception", "strftime_now"})
_FAULTS = (
    ("unimplemented", "uses an unsupported keyword"),
    ("pointer", "has an unresolvable reference"),
    ("$ref", "has an unresolvable reference"),
    ("format", "uses an unknown format"),
    ("type", "uses an unknown type"),
    ("unsatisfiable", "cannot be satisfied by any value"),
    ("regex", "has an unsupported pattern"),
    ("limit", "is too large"),
    ("too", "is too large"),
    ("deep", "is too deep"),
    ("recursion", "is too deep"),
)
"""llguidance's errors, in words that quote nothing of the schema."""


@dataclass(frozen=True)
class Extra:
    """What a text model adds to a prepared request. ``grammar`` is validated Lark; ``after`` are the token ids that end
    the reasoning, before which no grammar applies; ``opening`` is the token with which the model may start reasoning
    by itself."""

    grammar: str | None
    after: tuple[int, ...]
    markers: Markers
    reasoning: bool
    opening: int | None = None

    def speech(self, request: Generate) -> Speech:
        """A parser of this request's answer."""
        return Speech(self.markers, request.tools, reasoning=self.reasoning)


class TextModel:
    """A text model. ``limit_tok`` limits prompt and answer together. Raises Refused when it cannot be loaded.
    ``prepare`` and what it uses may run on another thread than the one that computes: it does not touch MLX."""

    def __init__(self, path: Path, *, limit_tok: int, default_max_tokens: int) -> None:
        never_wire_memory()
        self.weights, self.tokenizer, config = _loaded(path)
        # vision models keep the language model's settings in a nested part of the configuration
        language = {**config, **(config.get("text_config") or {})}
        self.context_tok = min(int(language.get("max_position_embeddings") or 4096), limit_tok)
        self.vocabulary = _logits_width(path, self.weights)
        self.ends = sorted(self.tokenizer.eos_token_ids)
        self.weights_bytes = sum(array.nbytes for _, array in _arrays(self.weights.parameters()))
        self._default_max_tokens = default_max_tokens
        self._longest_token_bytes = max(len(str(token).encode()) for token in self.tokenizer.get_vocab())
        self._grammars: LLTokenizer | None = None
        self._native_tools = "tools" in str(getattr(self.tokenizer, "chat_template", None) or "")
        self._marker_is_token = self._is_special(conversation.CALL_BEGIN)
        self._reserved = _TEMPLATE_OWN | set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
        parser = self.tokenizer.tool_parser
        self._json_calls = parser is None or parser.__module__.endswith("json_tools")

    def prepare(self, request: Generate) -> Prepared | Failed:
        """Tokens, limits and grammar of a request, or the reason why it cannot be served."""
        if refusal := self._surely_too_long(request) or self._unfit(request):
            return refusal
        try:
            prompt = self._prompt_tokens(request)
        except Exception as error:  # noqa: BLE001  # a template may raise anything; the text may quote the prompt
            message = f"the model's chat template rejected these messages ({type(error).__name__})"
            return _failed(request, message, "messages" if request.prompt is None else "prompt", code="template_error")
        if not prompt:
            message = "the model's chat template rendered an empty prompt from these messages"
            return _failed(request, message, "messages", code="template_error")
        room = self.context_tok - len(prompt)
        wanted = request.max_tokens if request.max_tokens is not None else min(self._default_max_tokens, room)
        if wanted < 1:
            return _failed(request, "max_tokens: expected at least 1", "max_tokens")
        if room < 1 or wanted > room:
            return self._too_long(request, f"{len(prompt)}", room, wanted)
        try:
            extra = self._extra(request, prompt)
        except Exception as error:  # noqa: BLE001  # a schema or a tokenizer may raise anything
            message = f"this model does not support the constraints ({type(error).__name__})"
            return _failed(request, message, _param(request))
        return extra if isinstance(extra, Failed) else Prepared(request, (prompt,), wanted, extra)

    def prepared(self, request: Generate, prompt: list[int], max_tokens: int) -> Prepared:
        """A request with a prompt that is already tokenized."""
        return Prepared(request, (prompt,), max_tokens, Extra(None, (), Markers(), reasoning=False))

    def prepare_embedding(self, request: Embed) -> Prepared | Failed:
        """Token ids of each input."""
        return embedding_inputs(request, self.encode, self.context_tok, self.vocabulary)

    def matcher(self, grammar: str) -> LLMatcher:
        """A new matcher of a grammar."""
        return LLMatcher(self.grammars(), grammar)

    def grammars(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, created on first use (a third of a second)."""
        if self._grammars is None:
            inner = getattr(self.tokenizer, "_tokenizer", self.tokenizer)
            self._grammars = llguidance.hf.from_tokenizer(inner, n_vocab=self.vocabulary, eos_token=self.ends)
        return self._grammars

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return bytes(self.grammars().decode_bytes([token]))

    def detokenizer(self, *, trims: bool) -> Any:
        """A new detokenizer. mlx-lm's drop the space before an answer; with ``trims`` false this one does not, because
        it starts with other text."""
        fresh = self.tokenizer.detokenizer
        if not trims:
            for token in self.tokenizer.encode("a", add_special_tokens=False):
                fresh.add_token(token)
            fresh.finalize()
            _ = fresh.last_segment  # consumed, so that it is not part of the answer
        return fresh

    def encode(self, text: str) -> list[int]:
        """A text's token ids; for an empty one the start token."""
        first = self.tokenizer.bos_token_id
        start = int(first if first is not None else self.ends[0])
        return [int(token) for token in self.tokenizer.encode(text)] or [start]

    def _extra(self, request: Generate, prompt: list[int]) -> Extra | Failed:
        """Markers and a validated grammar."""
        if request.logprobs is not None:
            self.grammars()  # needed for the tokens' bytes; not every tokenizer supports it
        written = conversation.grammar(request, marker_is_token=self._marker_is_token, json_calls=self._json_calls)
        thinks = self.tokenizer.has_thinking
        if written is not None:
            is_error, said = LLMatcher.validate_grammar_with_warnings(written, self.grammars())
            if is_error:
                return _failed(request, f"{_param(request)}: the schema {_fault(str(said[0]))}", _param(request))
        open_thought = thinks and request.prompt is None and self._inside_thought(request, prompt)
        may_open = thinks and not open_thought and request.must_call is None and request.schema is None
        opening = tuple(self.tokenizer.think_start_tokens) if may_open else ()
        return Extra(
            grammar=written,
            after=tuple(self.tokenizer.think_end_tokens) if open_thought or len(opening) == 1 else (),
            markers=self._markers(request),
            reasoning=open_thought,
            opening=opening[0] if len(opening) == 1 else None,
        )

    def _markers(self, request: Generate) -> Markers:
        tokenizer, call, parse = self.tokenizer, None, None
        if request.prompt is not None:
            return Markers()  # a text is continued verbatim
        if request.tools:
            if self._json_calls or request.must_call is not None:
                call, parse = (conversation.CALL_BEGIN, conversation.CALL_END), parse_json_call
            else:
                call, parse = (tokenizer.tool_call_start, tokenizer.tool_call_end), tokenizer.tool_parser
        return Markers(
            reasoning=(tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else None,
            call=call,
            parse=parse,
        )

    def _inside_thought(self, request: Generate, prompt: list[int]) -> bool:
        """Whether the template itself has opened the reasoning, after the last message; text from users does not
        count."""
        before = self._prompt_tokens(request, begin_answer=False)
        same = next((n for n, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), len(before))
        added = prompt[min(same, len(prompt)) :]
        return bool(self.tokenizer.rfind_think_start(added) > self.tokenizer.rfind_think_end(added))

    def _unfit(self, request: Generate) -> Failed | None:
        # a model's vocabulary may be padded beyond the tokenizer's
        known = min(self.vocabulary, len(self.tokenizer))
        if any(token >= known for token, _ in request.logit_bias):
            message = f"logit_bias: token id out of range; this model has {known} tokens"
            return _failed(request, message, "logit_bias")
        if (unknown := self._unknown_to_template(request)) is not None:
            message = f"chat_template_kwargs: this model's template has no variable {unknown[:64]}"
            return _failed(request, message, "chat_template_kwargs")
        effort = request.reasoning_effort
        if effort is not None and effort not in _EFFORTS_OFF and not self.tokenizer.has_thinking:
            message = f"reasoning_effort: {request.model} does not support reasoning; omit it"
            return _failed(request, message, "reasoning_effort", code="unsupported_parameter")
        return None

    def _surely_too_long(self, request: Generate) -> Failed | None:
        """Reject a text that cannot fit under any tokenization, without spending seconds on tokenizing it."""
        size = len((request.prompt or "").encode()) + sum(len(m.content.encode()) for m in request.messages)
        # a wide margin: some tokenizers drop characters or map an unknown word to one token
        least = size // (4 * self._longest_token_bytes)
        return None if least < self.context_tok else self._too_long(request, f"over {least}", 0, 1)

    def _too_long(self, request: Generate, prompt_tok: str, room: int, wanted: int) -> Failed:
        message = f"prompt of {prompt_tok} tokens plus max_tokens exceeds the context length of {self.context_tok}"
        param = "max_tokens" if room >= 1 else ("messages" if request.prompt is None else "prompt")
        return _failed(request, message, param, code="context_length_exceeded")

    def _prompt_tokens(self, request: Generate, *, begin_answer: bool = True) -> list[int]:
        if request.prompt is not None:
            return self.encode(request.prompt)
        turns = conversation.for_template(request.messages, request.tools, native_tools=self._native_tools)
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode(conversation.plain_text(turns))
        tokens: Any = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=begin_answer, tokenize=True, **self._template_args(request)
        )
        return [int(token) for token in (tokens if isinstance(tokens, list) else tokens["input_ids"])]

    def _template_args(self, request: Generate) -> dict[str, Any]:
        args: dict[str, Any] = {}
        if request.tools and self._native_tools:
            args["tools"] = [{"type": "function", "function": json.loads(tool)} for tool in request.tools]
        if request.reasoning_effort is not None:
            args["reasoning_effort"] = request.reasoning_effort
            args["enable_thinking"] = request.reasoning_effort not in _EFFORTS_OFF
        elif request.must_call is not None or request.schema is not None:
            args["enable_thinking"] = False
        return args | (json.loads(request.template_args) if request.template_args else {})

    def _unknown_to_template(self, request: Generate) -> str | None:
        """An argument for the template that is not one of its variables, or is reserved for the renderer."""
        named = json.loads(request.template_args) if request.template_args else {}
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        return next((k for k in named if k in self._reserved or not re.search(rf"\b{re.escape(k)}\b", template)), None)

    def _is_special(self, text: str) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return any(str(token) == text and token.special for token in added.values())


def embedding_inputs(
    request: Embed, encode: Callable[[str], list[int]], limit_tok: int, vocabulary: int
) -> Prepared | Failed:
    """Token ids of each input of an Embed, or the one that is invalid or too long."""
    prompts: list[list[int]] = []
    for number, text in enumerate(request.inputs):
        ids = encode(text) if isinstance(text, str) else list(text)
        if not ids or max(ids) >= vocabulary:
            message = f"input[{number}]: empty, or a token id out of range; this model has {vocabulary} tokens"
            return Failed(id=request.id, code="invalid_value", message=message, param="input")
        if len(ids) > limit_tok:
            message = f"input[{number}]: {len(ids)} tokens exceed the context length of {limit_tok}"
            return Failed(id=request.id, code="context_length_exceeded", message=message, param="input")
        prompts.append(ids)
    return Prepared(request, tuple(prompts))


def never_wire_memory() -> None:
    """mlx-lm wires the whole working set by default, which has panicked base M4 machines; disable that call. Freed
    buffers are kept for reuse up to 5 % of the machine's memory, which avoids frequent clearing."""
    module = importlib.import_module("mlx_lm.generate")
    module.maybe_set_recommended_wired_limit = lambda: None  # type: ignore[attr-defined]
    mx.set_cache_limit(max(256 << 20, psutil.virtual_memory().total // 20))


def evaluate_everything(model: Any) -> None:
    """Evaluate private lazy arrays too (rotary frequencies), which ``parameters()`` leaves out."""
    mx.eval([v for module in model.modules() for v in vars(module).values() if isinstance(v, mx.array)])
    mx.eval(model.parameters())


def cannot_load(path: Path, error: Exception) -> Refused:
    """The error of a failed load; libraries may raise anything for damaged files."""
    reason = str(error).splitlines()[0][:200] if str(error) else "no reason given"
    return Refused(f"model folder {path}: load failed ({type(error).__name__}: {reason})", code="bad_model")


def _loaded(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    if not path.is_dir():
        raise Refused(f"model folder {path}: does not exist", code="bad_model")
    try:
        loaded: Any = load(str(path), tokenizer_config={"trust_remote_code": False}, return_config=True)
        model, tokenizer, config = loaded
        evaluate_everything(model)
    except Exception as error:  # noqa: BLE001  # mlx-lm may raise anything for damaged files
        raise cannot_load(path, error) from None
    return model, tokenizer, config


def _logits_width(path: Path, weights: Any) -> int:
    """Width of the model's logits, which its configuration may not state."""
    try:
        return int(weights(mx.array([[0]])).shape[-1])
    except Exception as error:  # noqa: BLE001  # an unusual model may raise anything
        raise cannot_load(path, error) from None


def _arrays(tree: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(tree)
    return list(flat)


def _param(request: Generate) -> str:
    return "response_format" if request.schema is not None else "tools" if request.tools else "logprobs"


def _fault(said: str) -> str:
    lowered = said.splitlines()[0].lower() if said else ""
    return next((words for mark, words in _FAULTS if mark in lowered), "is not supported")


def _failed(request: Generate, message: str, param: str, *, code: str = "invalid_value") -> Failed:
    return Failed(id=request.id, code=code, message=message, param=param)
