"""An agent that keeps the limits of a policy file, wired as the daemon does it: `python -m tests.rack.limited_agent run
--config FILE`, with policy.toml beside the configuration."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from agent import daemon, schedule
from agent.api import app as api
from agent.api.context import Context
from agent.api.usage import ALLOWANCES
from agent.cli import main
from agent.gateway.admission import Admitted
from agent.gateway.allowances import SAVE_S, Allowances
from agent.gateway.call import Call
from agent.policy.rules import Rules, of_key
from agent.wire.frames import Generate
from shared.errors import RackError

_BUILD = api.build
POLICY, WINDOW_S = "MLXRACK_TEST_POLICY", "MLXRACK_TEST_WINDOW_S"


class Limited(daemon.Daemon):
    """The daemon with the limits of a policy."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rules = msgspec.toml.decode(Path(os.environ[POLICY]).read_bytes(), type=Rules)
        self.allowances = Allowances(
            self.config.node.id,
            self._state,
            nodes=[self.config.node.id, *(peer.id for peer in self.config.peers.nodes)],
            rules=lambda: self.rules,
            key_ids=lambda: [key.id for key in self.config.keys],
            window_s=float(os.environ.get(WINDOW_S, "60")),
        )
        self.status._shares = self.allowances.beat
        self._heartbeats._on_shares = self.allowances.heard
        self._enter = self._dispatch.enter
        self._dispatch.enter = self.enter  # type: ignore[method-assign]
        api.build = self._built

    def enter(self, calls: Sequence[Call]) -> Admitted:
        first = calls[0]
        answer_tok = (first.ask.max_tokens or 4096) * len(calls) if isinstance(first.ask, Generate) else 0
        key = of_key(self.rules, first.key_id)
        held = self.allowances.reserve(key, 100, answer_tok, None, key_id=first.key_id)
        try:
            admitted = self._enter(calls)
        except RackError:
            held.release()
            raise

        def leave() -> None:
            admitted.__exit__()
            held.settle(first.prompt_tok, sum(call.completion_tok for call in calls))

        return Admitted(leave)

    def _built(self, context: Context) -> web.Application:
        app = _BUILD(context)
        app[ALLOWANCES] = self.allowances
        return app

    def _steady_jobs(self) -> tuple[schedule.Job, ...]:
        return (*super()._steady_jobs(), schedule.Job("limits", SAVE_S, self.allowances.save))


if __name__ == "__main__":
    daemon.Daemon = Limited  # type: ignore[misc]
    sys.exit(main(sys.argv[1:]))
