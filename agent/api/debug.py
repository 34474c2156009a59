"""Why requests were routed as they were, and how this node sees its rack now."""

from aiohttp import web

from agent.api.context import CONTEXT, json_response, require_reader
from agent.gateway.decisions import KEPT, shown
from shared.errors import Refused


async def decision(request: web.Request) -> web.Response:
    """Routing decisions of a recent request, part by part: candidates and their costs, excluded nodes and reasons,
    retries, continuations."""
    require_reader(request)
    if not (found := request.app[CONTEXT].dispatch.decisions.find(request.match_info["request"])):
        why = f"no decision of this request is recorded here; each gateway keeps those of its last {KEPT} requests"
        raise Refused(why, code="not_found")
    return json_response({"parts": [shown(trail) for trail in found]})


async def rack(request: web.Request) -> web.Response:
    """Nodes, circuit breakers, retries and swaps in one response."""
    require_reader(request)
    return json_response(request.app[CONTEXT].status.rack())
