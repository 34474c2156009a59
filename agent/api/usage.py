"""GET /v1/usage: a key's own limits. GET /admin/v1/limits: all of them, for the operator."""

from aiohttp import web

from agent.api.context import client_key_id, json_response, require_admin
from agent.gateway.allowances import Allowances
from shared.errors import Refused

ALLOWANCES = web.AppKey("allowances", Allowances)
"""Put into the application by the daemon."""
_NO_KEYS = "this node has no API keys: the limits are those of all its clients together"
_NO_LIMITS = "the policy sets no limits for this API key; its usage is not counted here"


async def usage(request: web.Request) -> web.Response:
    """The limits of the key that asks, and what the whole rack has used of them; never those of another key."""
    key_id = client_key_id(request)
    found = _allowances(request).usage(key_id)
    note = _NO_KEYS if not key_id else _NO_LIMITS if not found["limits"] else ""
    return json_response(found | ({"note": note} if note else {}))


async def limits(request: web.Request) -> web.Response:
    """The limits of all keys and providers: used rack-wide, and this node's part of each."""
    require_admin(request)
    return json_response(_allowances(request).view())


def _allowances(request: web.Request) -> Allowances:
    if (found := request.app.get(ALLOWANCES)) is None:
        raise Refused("this agent holds no limits", code="unknown_url")
    return found
