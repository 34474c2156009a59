"""GET /: what this server is, for a person with a browser or for a program."""

import functools
import socket
import time

from aiohttp import hdrs, web

from agent.api import front_page, origins
from agent.api.context import CONTEXT, Unauthorized, json_response
from agent.api.front_page import Front
from agent.api.models import client_key
from agent.api.proxies import client_scheme
from agent.config import is_open, scheme
from agent.policy.deciding import not_usable
from shared.errors import Refused


async def front(request: web.Request) -> web.Response:
    """The page, or JSON where the client prefers that. Where keys are configured, only a client with one learns names
    of nodes, and of models that its key may use."""
    context = request.app[CONTEXT]
    try:
        key = client_key(request)
        nodes = (context.dispatch.here(), *context.peers.view(time.monotonic()))
        served = tuple(one for one in front_page.served(nodes) if not_usable(one.name, key) is None)
        known = Front(_base_url(request), not is_open(context.config), context.config.node.id, served)
    except (Unauthorized, Refused):
        known = Front(_base_url(request), True, None, None)
    if front_page.wants_json(request.headers.getall(hdrs.ACCEPT, [])):
        return json_response(front_page.as_json(known), headers=front_page.HEADERS)
    return web.Response(text=front_page.as_page(known), content_type="text/html", headers=front_page.HEADERS)


def _base_url(request: web.Request) -> str:
    """As the client reached this server, where the Host that it sent is one of ours; else by our address."""
    config, peer = request.app[CONTEXT].config, request.remote or ""
    how = client_scheme(peer, request.headers, config.listen.trusted_proxies, scheme(config))
    address = request.transport.get_extra_info("sockname") if request.transport is not None else None
    host, port = (str(address[0]), int(address[1])) if address else (config.listen.host, config.listen.port)
    names = {*(name.lower().removesuffix(".") for name in config.listen.names), *_own_names()}
    return f"{how}://{origins.reached_host(request.headers.getall(hdrs.HOST, []), names, host, port)}/v1"


@functools.cache
def _own_names() -> frozenset[str]:
    """This machine's names, as it calls itself and as Bonjour does."""
    name = socket.gethostname().lower()
    first = name.partition(".")[0]
    return frozenset({name, first, f"{first}.local"} if first else ())
