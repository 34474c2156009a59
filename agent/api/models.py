"""GET /v1/models and /v1/models/{model}: the models that the rack can serve, from any node."""

import time

from aiohttp import web

from agent.api import answers
from agent.api.context import CONTEXT, client_key_id, json_response
from agent.views import NodeView
from shared.errors import Refused, Retryable


def _nodes(request: web.Request) -> tuple[NodeView, ...]:
    context = request.app[CONTEXT]
    return context.dispatch.here(), *context.peers.view(time.monotonic())


def _served(request: web.Request) -> dict[str, int]:
    """Names that a live node has ready now; a peer that is down hides only its own."""
    ready = {m.name for node in _nodes(request) if node.state != "down" for m in node.models if m.ready}
    return dict.fromkeys(ready, request.app[CONTEXT].status.started_s)


def _is_known(request: web.Request, name: str) -> bool:
    """Whether a node has it, ready or not, or may have it because it has not answered a heartbeat yet."""
    return any(not node.heard or any(m.name == name for m in node.models) for node in _nodes(request))


async def list_models(request: web.Request) -> web.Response:
    """All models that can be served now."""
    client_key_id(request)
    return json_response(answers.models_list(_served(request)))


async def get_model(request: web.Request) -> web.Response:
    """One model."""
    client_key_id(request)
    served = _served(request)
    name = request.match_info["model"]
    if name not in served and _is_known(request, name):
        raise Retryable("no node can serve this model now", code="no_capacity", retry_after_s=5)
    if name not in served:
        known = ", ".join(sorted(served)) or "none"
        raise Refused(f"model not found; known: {known}", code="model_not_found", param="model")
    return json_response(answers.models_list({name: served[name]})["data"][0])
