"""A loaded model folder: weights, tokenizer, chat template, grammars; and the preparation of requests."""

import importlib
import inspect
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import llguidance.hf
import mlx.core as mx
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from mlx.utils import tree_flatten
from mlx_lm import load
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from agent.loader.chat.calls import OWN
from agent.loader.chat.grammar import Plan
from agent.loader.chat.probe import Conversation, probed
from agent.loader.chat.speech import Markers, Speech
from agent.loader.chat.summary import summary
from agent.loader.cpu_limit import PROBE_S, cpu_limit
from agent.loader.generation import Advance, Prepared, nothing
from agent.loader.lengths import MOST_CHARS, exceeds
from agent.loader.mlx.constraint import TooComplex, Unconstrained, too_complex, trial
from agent.loader.mlx.plan import Planner
from agent.loader.mlx.prompt import EFFORTS_OFF, Prompt, PromptWriter, TemplateRefused, TooLong, unabridged
from agent.loader.mlx.template import ChatTemplate
from agent.process.machine import memory_bytes
from agent.wire.frames import Embed, Failed, Generate
from agent.wire.namespaces import Namespace
from shared.errors import Refused

_TOO_LONG = "context_length_exceeded"
_COMPILED = 16
_TERSE = 3
"""How much shorter than JSON a template may describe tools."""
_LIMITS = LLParserLimits(max_items_in_row=50_000, verbose_errors=False)
"""llguidance's default of 2,000 ends the answer at an object with more than 500 optional properties."""
_TEMPLATE_OWN = frozenset({"self", "messages", "tools", "bos_token", "eos_token", "raise_exception", "strftime_now"})


@dataclass(frozen=True)
class Extra:
    """What a text model adds to a prepared request. ``plan`` constrains the answer, which begins ``inside`` the
    reasoning or not; ``check`` names what of a schema a call breaks that no grammar can enforce."""

    plan: Plan
    markers: Markers
    inside: bool = False
    unmet: Callable[[str, str], str | None] | None = None
    ignored: tuple[str, ...] = ()

    def speech(self, request: Generate) -> Speech:
        """A parser of this request's answer."""
        return Speech(self.markers, request.tools, reasoning=self.inside, new_id=_call_id)


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
        self._compiled = lru_cache(_COMPILED)(self._compile)
        self._reserved = _TEMPLATE_OWN | set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
        with cpu_limit(PROBE_S, f"model folder {path}: its chat template does not end"):
            self._template = template = ChatTemplate(self.tokenizer)
            self.talk = probed(template.render, template.traits(self.ends)) if template.exists else Conversation()
            template.keep((*(self.talk.reasoning or ()), self.talk.form.marker, self.talk.form.stop))
        self._prompts = PromptWriter(template, self.talk)
        self._planner = Planner(self.talk, template, self.ends, self.grammars)

    @property
    def talks(self) -> dict[str, str]:
        """How the model is spoken to, in words."""
        return summary(self.talk, template=self._template.exists)

    def prepare(self, request: Generate, advance: Advance = nothing) -> Prepared | Failed:
        """Tokens, limits and grammar of a request, or the reason why it cannot be served."""
        if refusal := self._unfit(request) or self._surely_too_long(request, advance):
            return refusal
        try:
            prompt = self._prompt(request, advance)
            advance()
        except TooLong as error:
            return self._too_long(request, f"over {error.least_tok}", 0)
        except TemplateRefused as error:
            return _failed(request, str(error), "messages", code="template_error")
        except Exception as error:  # noqa: BLE001  # a tokenizer may raise anything; the text may quote the prompt
            message = f"the text cannot be tokenized ({type(error).__name__})"
            return _failed(request, message, "messages" if request.prompt is None else "prompt", code="template_error")
        room = self.context_tok - len(prompt.tokens)
        wanted = request.max_tokens if request.max_tokens is not None else min(self._default_max_tokens, room)
        if wanted < 1 <= room:
            return _failed(request, "max_tokens: expected at least 1", "max_tokens")
        # an answer that is longer already was begun with a larger context, where it can be continued
        if room < max(1, len(request.made)) or (wanted > room and request.strict):
            return self._too_long(request, f"{len(prompt.tokens)}", room - len(request.made))
        try:
            extra = self._extra(request, prompt, ("max_tokens",) if wanted > room else ())
        except Exception as error:  # noqa: BLE001  # a schema or a tokenizer may raise anything
            message = f"this model does not support the constraints ({type(error).__name__})"
            return _failed(request, message, _param(request))
        return extra if isinstance(extra, Failed) else Prepared(request, (prompt.tokens,), min(wanted, room), extra)

    def prepared(self, request: Generate, prompt: list[int], max_tokens: int) -> Prepared:
        """A request with a prompt that is already tokenized."""
        return Prepared(request, (prompt,), max_tokens, Extra(Plan(), Markers()))

    def prepare_embedding(self, request: Embed, advance: Advance = nothing) -> Prepared | Failed:
        """Token ids of each input."""
        return embedding_inputs(request, self.encode, self.context_tok, self.vocabulary, advance)

    def matcher(self, cache: Namespace, grammar: str, written: str = "") -> LLMatcher:
        """A new matcher of a grammar whose first part is ``written``; it has stopped if the grammar forbids that. The
        latest grammars are kept compiled for their namespace: thousands of properties take seconds, and whose schema
        it was must not show in them."""
        found = self._compiled(cache, grammar).deep_copy()
        if written:
            found.consume_tokens(self.grammars().tokenize_str(written))
        return found

    def _compile(self, _: Namespace, grammar: str) -> LLMatcher:
        # its warnings would quote the answer
        return LLMatcher(self.grammars(), grammar, log_level=0, limits=_LIMITS)

    def grammars(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, created on first use (a third of a second)."""
        if self._grammars is None:
            inner = getattr(self.tokenizer, "_tokenizer", self.tokenizer)
            self._grammars = llguidance.hf.from_tokenizer(inner, n_vocab=self.vocabulary, eos_token=self.ends)
        return self._grammars

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return bytes(self.grammars().decode_bytes([token]))

    def text_of(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens included."""
        return bytes(self.grammars().decode_bytes(tokens)).decode(errors="ignore")

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

    def _prompt(self, request: Generate, advance: Advance) -> Prompt:
        if request.prompt is not None:
            return Prompt(self.encode(request.prompt), False, OWN)
        # those that _surely_too_long has read
        known_chars = sum(map(len, (*unabridged(request.messages), *request.tools)))
        return self._prompts.write(request, self.context_tok, advance, known_chars=known_chars)

    def _extra(self, request: Generate, prompt: Prompt, ignored: tuple[str, ...]) -> Extra | Failed:
        """How the answer is parsed and constrained."""
        if request.logprobs is not None:
            self.grammars()  # needed for the tokens' bytes; not every tokenizer supports it
        if request.prompt is not None:
            return Extra(Plan(), Markers(), ignored=ignored)  # a text is continued verbatim
        found = self._planner.planned(request, prompt.form)
        if isinstance(found, Failed):
            return found
        if (grammar := found.plan.whole or found.plan.trial()) is not None:
            try:  # compiled now, since the other thread steps every request
                trial(self.matcher(request.cache, grammar))
            except TooComplex:
                return too_complex(request)
            except Unconstrained:
                return _failed(request, "this model's tokens do not support the constraints", _param(request))
        return Extra(found.plan, found.markers, prompt.inside, found.unmet, ignored)

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
        if effort is not None and effort not in EFFORTS_OFF and not self.talk.reasons:
            message = f"reasoning_effort: {request.model} does not support reasoning; omit it"
            return _failed(request, message, "reasoning_effort", code="unsupported_parameter")
        return None

    def _surely_too_long(self, request: Generate, advance: Advance) -> Failed | None:
        """Reject a text that cannot fit, without rendering and tokenizing all of it."""
        texts = [request.prompt or "", *unabridged(request.messages)]
        longest = max(MOST_CHARS, self._longest_token_bytes)
        least = exceeds(texts, self.context_tok, self._count, advance, most_chars=longest)
        least = least or self._tools_exceed(request, advance)
        return self._too_long(request, f"over {least}", 0) if least else None

    def _tools_exceed(self, request: Generate, advance: Advance) -> int:
        """The same of the tools, which templates write more briefly than JSON."""
        return exceeds(request.tools, _TERSE * self.context_tok, self._count, advance) // _TERSE

    def _count(self, part: str) -> int:
        return len(self._template.tokens(part))

    def _too_long(self, request: Generate, prompt_tok: str, room: int) -> Failed:
        # clients that shorten the conversation look for these words
        limit = f"this model's maximum context length is {self.context_tok} tokens"
        if room < 1:
            message = f"prompt is too long: {prompt_tok} tokens; {limit}; shorten the conversation"
            return _failed(request, message, "messages" if request.prompt is None else "prompt", code=_TOO_LONG)
        message = f"max_tokens: {limit}, and the prompt has {prompt_tok}; ask for at most {room}"
        return _failed(request, message, "max_tokens", code=_TOO_LONG)

    def _unknown_to_template(self, request: Generate) -> str | None:
        """An argument for the template that is not one of its variables, or is reserved for the renderer."""
        named = json.loads(request.template_args) if request.template_args else {}
        source = self._template.source
        return next((k for k in named if k in self._reserved or not re.search(rf"\b{re.escape(k)}\b", source)), None)


def embedding_inputs(
    request: Embed, encode: Callable[[str], list[int]], limit_tok: int, vocabulary: int, advance: Advance = nothing
) -> Prepared | Failed:
    """Token ids of each input of an Embed, or the one that is invalid or too long."""
    prompts: list[list[int]] = []
    for number, text in enumerate(request.inputs):
        advance()
        if isinstance(text, str) and (least := exceeds([text], limit_tok, lambda part: len(encode(part)), advance)):
            return _input_too_long(request, number, f"over {least}", limit_tok)
        ids = encode(text) if isinstance(text, str) else list(text)
        if not ids or max(ids) >= vocabulary:
            message = f"input[{number}]: empty, or a token id out of range; this model has {vocabulary} tokens"
            return Failed(id=request.id, code="invalid_value", message=message, param="input")
        if len(ids) > limit_tok:
            return _input_too_long(request, number, str(len(ids)), limit_tok)
        prompts.append(ids)
    return Prepared(request, tuple(prompts))


def _input_too_long(request: Embed, number: int, tokens: str, limit_tok: int) -> Failed:
    message = f"input[{number}]: {tokens} tokens exceed the context length of {limit_tok}"
    return Failed(id=request.id, code=_TOO_LONG, message=message, param="input")


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def never_wire_memory() -> None:
    """mlx-lm wires the whole working set by default, which has panicked base M4 machines; disable that call. Freed
    buffers are kept for reuse up to 5 % of the machine's memory, which avoids frequent clearing."""
    module = importlib.import_module("mlx_lm.generate")
    module.maybe_set_recommended_wired_limit = lambda: None  # type: ignore[attr-defined]
    mx.set_cache_limit(max(256 << 20, (memory_bytes() or 0) // 20))


def evaluate_everything(model: Any) -> None:
    """Evaluate private lazy arrays too (rotary frequencies), which ``parameters()`` leaves out."""
    mx.eval([v for module in model.modules() for v in vars(module).values() if isinstance(v, mx.array)])
    mx.eval(model.parameters())


def cannot_load(path: Path, error: Exception) -> Refused:
    """The error of a failed load; libraries may raise anything for damaged files."""
    reason = " ".join(str(error).split())[:200] or "no reason given"
    return Refused(f"model folder {path}: load failed ({type(error).__name__}: {reason})", code="bad_model")


def tokenizer_settings(path: Path) -> dict[str, Any]:
    """How a folder's tokenizer is loaded: without the model's configuration where transformers cannot read that."""
    settings: dict[str, Any] = {"trust_remote_code": False}
    try:
        AutoConfig.from_pretrained(str(path), **settings)
    except Exception:  # noqa: BLE001  # it may raise anything for a value that mlx-lm understands
        settings["config"] = PretrainedConfig()
    return settings


def _loaded(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    if not path.is_dir():
        raise Refused(f"model folder {path}: does not exist", code="bad_model")
    try:
        loaded: Any = load(str(path), tokenizer_config=tokenizer_settings(path), return_config=True)
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


def _failed(request: Generate, message: str, param: str, *, code: str = "invalid_value") -> Failed:
    return Failed(id=request.id, code=code, message=message, param=param)
