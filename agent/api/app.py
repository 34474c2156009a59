"""All HTTP routes, on one page."""

from aiohttp import web

from agent.api import admin, chat, completions, debug, embeddings, errors, guard, health, models, peer, wire
from agent.api.context import CONTEXT, LINKS, LOGGED, REFUSALS, Context
from shared.log_repeats import Repeats


def build(context: Context) -> web.Application:
    """Build the application over the daemon's objects."""
    app = web.Application(
        middlewares=[errors.middleware, guard.middleware], client_max_size=context.config.limits.body_bytes
    )
    app[CONTEXT] = context
    app[LINKS], app[LOGGED], app[REFUSALS] = set(), set(), Repeats(burst=errors.MOST_REFUSALS)
    app.on_response_prepare.append(errors.on_prepare)
    app.on_shutdown.append(peer.close_links)
    routes = [
        web.post("/v1/chat/completions", chat.chat_completions),
        web.post("/v1/completions", completions.completions),
        web.post("/v1/embeddings", embeddings.embeddings),
        web.get("/v1/models", models.list_models),
        web.get("/v1/models/{model:.+}", models.get_model),
        web.get("/health", health.health),
        web.get("/live", health.live),
        web.get("/ready", health.ready),
        web.get("/metrics", health.metrics),
        web.get("/debug/decision/{request}", debug.decision),
        web.get("/debug/rack", debug.rack),
        web.get("/peer/v1/beat", peer.heartbeat),
        web.get("/peer/v1/link", peer.link),
        web.get("/admin/v1/status", admin.status),
        web.post("/admin/v1/load", admin.load),
        web.post("/admin/v1/unload", admin.unload),
        web.post("/admin/v1/swap", admin.swap),
        web.post("/admin/v1/pin", admin.pin),
        web.post("/admin/v1/probes", admin.probes),
        web.post("/admin/v1/seal", admin.seal),
    ]
    app.add_routes([web.route(r.method, r.path, r.handler, expect_handler=wire.expect) for r in routes])
    return app
