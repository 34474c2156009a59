"""``python -m tests.rack.taint_agent``: mlxrack-agent, whose responses say in X-Test-Sensitive why a request was
SENSITIVE, which clients are not told."""

import os
import sys
from typing import Any

from aiohttp import web

from agent import cli
from agent.api import app, peer
from agent.api.context import PASSAGE
from agent.gateway.taints import Taints

OLDER = "MLXRACK_TEST_OLDER"
build = app.build


def _built(context: Any) -> web.Application:
    made = build(context)

    async def say(request: web.Request, response: web.StreamResponse) -> None:
        passage = request.get(PASSAGE)
        response.headers["X-Test-Sensitive"] = ",".join(passage.facts.sensitive) if passage is not None else ""

    made.on_response_prepare.append(say)
    return made


def _is_older() -> None:
    """As a version that knows no marks."""

    async def unknown(request: web.Request) -> web.Response:
        raise web.HTTPNotFound

    vars(peer)["taints"] = unknown
    setattr(Taints, "beat", lambda self: None)  # noqa: B010


if __name__ == "__main__":
    if os.environ.get(OLDER):
        _is_older()
    app.build = _built
    sys.exit(cli.main())
