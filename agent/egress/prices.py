"""What a request costs at a provider: by the prices of the policy, else by those that genai-prices ships. That library
is imported when it is needed, and its functions that would fetch prices are never called."""

from decimal import Decimal
from typing import Any

import msgspec

from agent.egress import anthropic_messages, openai_chat
from agent.policy.outgoing import Outgoing
from agent.policy.rules import Provider, dollars
from shared.errors import Halt

DEFAULT_MAX_TOK = 4096
"""The longest answer of a request that names none."""
TOOLS_TOK = 2048
"""What a provider may add to a prompt with tools by itself, at most."""
_MTOK = Decimal(1_000_000)


def max_tokens(outgoing: Outgoing) -> int:
    """The longest answer that is asked for; always sent."""
    return DEFAULT_MAX_TOK if outgoing.max_tokens is None else outgoing.max_tokens


def body(provider: Provider, outgoing: Outgoing) -> bytes:
    """The request as it is sent to a provider. Raises Refused for what its API cannot express."""
    most = max_tokens(outgoing)
    if provider.kind == "anthropic":
        return msgspec.json.encode(anthropic_messages.body(outgoing, most))
    return msgspec.json.encode(openai_chat.body(outgoing, provider.kind, most))


def cost(provider: Provider, model: str, prompt_tok: int, completion_tok: int, cached_tok: int) -> Decimal | None:
    """US dollars for a request; None where no price is known. Cached tokens of the prompt cost as little as the library
    knows; by prices of the policy they cost as much as the others. A provider on the premises costs nothing unless the
    policy says so."""
    per_in, per_out = dollars(provider.usd_per_mtok_in), dollars(provider.usd_per_mtok_out)
    if per_in is not None and per_out is not None:
        return (per_in * prompt_tok + per_out * completion_tok) / _MTOK
    if provider.kind == "local":
        return Decimal(0)
    return _listed(provider, model, prompt_tok, completion_tok, min(cached_tok, prompt_tok))


def most(provider: Provider, outgoing: Outgoing) -> Decimal | None:
    """The most that a request can cost, to be reserved before it is sent; None where no price is known. A token is at
    least a byte, so the bytes of the request bound the tokens of its prompt. Raises Refused as ``body`` does. The first
    call reads the price list: not on an event loop."""
    prompt_tok = len(body(provider, outgoing)) + (TOOLS_TOK if outgoing.tools or outgoing.schema else 0)
    return cost(provider, outgoing.model, prompt_tok, max_tokens(outgoing), 0)


def has_cap(provider: Provider) -> bool:
    """Whether the policy caps what may be spent at a provider."""
    return bool(provider.usd_per_day or provider.usd_per_month)


def unpriced(provider: Provider, model: str) -> Halt:
    """The error for a cap, or a key's budget in money, that cannot be kept."""
    what = f"provider {provider.name}: it or this key has a limit in money, and no price of {model} is known"
    how = "the operator has to state usd_per_mtok_in and usd_per_mtok_out in [[providers]], or remove the limit"
    return Halt(f"{what}; {how}", code="provider_setup")


def _listed(provider: Provider, model: str, prompt_tok: int, completion_tok: int, cached_tok: int) -> Decimal | None:
    import genai_prices

    # another host than the vendor's own may have other prices
    named: dict[str, Any] = {"provider_id": provider.kind}
    if provider.url or provider.kind == "compatible":
        named = {"provider_api_url": provider.base_url}
    usage = genai_prices.Usage(input_tokens=prompt_tok, cache_read_tokens=cached_tok, output_tokens=completion_tok)
    try:
        found = genai_prices.calc_price(usage, model_ref=model, **named)
    except (LookupError, ValueError):
        return None
    # a model that is listed without a price is not free
    unknown = (prompt_tok and not found.input_price) or (completion_tok and not found.output_price)
    return None if unknown else found.total_price
