"""What is asked of every request before its handler: whether it may come from a browser, and whether the node has a
place for it. It reads headers only."""

import contextlib

from aiohttp import hdrs, web

from agent.api import origins
from agent.api.context import CONTEXT, REQUEST_ID, client_key_id
from shared.errors import RackError, Retryable
from shared.hosts import is_loopback

ALLOWED_ORIGIN: web.RequestKey[str] = web.RequestKey("allowed_origin", str)
_API = ("/v1/", "/openapi.json")
_ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_BUSY_S = 5.0


def admit(request: web.Request) -> web.StreamResponse | None:
    """Refuse what may not be served; the answer to a browser's preflight, None where a handler answers. Raises Refused
    and Retryable."""
    tracked = getattr(request.protocol, "tracked", None)
    if tracked is not None:
        tracked.enters("busy")
    origin = _checked(request)
    if origin is not None:
        request[ALLOWED_ORIGIN] = origin
        if request.method == hdrs.METH_OPTIONS:
            return web.Response(status=204, headers=origins.preflight(request.headers))
    if tracked is not None and not tracked.serves(request.path):
        full = Retryable("too many connections to this node", code="connections_full", retry_after_s=_BUSY_S)
        _count(request, full)
        raise full
    return None


def _count(request: web.Request, full: Retryable) -> None:
    """A request that wants an answer, of a client with a key, found no place: the others are no requests of the rack's
    clients."""
    if request.method == hdrs.METH_POST and request.path in _ANSWERED:
        with contextlib.suppress(RackError):
            request.app[CONTEXT].dispatch.turned_away(request[REQUEST_ID], client_key_id(request), full)


def share(request: web.Request, response: web.StreamResponse) -> None:
    """Let an allowed page read the answer, errors and streams included."""
    if (origin := request.get(ALLOWED_ORIGIN)) is not None:
        response.headers.update(origins.sharing(origin))
    if request.app[CONTEXT].config.api.cors_origins:
        response.headers[hdrs.VARY] = hdrs.ORIGIN


def _checked(request: web.Request) -> str | None:
    config = request.app[CONTEXT].config
    if hosts := request.headers.getall(hdrs.HOST, []):
        hosts = [*hosts, _bracketed(request.host)]  # which a proxy's form of the request line sets
    if is_loopback(config.listen.host):
        origins.check_host(hosts, _names(config.listen.names))
    if origins.is_visit(request.method, request.path, request.headers):
        return None
    is_api = request.path.startswith(_API)
    origin = origins.allowed_origin(request.headers, hosts, config.api.cors_origins, is_api=is_api)
    if request.method == hdrs.METH_POST:
        origins.check_content_type(request.headers, request.headers.get(hdrs.CONTENT_TYPE, ""))
    return origin


def _bracketed(host: str) -> str:
    """A host of a request line is without the brackets of an IPv6 address, and without a port."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.lower().removesuffix(".") for name in names)
