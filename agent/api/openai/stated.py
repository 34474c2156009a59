"""A request as the policy sees it, from its body and headers: for `policy explain`, which sends nothing. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from agent.api.openai.requests import AnswerRequest, EmbedRequest, parse_chat, parse_embeddings, parse_text
from agent.config import Api
from agent.gateway.describing import answer_tok, answers_of, features, prompt_tok, turns
from agent.policy.classes import HEADER, NOTHING, Declared, TaskClass, declared
from agent.policy.facts import Facts
from agent.policy.guess import guess


class Stated(NamedTuple):
    """``facts`` without what the policy adds (class, SENSITIVE); what header and body declare; the guess."""

    facts: Facts
    header: Declared = NOTHING
    body: Declared = NOTHING
    guessed: TaskClass = "ROUTINE"


def stated(body: bytes, headers: Mapping[str, str], api: Api) -> Stated:
    """Which API a body is for is told by its fields. Raises Refused as the API would."""
    said = declared([value for name, value in headers.items() if name.lower() == HEADER.lower()], HEADER)
    asked = _parsed(body, api)
    if isinstance(asked, EmbedRequest):
        facts = Facts(model=asked.embed.model, prompt_tok=prompt_tok(asked.embed), features=features(asked.embed))
        return Stated(facts, said, asked.declared)
    ask, answers = asked.generate, answers_of(asked.n, asked.prompts)
    facts = Facts(
        model=ask.model,
        prompt_tok=prompt_tok(ask, asked.prompts),
        answer_tok=answer_tok(ask, answers),
        features=features(ask, n=answers, prompts=asked.prompts),
    )
    has_tools, has_schema = bool(ask.tools), ask.schema is not None
    text = turns(ask, asked.prompts)
    guessed = guess(text, has_tools=has_tools, has_schema=has_schema, max_tokens=ask.max_tokens)
    return Stated(facts, said, asked.declared, guessed)


def _parsed(body: bytes, api: Api) -> AnswerRequest | EmbedRequest:
    if b'"messages"' in body:
        return parse_chat(body, api)
    return parse_text(body, api) if b'"prompt"' in body else parse_embeddings(body, api)
