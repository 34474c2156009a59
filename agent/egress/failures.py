"""What went wrong at a provider, in our own words: what it wrote itself may quote the request, and is never repeated.
Decides, and touches nothing.

Codes: ``provider_busy`` (it asks to wait, or it failed and is left alone for a while), ``provider_timeout``,
``provider_failed`` (it failed, broke off, or answered what its API does not have), ``provider_setup`` (the operator has
to act), ``provider_refused`` (it does not take this request), ``provider_not_allowed`` (the policy does not permit it).
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from agent.egress.answers import mapping
from agent.egress.openai_chat import error_kind
from agent.policy.addresses import Misplaced
from shared.connection_errors import Kind, causes, kind_of, why
from shared.errors import Halt, RackError, Refused, Retryable

MOST_RETRY_AFTER_S = 3600.0
MOST_PAUSE_S, UNTOLD_PAUSE_S = 3.0, 0.5
"""Before the other attempt: at most, and where the provider does not say."""
TOO_LONG = "context_length_exceeded"
_BUSY = frozenset({"overloaded_error", "rate_limit_error", "rate_limit_exceeded", "engine_overloaded"})
_ACCOUNT = frozenset({"insufficient_quota", "billing_error", "billing_not_active", "billing_hard_limit_reached"})
_KEY = frozenset({"authentication_error", "permission_error", "invalid_api_key", "account_deactivated"})
_REQUEST = frozenset(
    {"invalid_request_error", "request_too_large", "invalid_prompt", "content_policy_violation", "content_filter"}
    | {"unsupported_parameter", "unsupported_value", "string_above_max_length", TOO_LONG}
)
_TLS = frozenset({Kind.CERTIFICATE_NAME, Kind.CERTIFICATE_AUTHORITY, Kind.CERTIFICATE_EXPIRED, Kind.CERTIFICATE_EARLY})
_OTHERS = frozenset({"not_found_error", "model_not_found", "api_error", "server_error", "timeout_error"})
KINDS = _BUSY | _ACCOUNT | _KEY | _REQUEST | _OTHERS
"""Names of errors that are repeated; any other may be a text of the request."""


def of_status(name: str, status: int, kind: str, retry_after_s: float | None) -> RackError:
    """The error for an answer of a status other than 200; ``kind`` is the provider's own name of the error."""
    seen = _seen(name, f"HTTP {status}", kind)
    if kind in _ACCOUNT or status == 402:
        return Halt(f"{seen}: its account has no credit; the operator has to renew it", code="provider_setup")
    if status in (401, 403) or kind in _KEY:
        why = "it does not accept the rack's key; the operator has to check [[providers]] secret, and the account there"
        return Halt(f"{seen}: {why}", code="provider_setup")
    if status in (404, 405, 410):
        why = "it has no such model or path; the operator has to check [[allow]] use, and [[providers]] url (.../v1)"
        return Halt(f"{seen}: {why}", code="provider_setup")
    if 300 <= status < 400:
        why = "it redirects, which is never followed; the operator has to correct [[providers]] url"
        return Halt(f"{seen}: {why}", code="provider_setup")
    if status == 429 or status in (503, 529) or kind in _BUSY:
        return Retryable(f"{seen}: it is busy; try again later", code="provider_busy", retry_after_s=retry_after_s)
    if status in (408, 504):
        return Retryable(f"{seen}: it did not answer in time", code="provider_timeout", retry_after_s=retry_after_s)
    if 400 <= status < 500:
        return _of_request(seen, kind)
    return Retryable(f"{seen}: it failed; try again", code="provider_failed", retry_after_s=retry_after_s)


def of_stream(name: str, kind: str) -> RackError:
    """The error that a provider reports in the middle of an answer. An answer has begun: whatever it was, it failed."""
    code = "provider_busy" if kind in _BUSY else "provider_failed"
    return Retryable(f"{_seen(name, 'an error within its answer', kind)}; try again", code=code)


def of_garbage(name: str, what: str) -> RackError:
    """The error for an answer that is none; ``what`` is our own description of it."""
    return Retryable(f"provider {name} sent {what}; try again", code="provider_failed")


def of_content(name: str, content_type: str, encoding: str) -> RackError | None:
    """The error for a body that is not an event stream; None where it is one."""
    kind = content_type.partition(";")[0].strip().lower()
    if encoding.strip().lower() not in ("", "identity"):
        return of_garbage(name, "a compressed answer, which it was asked not to do")
    if kind == "text/event-stream":
        return None
    if "html" in kind:
        why = "a web page answers, of a proxy or another program; the operator has to check the network"
        return Halt(f"provider {name}: {why}, and [[providers]] url", code="provider_setup")
    return of_garbage(name, "something else than the event stream that it was asked for")


def of_connection(name: str, url: str, error: BaseException) -> RackError:
    """The error for a connection that failed before an answer began."""
    misplaced = next((one for one in causes(error) if isinstance(one, Misplaced)), None)
    if misplaced is not None:
        why_not = f"{misplaced}; the operator has to correct [[providers]] url"
        return Halt(f"provider {name}: {why_not}", code="provider_setup")
    seen, kind = f"provider {name}: {why(error, url, '[[providers]] url')}", kind_of(error)
    if kind in _TLS:
        return Halt(seen, code="provider_setup")
    return Retryable(seen, code="provider_timeout" if kind is Kind.SLOW else "provider_failed")


def pause_s(error: RackError) -> float | None:
    """How long to wait before the one other attempt at a request that has no answer yet; None for no other attempt."""
    if not isinstance(error, Retryable) or error.code == "provider_timeout":
        return None
    told_s = error.retry_after_s if error.retry_after_s is not None else UNTOLD_PAUSE_S
    return told_s if told_s <= MOST_PAUSE_S else None


def of_silence(name: str, what: str, limit_s: float) -> RackError:
    """The error for a provider that is too slow at ``what``."""
    return Retryable(f"provider {name}: no {what} within {limit_s:g} s; try again", code="provider_timeout")


def kind_in(body: bytes) -> str:
    """The provider's own name of the error in a body; "" without one that is known."""
    try:
        found = mapping(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    error = mapping(found.get("error"))
    return next((one for one in (error_kind(error), str(error.get("type", ""))) if one in KINDS), "")


def retry_after_s(headers: Mapping[str, Any], now: datetime) -> float | None:
    """When a provider says to come back: seconds, milliseconds (OpenAI's header) or a date; None if it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = str(headers.get(name, "")).strip()
        try:
            seconds = float(text) * unit
        except ValueError:
            seconds = _until(text, now)
        if math.isfinite(seconds) and seconds >= 0:
            return min(seconds, MOST_RETRY_AFTER_S)
    return None


def _until(text: str, now: datetime) -> float:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError, TypeError, OverflowError):
        return math.nan
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds())


def _of_request(seen: str, kind: str) -> RackError:
    if kind == TOO_LONG:
        return Refused(f"{seen}: the conversation is too long for its model", code=TOO_LONG, param="messages")
    return Refused(f"{seen}: it does not take this request; ask another model", code="provider_refused")


def _seen(name: str, what: str, kind: str) -> str:
    return f"provider {name} answered {what}" + (f" ({kind})" if kind in KINDS else "")
