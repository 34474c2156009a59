"""Fields of other vendors and of OpenAI that have no effect here, and which of their values matter. Tables, no code."""

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]
"""Fields with the values that change nothing; null is neutral everywhere."""

ADVISORY = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    }
)
"""Accepted without effect: they identify the caller or are hints for a vendor's own infrastructure. Of ``metadata`` one
key has an effect (agent/policy/classes.py)."""
NEUTRAL: Neutral = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
}
"""Known fields that would change the answer and are not supported: any other value is refused."""
TEXT_NEUTRAL: Neutral = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "messages": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""The same for text completions."""
ELSEWHERE: Neutral = {
    # how a server is set up: Ollama, LM Studio, llama.cpp
    **dict.fromkeys(("num_ctx", "num_keep", "num_gpu", "num_thread", "keep_alive", "options", "truncate", "shift"), ()),
    **dict.fromkeys(("ttl", "draft_model", "context_length", "id_slot", "slot_id", "n_keep", "timings_per_token"), ()),
    "cache_prompt": (True,),
    # vLLM's defaults
    **dict.fromkeys(("priority", "request_id", "cache_salt"), ()),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("include_stop_str_in_output", "continue_final_message", "add_special_tokens"), (False,)),
    # samplers that mlx-lm does not have
    **dict.fromkeys(("typical_p", "tfs_z", "length_penalty"), (1,)),
    **dict.fromkeys(("mirostat", "top_a", "min_tokens", "xtc_probability", "dry_multiplier"), (0,)),
    "use_beam_search": (False,),
    # whose model and account a router takes: OpenRouter, LiteLLM
    **dict.fromkeys(("provider", "models", "route", "transforms", "plugins", "usage", "preset", "session_id"), ()),
    **dict.fromkeys(("drop_params", "caching", "tags", "num_retries", "fallbacks"), ()),
    # hints on reasoning and length; reasoning_effort and chat_template_kwargs are those that work
    **dict.fromkeys(("thinking", "think", "enable_thinking", "thinking_budget", "reasoning", "include_reasoning"), ()),
    "verbosity": ("medium",),
}
"""Well-known fields without effect: accepted whatever the node's policy, and listed unless they are neutral."""

MESSAGE_ECHOES = frozenset(
    {
        *("id", "index", "object", "model", "created", "created_at", "timestamp", "finish_reason", "logprobs", "usage"),
        *("parsed", "annotations", "reasoning_details", "thinking_blocks", "provider_specific_fields", "is_error"),
        *("type", "status", "phase", "metadata", "additional_kwargs", "response_metadata", "extra_content"),
        *("cache_control", "prompt_cache_breakpoint"),
    }
)
"""What clients leave in the messages of a history: parts of earlier answers, which change nothing."""
CALL_ECHOES = frozenset({"index", "status", "extra_content", "provider_specific_fields", "cache_control", "signature"})
"""The same for a tool call."""
PART_ECHOES = frozenset(
    {
        *("annotations", "cache_control", "prompt_cache_breakpoint", "id", "index", "logprobs", "status", "citations"),
        *("signature", "format", "provider_metadata", "providerOptions", "extra_content"),
    }
)
"""The same for a part of a message's content."""
