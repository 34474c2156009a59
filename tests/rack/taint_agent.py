"""``python -m tests.rack.taint_agent``: mlxrack-agent, whose responses say in X-Test-Sensitive why a request was
SENSITIVE, which clients are not told."""

import sys
from typing import Any

from aiohttp import web

from agent import cli
from agent.api import app
from agent.api.context import PASSAGE

build = app.build


def _built(context: Any) -> web.Application:
    made = build(context)

    async def say(request: web.Request, response: web.StreamResponse) -> None:
        passage = request.get(PASSAGE)
        response.headers["X-Test-Sensitive"] = ",".join(passage.facts.sensitive) if passage is not None else ""

    made.on_response_prepare.append(say)
    return made


if __name__ == "__main__":
    app.build = _built
    sys.exit(cli.main())
