"""One request to a provider, until its answer begins, and the reading of it: attempts, limits, and errors in our own
words. A body is sent once, and once more where nothing of an answer has arrived."""

import asyncio
import contextlib
import io
from datetime import UTC, datetime
from typing import NamedTuple

import aiohttp

from agent.egress import failures
from agent.egress.anthropic_messages import VERSION
from agent.egress.connections import Connections
from agent.egress.credentials import Credentials, Secret
from agent.policy.rules import Provider
from shared.errors import Halt, RackError

GAP_S = 60.0
"""Silence within an answer."""
ERROR_S, MOST_ERROR_BYTES = 5.0, 16 << 10
MOST_ANSWER_BYTES = 64 << 20


class Failed(NamedTuple):
    """An attempt without an answer, and how long to wait before another one; None for no other."""

    error: RackError
    again_s: float | None = None


class Limits:
    """When a request to a provider is given up: the whole of it, and the silence before and within its answer.
    ``now_s`` is the loop's time."""

    def __init__(self, provider: Provider, now_s: float) -> None:
        self._provider = provider
        self._first_s, self._until_s = now_s + provider.first_token_s, now_s + provider.request_s
        self._began = False

    def heard(self, waited_s: float = 0.0) -> None:
        """A piece of the answer arrived; what keeps a connection alive is not one. The ``waited_s`` that its reader
        then took are not the provider's."""
        self._began = True
        self._until_s += waited_s

    def by_s(self, now_s: float) -> float:
        """When the next bytes have to be here."""
        return min(self._until_s, now_s + GAP_S if self._began else self._first_s)

    def silence(self, now_s: float) -> RackError:
        """The error for a limit that has passed."""
        name = self._provider.name
        if now_s >= self._until_s:
            return failures.of_silence(name, "complete answer", self._provider.request_s)
        if self._began:
            return failures.of_silence(name, "next piece of its answer", GAP_S)
        return failures.of_silence(name, "first token", self._provider.first_token_s)


class Exchange:
    """The exchanges with all providers."""

    def __init__(self, connections: Connections, credentials: Credentials) -> None:
        self._connections, self._credentials = connections, credentials

    async def opened(self, provider: Provider, url: str, payload: bytes, limits: Limits) -> aiohttp.ClientResponse:
        """An event stream of status 200; the caller closes it. Raises RackError."""
        found = await self._attempt(provider, url, payload, limits)
        if isinstance(found, Failed) and found.again_s is not None:
            now_s = asyncio.get_running_loop().time()
            if now_s + found.again_s < limits.by_s(now_s):
                await asyncio.sleep(found.again_s)
                found = await self._attempt(provider, url, payload, limits)
        if isinstance(found, Failed):
            raise found.error
        return found

    async def read(self, response: aiohttp.ClientResponse, provider: Provider, limits: Limits) -> bytes:
        """The next bytes of an answer; b"" at its end. Raises RackError."""
        loop = asyncio.get_running_loop()
        error: RackError | None = None
        if loop.time() >= limits.by_s(loop.time()):
            raise limits.silence(loop.time())  # one that never pauses meets no timer
        try:
            async with asyncio.timeout_at(limits.by_s(loop.time())):
                return await response.content.readany()
        except TimeoutError:
            error = limits.silence(loop.time())
        except (aiohttp.ClientError, OSError):
            error = failures.of_garbage(provider.name, "an answer that breaks off before its end")
        raise error

    async def short(self, provider: Provider, url: str, payload: bytes, limits: Limits, most: int) -> tuple[int, bytes]:
        """Status and body of a short answer, of which at most ``most`` bytes are read. Raises RackError."""
        secret = await self._secret(provider, limits)
        found = await self._posted(provider, url, payload, secret, limits)
        if isinstance(found, Failed):
            raise found.error
        with contextlib.closing(found):
            return found.status, await self._body(found, most)

    async def _attempt(
        self, provider: Provider, url: str, payload: bytes, limits: Limits
    ) -> aiohttp.ClientResponse | Failed:
        secret = await self._secret(provider, limits)
        found = await self._posted(provider, url, payload, secret, limits)
        if isinstance(found, Failed):
            return found
        if found.status == 200:
            kind, encoding = found.headers.get("Content-Type", ""), found.headers.get("Content-Encoding", "")
            if (error := failures.of_content(provider.name, kind, encoding)) is None:
                return found
            found.close()
            return Failed(error)
        with contextlib.closing(found):
            kind = failures.kind_in(await self._body(found, MOST_ERROR_BYTES))
        told_s = failures.retry_after_s(found.headers, datetime.now(UTC))
        error = failures.of_status(provider.name, found.status, kind, told_s)
        if found.status == 401 and secret is not None and await self._is_renewed(provider, secret, limits):
            return Failed(error, 0.0)
        return Failed(error, failures.pause_s(error))

    async def _posted(
        self, provider: Provider, url: str, payload: bytes, secret: Secret | None, limits: Limits
    ) -> aiohttp.ClientResponse | Failed:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(limits.by_s(loop.time())):
                session = await self._connections.session(provider.category)
                # a file, because it is sent in pieces
                body, headers = io.BytesIO(payload), _headers(provider, secret)
                return await session.post(url, data=body, headers=headers, allow_redirects=False)
        except aiohttp.ClientError as raised:
            # what a client library raises holds the headers of the request: none of it is kept
            error = failures.of_connection(provider.name, url, raised)
        except TimeoutError:
            return Failed(limits.silence(loop.time()))
        except (OSError, ValueError) as raised:
            error = failures.of_connection(provider.name, url, raised)
        return Failed(error, failures.pause_s(error))

    async def _body(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        found = b""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(ERROR_S):
                while len(found) < most and (piece := await response.content.readany()):
                    found += piece[: most - len(found)]
        return found

    async def _secret(self, provider: Provider, limits: Limits) -> Secret | None:
        """The provider's key; None for one on the premises that needs none. Raises Halt."""
        if not provider.secret and provider.kind == "local":
            return None
        why = "it has no key; the operator has to set [[providers]] secret"
        if provider.secret:
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout_at(limits.by_s(loop.time())):
                    return await self._credentials.of(provider.secret)
            except Halt as error:
                why = error.message
            except TimeoutError:
                why = "its key is not known in time; the operator has to look at what keeps it"
        raise Halt(f"provider {provider.name}: {why}", code="provider_setup")

    async def _is_renewed(self, provider: Provider, refused: Secret, limits: Limits) -> bool:
        """Whether another key stands behind the reference by now."""
        self._credentials.drop(provider.secret)
        found = await self._secret(provider, limits)
        return found is not None and found.reveal() != refused.reveal()


def _headers(provider: Provider, secret: Secret | None) -> dict[str, str]:
    found = {
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "User-Agent": "mlxrack",
    }
    if provider.kind == "anthropic":
        found["anthropic-version"] = VERSION
    if secret is not None:
        key = {"x-api-key": secret.reveal()} if provider.kind == "anthropic" else None
        found |= key or {"Authorization": f"Bearer {secret.reveal()}"}
    return found
