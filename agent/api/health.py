"""Health, readiness and liveness of this node, and its metrics."""

import asyncio
import contextlib

from aiohttp import web

from agent.api.context import CONTEXT, DESCRIBED, json_response, require_reader

_FRESH_S = 2.0
"""A scrape waits this long for engines that are in a long step, then returns what is known."""


async def health(request: web.Request) -> web.Response:
    """200 while the process responds."""
    return json_response({"status": "ok", "node": request.app[CONTEXT].config.node.id})


async def described(request: web.Request) -> web.Response:
    """The API as an OpenAPI document."""
    return web.Response(body=request.app[DESCRIBED], content_type="application/json")


async def ready(request: web.Request) -> web.Response:
    """200 when a model of this node accepts requests and the node is not draining; 503 with the reason otherwise."""
    context = request.app[CONTEXT]
    if context.dispatch.draining:
        return json_response({"ready": False, "reason": "stopping"}, status=503)
    loaded = sorted(m.name for m in context.pool.views() if m.ready)
    if not loaded:
        return json_response({"ready": False, "reason": "no model is loaded"}, status=503)
    models = [name for name in loaded if not context.dispatch.saturated(name)]
    if not models:
        return json_response({"ready": False, "reason": "saturated"}, status=503, headers={"Retry-After": "1"})
    return json_response({"ready": True, "models": models})


async def live(request: web.Request) -> web.Response:
    """200 while every loader that has work makes progress; 503 with the stalled ones otherwise."""
    context = request.app[CONTEXT]
    stalled = context.pool.inventory.stalled(context.config.limits.progress_s)
    return json_response({"live": not stalled, "stalled": stalled}, status=503 if stalled else 200)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text, with the engines' current counts."""
    require_reader(request)
    context = request.app[CONTEXT]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FRESH_S):
            await context.pool.inventory.refresh()
    return web.Response(body=context.metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
