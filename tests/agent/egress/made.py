"""Requests and policies for tests of egress."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from agent.egress.connections import Reach
from agent.egress.providers import Egress
from agent.policy.addresses import Category
from agent.policy.outgoing import Called, End, Outgoing, Piece, Turn
from agent.policy.redaction import Redacted, redacted
from agent.policy.rules import Permission, Provider, Rules
from shared.errors import RackError

KEY = "sk-marker-not-to-be-seen-anywhere"
PROMPT = "marker of a prompt"
ENVIRON = {"API_KEY": KEY, "OTHER": "also of the daemon"}


def provider(kind: Any = "openai", name: str = "p", **more: Any) -> Provider:
    """A provider, with a key in the environment."""
    return Provider(**{"name": name, "kind": kind, "secret": "" if kind == "local" else "env:API_KEY", **more})


def rules(*providers: Provider, model: str = "m") -> Rules:
    """A policy that permits a model of each provider to everybody."""
    everyone: dict[str, Any] = {"keys": ("*",), "classes": ("ROUTINE",), "models": ("*",)}
    return Rules(
        providers=providers, allow=tuple(Permission(provider=p.name, use=model, **everyone) for p in providers)
    )


def outgoing(*turns: Turn, model: str = "m", **more: Any) -> Outgoing:
    """A request; by default of one turn."""
    return Outgoing(model=model, turns=turns or (Turn(role="user", content=PROMPT),), **more)


def sealed(sent: Outgoing | None = None, name: str = "p", category: Category = "outside") -> Redacted:
    """What redaction would have made of a request."""
    request = outgoing() if sent is None else sent
    seal = redacted._SEAL
    return Redacted(seal, provider=name, category=category, outgoing=request, counts={}, originals={})


def egress(*providers: Provider, reach: Reach | None = None, model: str = "m", **more: Any) -> Egress:
    """An Egress with a policy that permits these providers."""
    found = rules(*providers, model=model)
    return Egress(lambda: found, ENVIRON, reach=reach, **more)


async def answered(egress: Egress, sent: Redacted, within_s: float = 60) -> tuple[str, str, Sequence[Called], End]:
    """Text, reasoning, calls and end of an answer, as a caller joins them."""
    text, reasoning, calls, end = "", "", list[Called](), None
    async with asyncio.timeout(within_s), aclosing(egress.send(sent)) as pieces:
        async for piece in pieces:
            assert end is None, "nothing follows the end"
            if isinstance(piece, Piece):
                text, reasoning, calls = text + piece.text, reasoning + piece.reasoning, [*calls, *piece.calls]
            else:
                end = piece
    assert end is not None
    return text, reasoning, calls, end


async def failed(egress: Egress, sent: Redacted, within_s: float = 60) -> RackError:
    """The error of a request that fails."""
    try:
        found = await answered(egress, sent, within_s)
    except RackError as error:
        return error
    raise AssertionError(found)
