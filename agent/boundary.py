"""What stands between clients and models: the policy, its guards, and the way out of the rack, built once and followed
through the agent's life. What each of them does is in its own module."""

import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agent.audit.entry import Named
from agent.audit.service import Audit
from agent.config import Live, key_ids
from agent.control.policy_file import POLL_S, Policy, PolicyFile
from agent.control.rates import Rates
from agent.egress.connections import Reach
from agent.egress.providers import Egress
from agent.gateway.allowances import SAVE_S, Allowances
from agent.gateway.analysis import Analysis, needed
from agent.gateway.describing import Aliases
from agent.gateway.overflow import Overflow
from agent.gateway.taints import Taints
from agent.gateway.wall import Guards, Wall
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import Heartbeat, PeerTable
from agent.mesh.signing import RackKeys
from agent.models.pool import Pool
from agent.policy.classes import AUTO, CLASS_PREFIX, CLASSES
from agent.policy.rules import Rules
from agent.views import NodeView, offers
from shared.records import Event
from shared.store import ObjectStore

RATES_S, AUDIT_S = 60.0, 1.0
"""How often it is asked whether prices are due, and whether the audit can be written."""


class Neighbours(NamedTuple):
    """Parts of the daemon that it needs."""

    table: PeerTable
    client: PeerClient
    keys: RackKeys
    pool: Pool
    emit: Callable[[Event], None]
    store: Callable[[], ObjectStore]


class Boundary:
    """``codes`` are those of all errors; ``reach`` is how tests find providers. Raises Halt for a policy file that
    cannot be used."""

    def __init__(
        self,
        live: Live,
        state: Path,
        environ: Mapping[str, str],
        near: Neighbours,
        codes: Container[str],
        *,
        reach: Reach | None = None,
    ) -> None:
        self._live, self._near, self._known = live, near, Aliases()
        self.policy = PolicyFile(live)
        self.policy.load()
        self.rates = Rates(live, near.store, state / "rates.json")
        self.audit = Audit(live, state, near.store, near.emit, self._names(codes))
        self.taints = Taints(state, live, near.table, near.client, near.keys, near.emit)
        self.analysis = Analysis(environ=environ)
        self.allowances = self._new_allowances(state)
        self._egress = Egress(self._rules, environ, reach=reach)
        self.wall = Wall(live.now.node.id, self._guards())
        self.overflow = Overflow(self.wall, self._egress, self.analysis, self.allowances)

    def _new_allowances(self, state: Path) -> Allowances:
        config = self._live.now
        return Allowances(
            config.node.id,
            state,
            nodes=self._nodes(),
            rules=self._rules,
            key_ids=self._key_ids,
            rate_of=self.rates.of,
            beat_s=config.peers.beat_s,
        )

    def _guards(self) -> Guards:
        return Guards(
            rules=self._rules,
            serves=self._serves,
            aliases=self._aliases,
            rate=self.rates.of,
            taints=self.taints,
            analysis=self.analysis,
            audit=self.audit.log,
            allowances=self.allowances,
        )

    def start(self) -> None:
        """Begin to load marks, and to prepare the analysis where the policy needs it."""
        self.taints.start()
        self.policy.follow(self._follow)

    async def close(self) -> None:
        """End what it has begun, and save what is counted."""
        await self._egress.close()
        await self.analysis.close()
        await self.taints.close()
        await self.allowances.save()
        await self.audit.close()

    def jobs(self) -> tuple[tuple[str, float, Callable[[], Awaitable[None]]], ...]:
        """What is done from time to time: names, seconds between two times, and how."""
        return (
            ("policy", POLL_S, self.policy.poll),
            ("limits", SAVE_S, self.allowances.save),
            ("rates", RATES_S, self.rates.tick),
            ("audit", AUDIT_S, self.audit.tick),
        )

    def members(self) -> None:
        """The nodes of the rack have changed, by agent.toml or by the desired state: limits are divided anew."""
        self.allowances.members(self._nodes())

    def heard(self, node: str, heartbeat: Heartbeat) -> None:
        """A peer's heartbeat."""
        self.taints.heard(node, heartbeat)
        self._aliases(())  # what it serves is known when it has gone

    def warnings(self) -> list[str]:
        """What an operator has to know, a sentence each; the policy's own are in the status."""
        analysis = "" if self.analysis.ready or not needed(self._rules()) else self.analysis.problem
        unable = f"nothing leaves the premises, because what would is not analysed: {analysis}" if analysis else ""
        return [*self.audit.warnings(), *(one for one in (self.allowances.problem, unable) if one)]

    def view(self) -> dict[str, Any]:
        """For display."""
        return {"providers": self._egress.status(), "rates": self.rates.period}

    def _follow(self, policy: Policy) -> None:
        self.analysis.start(policy.rules)
        self.taints.ignore(policy.rules.sensitive.common)

    def _rules(self) -> Rules:
        return self.policy.now.rules

    def _key_ids(self) -> Sequence[str]:
        return tuple(key_ids(self._live.now))

    def _names(self, codes: Container[str]) -> Mapping[Named, Callable[[str], bool]]:
        """Which names the audit may record: a client may ask for a model of any name."""
        left_open = {AUTO, *(f"{CLASS_PREFIX}{one.lower()}" for one in CLASSES)}
        config = self._live
        return {
            "model": lambda name: name in left_open or self._serves(name) or name in self._rules().uses,
            "key": lambda name: name in key_ids(config.now) or bool(config.now.oidc.issuer),
            "node": lambda name: name == config.now.node.id or any(name == n for n, _ in self._near.table.urls()),
            "provider": lambda name: name in self._rules().by_provider,
            "policy": lambda name: name == self._rules().version,
            "code": codes.__contains__,
        }

    def _serves(self, name: str) -> bool:
        peers = self._near.table.view(time.monotonic())
        return self._near.pool.has(name) or any(True for _ in offers(peers, name))

    def _aliases(self, names: Sequence[str]) -> tuple[str, ...]:
        here = NodeView(node=self._live.now.node.id, models=self._near.pool.views())
        return self._known.of(names, (here, *self._near.table.view(time.monotonic())))

    def _nodes(self) -> list[str]:
        """The rack's nodes, whether they are up or not."""
        return [self._live.now.node.id, *(node for node, _ in self._near.table.urls())]
