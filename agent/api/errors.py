"""Errors as HTTP responses: a status, the OpenAI error envelope, and Retry-After where waiting helps."""

import math
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from agent.api.answers import error_body
from agent.api.context import LOG_FIELDS, REQUEST_ID, Unauthorized, json_response, new_request_id
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

STATUS = {
    "invalid_api_key": 401,
    "not_a_peer": 403,
    "protocol_mismatch": 403,
    "clock_skew": 403,
    "wrong_node": 403,
    "loop": 508,
    "model_not_found": 404,
    "not_found": 404,
    "conflict": 409,
    "body_timeout": 408,
    "body_too_large": 413,
    "queue_full": 429,
    "key_queue_full": 429,
    "draining": 503,
    "no_capacity": 503,
    "no_memory": 507,
    "disk_full": 507,
    "memory_pressure": 503,
    "worker_lost": 502,
    "loader_lost": 502,
    "not_ready": 503,
    "engine_failed": 500,
    "deadline_exceeded": 504,
    "bad_model": 422,
    "bad_probes": 422,
    "bad_hash": 422,
}
KIND = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

log = get_logger("agent.api")


def status_of(error: RackError) -> int:
    """The HTTP status of an error."""
    if error.code in STATUS:
        return STATUS[error.code]
    if isinstance(error, Refused):
        return 400
    return 503 if isinstance(error, Retryable) else 500


def response_of(error: RackError) -> web.Response:
    """The error response for a client; its message quotes nothing that the client sent except field names."""
    status = status_of(error)
    kind = KIND.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {}
    if isinstance(error, Retryable) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error.message, kind=kind, code=error.code, param=error.param)
    return json_response(body, status=status, headers=headers)


@web.middleware
async def middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Assign each request an id, turn errors into responses, write one log line."""
    request_id = new_request_id()
    request[REQUEST_ID] = request_id
    began = time.monotonic()
    status, code = 499, "client_gone"
    try:
        try:
            response = await handler(request)
            status, code = response.status, ""
        except RackError as error:
            response, code = response_of(error), error.code
        except web.HTTPRequestEntityTooLarge:
            message = f"the request body exceeds {request.client_max_size} bytes (limits.body_bytes)"
            response = response_of(Refused(message, code="body_too_large"))
            code = "body_too_large"
        except web.HTTPException as error:
            response = json_response(
                error_body(error.reason, kind="invalid_request_error", code=f"http_{error.status}"),
                status=error.status,
                headers={"Allow": error.headers["Allow"]} if "Allow" in error.headers else None,
            )
            code = f"http_{error.status}"
        except Exception:  # a bug: its type and location go to the log, nothing to the client
            log.error("handler_failed", request=request_id, exc_info=True)
            response = response_of(
                RackError("internal error; see the agent's log for this request id", code="internal")
            )
            code = "internal"
        status = response.status
        if not response.prepared:
            response.headers["X-Mlxrack-Request-Id"] = request_id
        return response
    finally:
        _log(request, request_id, status, code, time.monotonic() - began)


def _log(request: web.Request, request_id: str, status: int, code: str, seconds: float) -> None:
    route = request.match_info.route.resource
    path = route.canonical if route is not None else "unknown"
    quiet = path in ("/peer/v1/beat", "/health", "/live", "/ready", "/metrics") and status < 400
    write = log.debug if quiet else log.info
    fields = request.get(LOG_FIELDS, {})
    write("request", request=request_id, path=path, status=status, code=code, ms=round(seconds * 1000, 1), **fields)
