"""Parsers for OpenAI requests: bytes to one validated structure. Pure; nothing is ignored silently (docs/api.md)."""

from agent.api.openai.known import ADVISORY, ELSEWHERE, NEUTRAL
from agent.api.openai.requests import AnswerRequest, EmbedRequest, parse_chat, parse_embeddings, parse_text

__all__ = [
    "ADVISORY",
    "ELSEWHERE",
    "NEUTRAL",
    "AnswerRequest",
    "EmbedRequest",
    "parse_chat",
    "parse_embeddings",
    "parse_text",
]
