"""All HTTP routes, on one page."""

from concurrent.futures import ThreadPoolExecutor

import msgspec
from aiohttp import web

from agent.api import (
    admin,
    chat,
    completions,
    debug,
    embeddings,
    errors,
    front,
    health,
    models,
    openapi,
    peer,
    usage,
    wire,
)
from agent.api.bodies import Bodies
from agent.api.context import BODIES, CONTEXT, DESCRIBED, LINKS, LOGGED, OIDC, PARSING, REFUSALS, Context
from agent.api.oidc import Verifier
from agent.gateway.taint_peers import PATH
from shared import __version__
from shared.log_repeats import Repeats


def build(context: Context) -> web.Application:
    """Build the application over the daemon's objects."""
    # the body's limit is configured, and applied in agent/api/wire.py
    app = web.Application(middlewares=[errors.middleware])
    app[CONTEXT] = context
    app[LINKS], app[LOGGED], app[REFUSALS] = set(), set(), Repeats(burst=errors.MOST_REFUSALS)
    app[peer.TAINTS], app[usage.ALLOWANCES] = context.boundary.taints, context.boundary.allowances
    limits = context.config.limits
    bodies = app[BODIES] = Bodies(limits.bodies_bytes, limits.bodies_per_key_bytes)
    context.live.follow(lambda now: bodies.become(now.limits.bodies_bytes, now.limits.bodies_per_key_bytes))
    # one thread: of large bodies one is decoded at a time, and one that was begun for a client who left, too
    app[OIDC] = Verifier(context.live)
    app[PARSING] = ThreadPoolExecutor(1, "parse")
    app.on_response_prepare.append(errors.on_prepare)
    app.on_shutdown.append(peer.close_links)
    app.on_cleanup.append(_end_parsing)
    routes = [
        web.post("/v1/chat/completions", chat.chat_completions),
        web.post("/v1/completions", completions.completions),
        web.post("/v1/embeddings", embeddings.embeddings),
        web.get("/v1/models", models.list_models),
        web.get("/v1/models/{model:.+}", models.get_model),
        web.get("/v1/usage", usage.usage),
        web.get("/", front.front),
        web.get("/openapi.json", health.described),
        web.get("/health", health.health),
        web.get("/live", health.live),
        web.get("/ready", health.ready),
        web.get("/metrics", health.metrics),
        web.get("/debug/decision/{request}", debug.decision),
        web.get("/debug/rack", debug.rack),
        web.get("/peer/v1/beat", peer.heartbeat),
        web.get("/peer/v1/link", peer.link),
        web.post(PATH, peer.taints),
        web.get("/admin/v1/proof/{nonce}", admin.proof),
        web.get("/admin/v1/status", admin.status),
        web.get("/admin/v1/secrets", admin.secrets),
        web.get("/admin/v1/policy", admin.policy),
        web.get("/admin/v1/limits", usage.limits),
        web.post("/admin/v1/load", admin.load),
        web.post("/admin/v1/unload", admin.unload),
        web.post("/admin/v1/swap", admin.swap),
        web.post("/admin/v1/pin", admin.pin),
        web.get("/admin/v1/orders", admin.orders),
        web.post("/admin/v1/orders/clear", admin.clear_orders),
        web.post("/admin/v1/probes", admin.probes),
        web.post("/admin/v1/seal", admin.seal),
        web.post("/admin/v1/reload", admin.reload),
        web.get("/admin/v1/taint", admin.taint),
        web.post("/admin/v1/taint/clear", admin.clear_taint),
    ]
    app.add_routes([web.route(r.method, r.path, r.handler, expect_handler=wire.expect) for r in routes])
    described = [(info.method, info.resource.canonical) for info in app.router.routes() if info.resource is not None]
    app[DESCRIBED] = msgspec.json.encode(openapi.document(__version__, [one for one in described if one[0] != "HEAD"]))
    return app


async def _end_parsing(app: web.Application) -> None:
    await app[OIDC].close()
    app[PARSING].shutdown(wait=False, cancel_futures=True)
