"""What the handlers share: the daemon's objects, authentication, JSON responses and log fields."""

import hmac
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import msgspec
from aiohttp import hdrs, web

from agent.api.bodies import Bodies
from agent.api.connection_limits import Table
from agent.boundary import Boundary
from agent.config import AgentConfig, Live, cache_group, hash_key, is_open
from agent.control.follower import Follower
from agent.gateway.dispatch import Dispatch
from agent.gateway.passage import Passage
from agent.mesh.peers import PeerTable
from agent.mesh.signing import Nonces, RackKeys
from agent.models.pool import Pool
from agent.reload_run import Reloader
from agent.status import Status
from agent.wire.namespaces import Namespace, namespace_of
from shared.errors import RackError
from shared.log_repeats import Repeats


class Unauthorized(RackError):
    """No key, a wrong key, or a key for another purpose."""

    code = "invalid_api_key"


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The objects of the daemon that handlers use."""

    live: Live
    dispatch: Dispatch
    boundary: Boundary
    pool: Pool
    follower: Follower
    peers: PeerTable
    status: Status
    metrics: Callable[[], bytes]
    connections: Table
    seal: Callable[[], Awaitable[dict[str, Any]]]
    secrets: Callable[[], dict[str, str]]
    admin_token: str
    metrics_token: str
    keys: RackKeys
    nonces: Nonces
    reloader: Reloader

    @property
    def config(self) -> AgentConfig:
        """The configuration in force."""
        return self.live.now


CONTEXT = web.AppKey("context", Context)
LINKS: web.AppKey[Any] = web.AppKey("links", set)
LOGGED: web.AppKey[Any] = web.AppKey("logged", set)
DESCRIBED = web.AppKey("described", bytes)
BODIES = web.AppKey("bodies", Bodies)
PARSING = web.AppKey("parsing", Executor)
REFUSALS = web.AppKey("refusals", Repeats)
OIDC: web.AppKey[Any] = web.AppKey("oidc", object)
REQUEST_ID = web.RequestKey("request_id", str)
KEY_ID = web.RequestKey("key_id", str)
"""Of a request that its key's limits are for."""
PROVED = web.RequestKey("proved", bool)
PASSAGE = web.RequestKey("passage", Passage)
LOG_FIELDS: web.RequestKey[Any] = web.RequestKey("log_fields", dict)


def new_request_id() -> str:
    """The id of a request in responses, logs and `why`."""
    return f"req_{os.urandom(12).hex()}"


def sign(response: web.StreamResponse, request_id: str) -> None:
    """Give a response the request's id, under our name and the one that OpenAI's clients read, and no library's
    version."""
    response.headers.update({"X-Mlxrack-Request-Id": request_id, "x-request-id": request_id, hdrs.SERVER: "mlxrack"})


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON response."""
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


def note(request: web.Request, **fields: object) -> None:
    """Add numbers and ids to the request's one log line."""
    request.setdefault(LOG_FIELDS, {}).update(fields)


def proved(request: web.Request) -> None:
    """The client has shown who it is: its connection is not closed for one that has not, and its errors are logged."""
    request[PROVED] = True
    if (tracked := getattr(request.protocol, "tracked", None)) is not None:
        tracked.proved()


def client_key_id(request: web.Request) -> str:
    """The id of the client's key, or of the one that its token stands for (agent/api/oidc.py); "" on a node that is
    open to all. Raises Unauthorized, or Retryable while tokens cannot be checked."""
    config = request.app[CONTEXT].config
    if is_open(config):
        proved(request)
        return ""
    keys, token = config.keys, bearer(request)
    offered = hash_key(token)
    found = ""
    for key in keys:  # compare all of them, so that timing reveals nothing
        if hmac.compare_digest(key.sha256, offered):
            found = key.id
    if not found and config.oidc.issuer and token.count(".") == 2:
        found = request.app[OIDC].id_of(token)
    if not found:
        raise Unauthorized("no valid API key; send Authorization: Bearer <key>")
    proved(request)
    return found


def cache_of(request: web.Request, key_id: str) -> Namespace:
    """The namespace of the prompt cache that a key's requests use."""
    return namespace_of(key_id, cache_group(request.app[CONTEXT].config.keys, key_id))


def require_admin(request: web.Request) -> None:
    """Require the admin token, which lies in a file of the state folder. Raises Unauthorized."""
    if not hmac.compare_digest(bearer(request).encode(), request.app[CONTEXT].admin_token.encode()):
        raise Unauthorized("the admin token is missing or wrong; read it from admin.token in the state folder")
    proved(request)


def require_reader(request: web.Request) -> None:
    """Require the metrics token or the admin token where keys are configured, whatever the listening address: a proxy
    makes every client a local one. Raises Unauthorized."""
    context = request.app[CONTEXT]
    if context.config.api.open_metrics or is_open(context.config):
        return  # without keys it listens on loopback only
    offered = bearer(request).encode()
    # both are compared, so that timing reveals nothing
    known = [hmac.compare_digest(offered, token.encode()) for token in (context.metrics_token, context.admin_token)]
    if not any(known):
        raise Unauthorized("the metrics token is missing or wrong; read it from metrics.token in the state folder")
    proved(request)


def bearer(request: web.Request) -> str:
    """What a client shows; "" for nothing, or nothing of that kind."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    # a header may hold any bytes; those beyond ASCII become question marks, and match nothing
    return token.strip().encode("ascii", "replace").decode() if scheme.lower() == "bearer" else ""
