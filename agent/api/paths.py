"""What to tell a client whose path is not served: the path, the likely mistake, what is served. Pure."""

import re
from collections.abc import Sequence

MAX_PATH_CHARS = 96
_UNSAFE = re.compile(r"[^A-Za-z0-9/_.~:\-]")
_BASE = "clients take the base URL, which ends in /v1, and add the rest themselves"
_HINTS = (
    (r"/v\d+", f"this is the base URL, not a route; {_BASE}"),
    (r"/(docs|redoc|swagger|help|api-docs|openapi.*|index\..*|v1/openapi.*)(/.*)?", "see / and /openapi.json"),
    (r"(/v1)?/(healthz?|livez?|readyz?|ping|status|metrics)(/.*)?", "did you mean /health, /live, /ready or /metrics?"),
    (r".*/responses(/.*)?", "the Responses API is not served; set the client to chat completions"),
    (r".*/(messages|complete)(/.*)?", "Anthropic's API is not served; use a client of the OpenAI API"),
    (r".*/models/.+", f"did you mean /v1/models/NAME? {_BASE}"),
    (r"/api(/.*)?", "Ollama's API is not served; set the client to an OpenAI-compatible server"),
    (r".*/(images|audio|videos|realtime)(/.*)?", "this service reads and writes text only"),
    (r".*/(moderations|files|uploads|batches|fine_tuning)(/.*)?", "it is not part of this service"),
    (r".*/(vector_stores|assistants|threads|containers|evals|conversations)(/.*)?", "it is not part of this service"),
    (r".*/(completion|generate|infill|tokenize|detokenize|props|slots)", "other servers' own routes are not served"),
)
"""The first that matches the whole path."""


def not_served(method: str, path: str, served: Sequence[str]) -> str:
    """The message of a 404. ``served`` are routes; one with the same ending is likely the one that was meant."""
    plain = re.sub(r"/+", "/", path.lower()).rstrip("/") or "/"
    meant = next((one for one in served if plain.endswith(one.removeprefix("/v1"))), None)
    if meant is not None:
        hint = f"did you mean {meant}? {_BASE}"
    else:
        hint = next((why for pattern, why in _HINTS if re.fullmatch(pattern, plain)), "check the base URL")
    return f"{method[:16]} {shown(path)}: no such route; {hint}. Served: {', '.join(served)}"


def not_allowed(method: str, path: str, allowed: str) -> str:
    """The message of a 405."""
    hint = f"; clients send to /v1/chat/completions: {_BASE}" if path == "/" else ""
    return f"{method[:16]} {shown(path)}: method not allowed; use {allowed or 'another'}{hint}"


def shown(path: str) -> str:
    """A path that a client chose, bounded and sanitized for an error message."""
    cut = _UNSAFE.sub("?", path[:MAX_PATH_CHARS])
    return cut if len(path) <= MAX_PATH_CHARS else f"{cut}..."
