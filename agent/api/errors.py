"""Errors as HTTP responses: a status, the OpenAI error envelope, and Retry-After where waiting helps."""

import math
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from agent.api.answers import error_body
from agent.api.context import (
    CONTEXT,
    KEY_ID,
    LOG_FIELDS,
    PASSAGE,
    PROVED,
    REFUSALS,
    REQUEST_ID,
    Unauthorized,
    json_response,
    new_request_id,
    sign,
)
from agent.api.guard import admit, share
from agent.api.oidc import waiting
from agent.api.paths import not_allowed, not_served
from agent.api.proxies import client_address, client_scheme
from agent.config import scheme
from agent.mesh.signing import NODE_HEADER, NotAPeer
from agent.wire.frames import CRASHED, SUSPECT
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

_CODES = {
    401: ("invalid_api_key", "key_expired"),
    403: (
        *("model_not_allowed", "class_not_allowed", "sensitive"),
        *("not_a_peer", "protocol_mismatch", "clock_skew", "wrong_node"),
        *("no_certificate", "wrong_certificate", "cross_site", "provider_not_allowed"),
    ),
    404: ("model_not_found", "not_found", "unknown_url"),
    408: ("body_timeout",),
    409: ("conflict", "not_reloaded"),
    413: ("body_too_large",),
    415: ("unsupported_encoding", "unsupported_media_type"),
    421: ("wrong_host",),
    422: ("bad_model", "bad_probes", "bad_hash"),
    429: ("queue_full", "key_queue_full", "key_bodies_full", "rate_limited", "budget_exhausted"),
    500: ("engine_failed", SUSPECT),
    502: ("worker_lost", "loader_lost", CRASHED, "provider_failed", "provider_setup"),
    503: (
        *("audit_unavailable", "analysis_failed", "provider_busy", "oidc_unavailable"),
        *("draining", "no_capacity", "memory_pressure", "not_ready", "bodies_full", "connections_full"),
    ),
    504: ("deadline_exceeded", "provider_timeout"),
    507: ("no_memory", "disk_full"),
    508: ("loop",),
}
STATUS = {code: status for status, codes in _CODES.items() for code in codes}
KIND = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ENCODINGS = ("gzip", "deflate")
"""Content encodings of bodies that aiohttp decodes without further libraries."""

_PROBES = ("/peer/v1/beat", "/health", "/live", "/ready", "/metrics", "/openapi.json")
"""Asked again and again, by peers, load balancers and Prometheus."""
MOST_REFUSALS = 30
"""Log lines a minute about unauthenticated requests that ended alike; the others are counted."""

log = get_logger("agent.api")


def status_of(error: RackError) -> int:
    """The HTTP status of an error."""
    if error.code in STATUS:
        return STATUS[error.code]
    return 400 if isinstance(error, Refused) else 503 if isinstance(error, Retryable) else 500


def undecodable() -> Refused:
    """The error for a body in another content encoding."""
    message = f"this Content-Encoding is not supported; send {' or '.join(ENCODINGS)}, or none"
    return Refused(message, code="unsupported_encoding")


def response_of(error: RackError) -> web.Response:
    """The error response for a client; its message quotes nothing that the client sent except field names."""
    status = status_of(error)
    kind = KIND.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {}
    if isinstance(error, Retryable) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if error.code in (SUSPECT, "budget_exhausted"):
        headers["x-should-retry"] = "false"  # OpenAI's clients repeat any other error like it
    if isinstance(error, NotAPeer) and error.node:
        headers[NODE_HEADER] = error.node
    if error.code == "unsupported_encoding":
        headers["Accept-Encoding"] = ", ".join(ENCODINGS)
    body = error_body(error.message, kind=kind, code=error.code, param=error.param)
    return json_response(body, status=status, headers=headers)


@web.middleware
async def middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Assign each request an id, turn errors into responses, write one log line."""
    request_id = request[REQUEST_ID] = new_request_id()
    began = time.monotonic()
    status, code = 499, "client_gone"
    try:
        try:
            if (keys := waiting(request)) is not None:
                await keys
            response = admit(request) or await handler(request)
            status, code = response.status, ""
        except RackError as error:
            response, code = response_of(error), error.code
        except web.HTTPRequestEntityTooLarge:
            most = request.app[CONTEXT].config.limits.body_bytes
            message = f"the request body exceeds {most} bytes (limits.body_bytes)"
            code = "body_too_large"
            response = response_of(Refused(message, code=code))
        except web.HTTPException as error:
            response, code = _no_route(request, error)
        except Exception:  # a bug: its type and location go to the log, nothing to the client
            log.error("handler_failed", request=request_id, exc_info=True)
            code, message = "internal", "internal error; see the agent's log for this request id"
            response = response_of(RackError(message, code=code))
        status = response.status
        return response
    finally:
        if (passage := request.get(PASSAGE)) is not None:
            request.app[CONTEXT].boundary.wall.close(passage, status)
        _log(request, request_id, status, code, time.monotonic() - began)


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Sign every response, streams and errors included, and say what is left of its key's limits per minute; let
    allowed web pages read it."""
    if (key_id := request.get(KEY_ID)) is not None:
        response.headers.update(request.app[CONTEXT].boundary.allowances.headers(key_id))
    share(request, response)
    sign(response, request.get(REQUEST_ID) or new_request_id())


def _no_route(request: web.Request, error: web.HTTPException) -> tuple[web.Response, str]:
    """The response to a path or method that is not served, and its code."""
    if isinstance(error, web.HTTPNotFound):
        served = [path for path in _paths(request.app) if path.startswith("/v1/") and "{" not in path]
        found = Refused(not_served(request.method, request.path, served), code="unknown_url")
        return response_of(found), found.code
    code, allowed = f"http_{error.status}", error.headers.get("Allow", "")
    message = not_allowed(request.method, request.path, allowed) if error.status == 405 else error.reason
    body = error_body(message, kind="invalid_request_error", code=code)
    return json_response(body, status=error.status, headers={"Allow": allowed} if allowed else None), code


def _behind_proxies(request: web.Request) -> dict[str, str]:
    """Who a request is of where a reverse proxy stands in front; nothing where none is configured."""
    config = request.app[CONTEXT].config
    if not (trusted := config.listen.trusted_proxies):
        return {}
    peer = request.remote or ""
    return {
        "client": client_address(peer, request.headers, trusted),
        "scheme": client_scheme(peer, request.headers, trusted, scheme(config)),
    }


def _paths(app: web.Application) -> list[str]:
    return [resource.canonical for resource in app.router.resources()]


def _log(request: web.Request, request_id: str, status: int, code: str, seconds: float) -> None:
    route = request.match_info.route.resource
    path = route.canonical if route is not None else "unknown"
    # a probe's 503 is an answer, too; what it says has its own line where it began
    quiet = path in _PROBES and (status < 400 or status == 503)
    write = log.debug if quiet else log.info
    fields = request.get(LOG_FIELDS, {})
    if PROVED not in request and not quiet:  # unauthenticated requests cannot wipe the log either
        repeated = request.app[REFUSALS].take((path, status, code), time.monotonic())
        if repeated is None:
            return
        fields = {"repeated": repeated} if repeated else {}
    fields = {**_behind_proxies(request), **fields}
    write("request", request=request_id, path=path, status=status, code=code, ms=round(seconds * 1000, 1), **fields)
