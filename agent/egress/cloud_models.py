"""Models of a local server that its vendor computes. Ollama forwards them, under any name that somebody gave them, so
the server itself is asked. Pure."""

from typing import Any

import msgspec

PATH = "/api/show"
ASKED_AGAIN_S = 300.0
MOST_BYTES = 4 << 20
"""Its answer has the model's licence and template in it."""


class _Shown(msgspec.Struct):
    remote_host: Any = None
    remote_model: Any = None


def root(base_url: str) -> str:
    """Where Ollama's own API is, from where its OpenAI API is."""
    return base_url.removesuffix("/v1").rstrip("/")


def leaves(status: int, body: bytes) -> bool | None:
    """Whether a model leaves the premises; None where the answer does not say: an Ollama that is busy or broken. Other
    servers have no such route, and no such models."""
    if status == 429 or status >= 500:
        return None
    try:
        shown = msgspec.json.decode(body, type=_Shown)
    except msgspec.ValidationError:
        return False  # JSON of another program
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None if body.lstrip()[:1] == b"{" else False
    return bool(shown.remote_host or shown.remote_model)
