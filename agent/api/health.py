"""Whether the process lives, whether it can take work, and its metrics."""

from aiohttp import web

from agent.api.context import CONTEXT, json_response, require_local_or_admin


async def health(request: web.Request) -> web.Response:
    """200 while the process answers."""
    return json_response({"status": "ok", "node": request.app[CONTEXT].config.node.id})


async def ready(request: web.Request) -> web.Response:
    """200 when some model of this node is ready and it is not stopping; 503 with the reason otherwise."""
    context = request.app[CONTEXT]
    if context.dispatch.draining:
        return json_response({"ready": False, "reason": "stopping"}, status=503)
    models = sorted(m.name for m in context.pool.views() if m.ready)
    if not models:
        return json_response({"ready": False, "reason": "no model is loaded"}, status=503)
    return json_response({"ready": True, "models": models})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    require_local_or_admin(request)
    body = request.app[CONTEXT].metrics()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
