"""What is known of a request when it is decided: names, counts and flags, never a text. Pure data; the audit keeps it,
so that last week's requests can be decided again under another policy."""

from typing import Literal

import msgspec

from agent.policy.classes import TaskClass

ClassFrom = Literal["header", "body", "model", "key", "guess"]
"""What named the class: the header, the body, the model's name or the policy for it, the policy for the key, or the
heuristic."""
Reason = Literal["label", "key", "model", "detector", "detector_failed", "taint", "taint_full", "taint_not_loaded"]
"""Why a request is SENSITIVE: said by its caller or by the policy for its key or model, found in its text, or its text
was in a SENSITIVE request before. A detector that failed and taints that are incomplete count as found."""
DEFAULT_ANSWER_TOK = 4096
"""The most tokens of an answer whose client set no limit: a model's own setting is not known at every gateway."""
UNSURE: frozenset[Reason] = frozenset({"detector_failed", "taint_full", "taint_not_loaded"})
"""Reasons that say what could not be known; what is SENSITIVE for these alone is not marked as such for good, or each
start would taint the texts that all clients share."""
Feature = Literal["tools", "schema", "logprobs", "n", "prompt", "embeddings", "template_args", "sampling"]
"""What a request uses that not every place can do: ``n`` is more than one answer, ``prompt`` a text to continue,
``sampling`` parameters beyond OpenAI's."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``model`` is the name that was asked for, ``aliases`` are further names of the models that may get
    it (agent/policy/deciding.py:models_of): what the policy says of a model holds under each of its names.
    ``prompt_tok`` and ``answer_tok`` are estimates, the latter the most that may be generated. ``day`` is the date at
    the gateway, YYYY-MM-DD, in UTC."""

    key_id: str = ""
    model: str
    aliases: tuple[str, ...] = ()
    task_class: TaskClass = "ROUTINE"
    class_from: ClassFrom = "guess"
    sensitive: tuple[Reason, ...] = ()
    prompt_tok: int = 0
    answer_tok: int = 0
    features: tuple[Feature, ...] = ()
    day: str = "1970-01-01"
