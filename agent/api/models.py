"""GET /v1/models and /v1/models/{model}: the models that the rack can serve, from any node."""

import time

from aiohttp import web

from agent.api import answers
from agent.api.context import CONTEXT, client_key_id, json_response
from agent.policy.deciding import expired, not_usable
from agent.policy.rules import KeyPolicy, of_key
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


def client_key(request: web.Request) -> KeyPolicy:
    """What the policy says of the client's key. Raises Unauthorized, and Refused for one that has expired."""
    key = of_key(request.app[CONTEXT].boundary.wall.rules, client_key_id(request))
    if (over := expired(key, time.strftime("%Y-%m-%d", time.gmtime()))) is not None:
        raise Refused(over.message, code=over.code)
    return key


async def list_models(request: web.Request) -> web.Response:
    """The models that can be served now, and that the client's key may use."""
    key = client_key(request)
    served = {name: since for name, since in _served(request).items() if not_usable(name, key) is None}
    return json_response(answers.models_list(served))


async def get_model(request: web.Request) -> web.Response:
    """One model."""
    key, name = client_key(request), request.match_info["model"]
    if (refused := not_usable(name, key)) is not None:
        raise Refused(refused.message, code=refused.code, param=refused.param)
    served = {name: since for name, since in _served(request).items() if not_usable(name, key) is None}
    if name not in served and _is_known(request, name):
        raise Retryable("no node can serve this model now", code="no_capacity", retry_after_s=5)
    if name not in served:
        known = ", ".join(sorted(served)) or "none"
        raise Refused(f"model not found; known: {known}", code="model_not_found", param="model")
    return json_response(answers.models_list({name: served[name]})["data"][0])
