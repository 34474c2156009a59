"""The only way out of the rack: requests that redaction has made, to places that the policy names.

Closed by default. Without a provider, a key and an [[allow]] nothing is resolved and no socket is opened; nor is
anything at start, or to see whether a provider is there.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, closing, suppress
from decimal import Decimal
from typing import Any

import msgspec

from agent.egress import anthropic_messages, cloud_models, connections, failures, openai_chat, prices
from agent.egress.answers import Failure
from agent.egress.breaker import Breaker
from agent.egress.connections import Connections, Reach
from agent.egress.credentials import Credentials
from agent.egress.exchange import MOST_ANSWER_BYTES, Exchange, Limits
from agent.egress.sse import Events, Garbage
from agent.policy.addresses import unfit_url
from agent.policy.outgoing import End, Outgoing, Piece
from agent.policy.redaction import Redacted
from agent.policy.rules import Provider, Rules, is_cloud_name
from agent.tasks import Lookups
from shared.errors import Halt, RackError, Refused, Retryable
from shared.logs import get_logger

log = get_logger("agent.egress")

Reader = openai_chat.Reader | anthropic_messages.Reader


class Egress:
    """Sends requests to providers. ``rules`` are the present ones, asked for each request; ``environ`` is where
    ``env:`` references and the programs behind ``op:`` and ``keychain:`` find theirs. ``reach`` is for tests."""

    def __init__(
        self,
        rules: Callable[[], Rules],
        environ: Mapping[str, str],
        *,
        reach: Reach | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules, self._clock = rules, clock
        self._lookups = Lookups()
        self._connections = Connections(reach or connections.SYSTEM, self._lookups)
        self._credentials = Credentials(environ, clock=clock)
        self._exchange = Exchange(self._connections, self._credentials)
        self._breakers: dict[Provider, Breaker] = {}
        self._stays: dict[tuple[str, str], float] = {}

    async def close(self) -> None:
        """Close all connections, and forget the keys."""
        self._credentials.close()
        await self._connections.close()

    def send(self, redacted: Redacted) -> AsyncGenerator[Piece | End, None]:
        """The pieces of an answer, then its End. Raises TypeError for anything but a Redacted, Refused for one that the
        present policy does not let out or that its provider cannot be asked; and while it is read RackError, of a code
        of `agent.egress.failures`. Whoever stops reading closes it (``contextlib.aclosing``): that closes the
        connection."""
        if type(redacted) is not Redacted:
            raise TypeError(f"egress: sends what redaction has made, not {type(redacted).__name__}")
        provider = _permitted(redacted, self._rules())
        return self._answer(provider, redacted.outgoing, _written(provider, redacted.outgoing))

    async def most_usd(self, provider: Provider, outgoing: Outgoing) -> Decimal | None:
        """The most that a request can cost there, None where no price is known. In a thread: prices may have to be
        read. Raises Refused as ``send`` does."""
        return await asyncio.to_thread(_most_usd, provider, outgoing)

    def rest_s(self, name: str) -> float:
        """How long a provider is left alone because it failed; 0 if it may be asked now."""
        now_s = self._clock()
        found = [self._breaker(one).rest_s(now_s) for one in self._rules().providers if one.name == name]
        return max(found, default=0.0)

    def status(self) -> list[dict[str, Any]]:
        """The providers for display; asks nobody."""
        now_s = self._clock()
        return [
            {
                "provider": one.name,
                "kind": one.kind,
                "category": one.category,
                "rests_s": round(self._breaker(one).rest_s(now_s), 1),
                "problem": self._breaker(one).reason,
            }
            for one in self._rules().providers
        ]

    async def _answer(
        self, provider: Provider, outgoing: Outgoing, payload: bytes
    ) -> AsyncGenerator[Piece | End, None]:
        breaker = self._breaker(provider)
        if (rest_s := breaker.rest_s(self._clock())) > 0:
            why = f"provider {provider.name} failed, and is asked again in {rest_s:.0f} s"
            raise Retryable(why, code="provider_busy", retry_after_s=rest_s)
        await self._check_price(provider, outgoing)
        tried = breaker.began()
        try:
            async with aclosing(self._pieces(provider, outgoing, payload)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, End):
                        breaker.ok()
                    yield piece
        except Refused:
            breaker.ok()
            raise
        except RackError as error:
            told_s = error.retry_after_s if isinstance(error, Retryable) else None
            breaker.failed(self._clock(), error.message, told_s, tried=tried)
            log.warning("provider_failed", provider=provider.name, code=error.code, why=error.message)
            raise
        finally:
            breaker.ended(tried=tried)

    async def _pieces(
        self, provider: Provider, outgoing: Outgoing, payload: bytes
    ) -> AsyncGenerator[Piece | End, None]:
        clock = asyncio.get_running_loop().time
        limits = Limits(provider, clock())
        if provider.kind == "local":
            await self._check_stays(provider, outgoing.model, limits)
        reader, events, received = _reader(provider, outgoing), Events(), 0
        url = provider.base_url + (anthropic_messages.PATH if provider.kind == "anthropic" else openai_chat.PATH)
        with closing(await self._exchange.opened(provider, url, payload, limits)) as response:
            while not reader.done and (data := await self._exchange.read(response, provider, limits)):
                received += len(data)
                if received > MOST_ANSWER_BYTES:
                    raise failures.of_garbage(provider.name, f"more than {MOST_ANSWER_BYTES >> 20} MiB")
                for piece in _taken(provider, reader, events, data):
                    read_s = clock()
                    yield piece
                    limits.heard(clock() - read_s)
            rest = _rest(provider, reader, events)
        for last in rest:
            yield last

    async def _check_price(self, provider: Provider, outgoing: Outgoing) -> None:
        """Raises Halt where a cap cannot be kept."""
        if prices.has_cap(provider):
            model = outgoing.model
            # the price list is read once, which takes a tenth of a second
            known = await self._lookups.ask(("price", provider, model), lambda: prices.cost(provider, model, 1, 1, 0))
            if known is None:
                raise prices.unpriced(provider, model)

    async def _check_stays(self, provider: Provider, model: str, limits: Limits) -> None:
        """Raises Halt for a model that a local server would pass on to its vendor."""
        which, now_s = (provider.base_url, model), self._clock()
        self._stays = {one: until_s for one, until_s in self._stays.items() if now_s < until_s}
        if which in self._stays:
            return
        asked = msgspec.json.encode({"model": model})
        url = cloud_models.root(provider.base_url) + cloud_models.PATH
        leaves = cloud_models.leaves(*await self._exchange.short(provider, url, asked, limits, cloud_models.MOST_BYTES))
        if leaves is None:
            why = f"provider {provider.name} does not say whether its model stays on the premises; try again"
            raise Retryable(why, code="provider_failed")
        if leaves:
            raise _in_cloud(provider, "this model")
        self._stays[which] = now_s + cloud_models.ASKED_AGAIN_S

    def _breaker(self, provider: Provider) -> Breaker:
        """Its own, as long as its configuration stays as it is."""
        if provider not in self._breakers:
            present = self._rules().providers
            self._breakers = {one: breaker for one, breaker in self._breakers.items() if one in present}
        return self._breakers.setdefault(provider, Breaker())


def _permitted(redacted: Redacted, rules: Rules) -> Provider:
    """The provider of a request, if the present policy lets it out. Raises Refused, and Halt for one that is not where
    its kind has to be."""
    provider = next((one for one in rules.providers if one.name == redacted.provider), None)
    if provider is None:
        raise _forbidden(f"the policy has no provider {redacted.provider} any more")
    if provider.category == "outside" and redacted.category != "outside":
        raise _forbidden(f"provider {provider.name} is outside, and this request is not redacted for that")
    model = redacted.outgoing.model
    if not any(one.provider == provider.name and one.use == model for one in rules.allow):
        raise _forbidden(f"the policy has no [[allow]] for this model of provider {provider.name} any more")
    if provider.kind == "local" and is_cloud_name(model):
        raise _in_cloud(provider, model)
    if why := unfit_url(provider.base_url, provider.category):
        raise Halt(f"provider {provider.name}: url {why}; the operator has to correct it", code="provider_setup")
    return provider


def _written(provider: Provider, outgoing: Outgoing) -> bytes:
    """The request in the provider's API. Raises Refused; what could not be written is in no error."""
    with suppress(RecursionError, UnicodeError, msgspec.MsgspecError):
        return prices.body(provider, outgoing)
    what = "nested too deeply, not JSON, or half a character"
    raise Refused(f"messages, tools or response_format: cannot be sent ({what})", code="provider_refused")


def _most_usd(provider: Provider, outgoing: Outgoing) -> Decimal | None:
    _written(provider, outgoing)
    return prices.most(provider, outgoing)


def _forbidden(why: str) -> Refused:
    return Refused(f"not sent: {why}", code="provider_not_allowed")


def _in_cloud(provider: Provider, model: str) -> Halt:
    why = f"{model} is computed by its vendor, not on the premises"
    how = "the operator has to choose another one in [[allow]] use"
    return Halt(f"provider {provider.name}: {why}; {how}", code="provider_setup")


def _reader(provider: Provider, outgoing: Outgoing) -> Reader:
    if provider.kind == "anthropic":
        return anthropic_messages.Reader(_new_id, answer_by_tool=anthropic_messages.by_tool(outgoing))
    return openai_chat.Reader(_new_id)


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _taken(provider: Provider, reader: Reader, events: Events, data: bytes) -> list[Piece]:
    """The pieces in some bytes of an answer. Raises Retryable."""
    error: RackError
    try:
        found = (event for event in events.feed(data) if not reader.done)
        return [piece for event in found for piece in reader.take(event)]
    except Garbage as garbage:
        error = failures.of_garbage(provider.name, str(garbage))
    except Failure as failure:
        error = failures.of_stream(provider.name, failure.kind)
    raise error


def _rest(provider: Provider, reader: Reader, events: Events) -> list[Piece | End]:
    """The rest of an answer, with what its last event lacks of a line end. Raises Retryable."""
    pieces = [] if reader.done else _taken(provider, reader, events, b"\n\n")
    try:
        return [*pieces, *reader.close()]
    except Garbage as garbage:
        error = failures.of_garbage(provider.name, str(garbage))
    raise error
