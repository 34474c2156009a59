"""Why requests went where they went, and what this node believes of its rack now."""

from aiohttp import web

from agent.api.context import CONTEXT, json_response, require_local_or_admin
from agent.gateway.decisions import KEPT, shown
from shared.errors import Refused


async def decision(request: web.Request) -> web.Response:
    """What was decided for one of the last requests, part by part: candidates and their costs, who was excluded and
    why, retries, continuations."""
    require_local_or_admin(request)
    dispatch = request.app[CONTEXT].dispatch
    found = dispatch.decisions.find(request.match_info["request"])
    if not found:
        why = f"this node has kept nothing of such a request; it keeps the last {KEPT}, each at its door"
        raise Refused(why, code="not_found")
    return json_response({"parts": [shown(trail) for trail in found]})


async def rack(request: web.Request) -> web.Response:
    """Nodes, breakers, retries and swaps on one page."""
    require_local_or_admin(request)
    return json_response(request.app[CONTEXT].rack())
