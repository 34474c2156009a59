"""Optional: clients that show a token of an identity provider (OpenID Connect) instead of an API key.

Tokens are checked with the provider's public keys, which are fetched when the first token comes, and kept: a check
waits for no network. A request waits, for a bounded time, only while there are no keys yet, or while they are fetched
again because a token names a key that is not among them, once a minute at most. Without ``oidc.issuer`` nothing is
imported, fetched or kept. No token is ever logged.
"""

import asyncio
import hashlib
import json
import ssl
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from agent.api import jwt
from agent.api.context import OIDC, Unauthorized, bearer
from agent.api.jwt import BadToken, Keys
from agent.config import AgentConfig, Live
from agent.config_oidc import Oidc
from agent.tasks import Tasks
from shared.errors import RackError, Refused, Retryable
from shared.hosts import host_of, is_loopback
from shared.logs import get_logger

FETCH_S, WAIT_S = 10.0, 5.0
"""How long a fetch may take, and how long a request waits for one."""
AGAIN_S, RENEW_S, KEEP_S = 60.0, 600.0, 86_400.0
"""How often keys are fetched at most; how old they are when they are fetched anew; for how long the last good ones
count while the provider cannot be asked."""
MOST_BYTES = 256 << 10
MOST_TOKENS = 1000
"""Tokens whose check is remembered, until they expire."""

log = get_logger("agent.api.oidc")


class Verifier:
    """The keys of the provider in force, and which key id a token stands for."""

    def __init__(
        self, live: Live, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._wall = clock, wall
        self._oidc, self._ids = Oidc(), frozenset[str]()
        self._keys: Keys = {}
        self._known: dict[bytes, tuple[str, float]] = {}
        self._until_s = self._tried_s = self._got_s = float("-inf")
        self._tasks, self._fetching = Tasks(), None
        self._reason = ""
        live.follow(self._become)

    _fetching: "asyncio.Future[None] | None"

    @property
    def on(self) -> bool:
        """Whether an identity provider is configured."""
        return bool(self._oidc.issuer)

    def id_of(self, token: str) -> str:
        """The key id of a token's client. Raises Unauthorized, or Retryable while there are no keys to check it
        with."""
        try:
            header = jwt.header_of(token, self._oidc.algorithms)
            mark, now_s = hashlib.sha256(token.encode()).digest(), self._wall()
            self._renew()
            if not self._there():
                raise Retryable(
                    "the keys of the identity provider could not be fetched", code="oidc_unavailable", retry_after_s=5
                )
            if (known := self._known.get(mark)) is not None and now_s < known[1]:
                return known[0]
            if (key := jwt.key_for(header, self._keys)) is None:
                raise BadToken("is signed by a key that oidc.issuer does not publish")
            claims = jwt.claims_of(token, header, key, self._oidc, now_s)
            found = jwt.id_of(claims, self._oidc, self._ids)
        except BadToken as error:
            raise Unauthorized(f"the token {error}") from None
        if len(self._known) >= MOST_TOKENS:
            self._known.clear()
        self._known[mark] = found, claims["exp"] + jwt.LEEWAY_S
        return found

    def waits(self, token: str) -> bool:
        """Whether a fetch may bring the key that this token is checked with."""
        try:
            header = jwt.header_of(token, self._oidc.algorithms)
        except BadToken:
            return False
        if self._there() and jwt.key_for(header, self._keys) is not None:
            return False
        return self._fetching is not None or self._clock() - self._tried_s >= AGAIN_S

    async def ready(self) -> None:
        """Fetch the keys, or join the fetch that runs; at most ``WAIT_S``."""
        if (running := self._begun()) is not None:
            await asyncio.wait([running], timeout=WAIT_S)

    async def close(self) -> None:
        """End a fetch that runs."""
        await self._tasks.cancel()

    # ---- the keys ----

    def _become(self, config: AgentConfig) -> None:
        before, self._oidc = self._oidc, config.oidc
        self._ids = frozenset(key.id for key in config.keys)
        self._known = {}
        if (before.issuer, before.jwks_url, before.ca) != (self._oidc.issuer, self._oidc.jwks_url, self._oidc.ca):
            self._keys, self._fetching = {}, None
            self._until_s = self._tried_s = self._got_s = float("-inf")

    def _there(self) -> bool:
        return bool(self._keys) and self._clock() < self._until_s

    def _renew(self) -> None:
        """Begin a fetch in the background when the keys are old."""
        if self._clock() - self._got_s >= RENEW_S:
            self._begun()

    def _begun(self) -> "asyncio.Future[None] | None":
        if self._fetching is None and self._clock() - self._tried_s >= AGAIN_S:
            self._tried_s = self._clock()
            self._fetching = self._tasks.spawn(self._fetch(self._oidc))
        return self._fetching

    async def _fetch(self, oidc: Oidc) -> None:
        keys: Keys = {}
        try:
            keys, reason = await _keys_of(oidc), ""
        except RackError as error:
            reason = error.message
        except Exception as error:  # noqa: BLE001  (a fault here must not end all fetching)
            reason = f"the keys could not be fetched ({type(error).__name__})"
        if (oidc.issuer, oidc.jwks_url, oidc.ca) != (self._oidc.issuer, self._oidc.jwks_url, self._oidc.ca):
            return  # another configuration came into force meanwhile
        self._fetching = None
        if reason:
            if reason != self._reason:
                log.warning("oidc_keys_unknown", reason=reason, kept=self._there())
        else:
            self._keys, self._known = keys, {}
            self._got_s = self._clock()
            self._until_s = self._got_s + KEEP_S
            log.info("oidc_keys", count=sum(map(len, keys.values())))
        self._reason = reason


def waiting(request: web.Request) -> Awaitable[None] | None:
    """What a request has to wait for before its token can be checked; None for nearly all."""
    verifier: Verifier = request.app[OIDC]
    if not verifier.on or not jwt.looks_like_one(token := bearer(request)) or not verifier.waits(token):
        return None
    return verifier.ready()


async def _keys_of(oidc: Oidc) -> Keys:
    """The provider's keys. Raises RackError with the reason."""
    try:
        context = await asyncio.to_thread(ssl.create_default_context, cafile=oidc.ca or None)
    except (OSError, ssl.SSLError) as error:
        raise Refused(f"oidc.ca {oidc.ca}: {getattr(error, 'strerror', None) or type(error).__name__}") from None
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=FETCH_S), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
    ) as session:
        url = oidc.jwks_url or await _discovered(session, oidc, context)
        return await asyncio.to_thread(jwt.keys_of, await _get(session, url, context))


async def _discovered(session: aiohttp.ClientSession, oidc: Oidc, context: ssl.SSLContext) -> str:
    """Where the keys are, as the provider's own document says."""
    url = f"{oidc.issuer.rstrip('/')}/.well-known/openid-configuration"
    try:
        found = json.loads(await _get(session, url, context))
        issuer, where = found["issuer"], found["jwks_uri"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise Refused(f"{url}: is not a document of OpenID Connect; set oidc.jwks_url") from None
    if issuer != oidc.issuer or not isinstance(where, str) or not may_be_fetched(where):
        raise Refused(f"{url}: names another issuer, or keys that are not at an https:// address; set oidc.jwks_url")
    return where


async def _get(session: aiohttp.ClientSession, url: str, context: ssl.SSLContext) -> bytes:
    """A small document. Redirects are not followed: they may lead anywhere."""
    try:
        async with session.get(
            url, ssl=context, allow_redirects=False, headers={"Accept-Encoding": "identity"}
        ) as response:
            if response.status != 200:
                raise Retryable(f"{url}: status {response.status}")
            body = bytearray()
            async for piece in response.content.iter_chunked(64 << 10):
                body += piece
                if len(body) > MOST_BYTES:
                    raise Refused(f"{url}: more than {MOST_BYTES} bytes")
            return bytes(body)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Retryable(f"{url}: {type(error).__name__}") from None


def may_be_fetched(url: str) -> bool:
    """Whether keys may come from there: by https, or from this machine."""
    return url.startswith("https://") or (url.startswith("http://") and is_loopback(host_of(url)))
