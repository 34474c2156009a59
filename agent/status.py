"""The node and the rack as an operator and peers see them."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from agent.boundary import Boundary
from agent.config import Node
from agent.control.follower import Follower
from agent.gateway.dispatch import Dispatch
from agent.mesh.heartbeats import Heartbeats
from agent.mesh.peers import Heartbeat, PeerTable
from agent.mesh.sightings import sentence
from agent.mesh.signing import RackKeys
from agent.models.pool import Pool
from agent.process import expectation
from agent.process.gpu import Budget
from agent.telemetry.sensors.throttle import LEVELS
from agent.telemetry.service import Telemetry
from agent.views import ModelView
from shared import __version__, chips


class Status:
    """A read-only view of the daemon's objects."""

    def __init__(
        self,
        node: Node,
        budget: Budget,
        telemetry: Telemetry,
        pool: Pool,
        dispatch: Dispatch,
        follower: Follower,
        table: PeerTable,
        heartbeats: Heartbeats,
        warnings: Callable[[], list[str]] = list,
        awake: Callable[[], dict[str, Any]] = dict,
        *,
        boundary: Boundary,
        keys: RackKeys,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._budget, self._telemetry, self._pool = node, budget, telemetry, pool
        self._dispatch, self._follower, self._table, self._heartbeats = dispatch, follower, table, heartbeats
        self._warnings, self._keys, self._awake, self._boundary = warnings, keys, awake, boundary
        self.started_s = int(time.time())
        self._clock, self._began_s = clock, clock()

    def uptime_s(self) -> int:
        """Whole seconds since the start, whatever happened to the time of day."""
        return int(self._clock() - self._began_s)

    def node(self) -> dict[str, Any]:
        """This node, for its operator."""
        spool, sample = self._telemetry.spool, self._telemetry.sampler.last_sample
        return {
            "node": self._node.id,
            "rack": self._node.rack,
            "version": __version__,
            "epoch": spool.epoch,
            "windows_closed": spool.next_seq() - 1,
            "uptime_s": self.uptime_s(),
            "draining": self._dispatch.draining,
            "in_flight": self._dispatch.in_flight,
            "budget_bytes": self._budget.bytes,
            "budget_from": self._budget.source,
            "models": (models := self._models()),
            "memory": self._pool.pressure,
            "hardware": spool.identity.hardware[:8],
            "warnings": [
                *self._clashes(),
                *self._warnings(),
                *self.policy_warnings(),
                *self._slow(models),
                *self._untold(),
            ],
            "taints": self._boundary.taints.view(),
            "awake": self._awake(),
            "audit": self._boundary.audit.status(),
            "rack_secrets": len(self._keys.marks),
            "desired": {**msgspec.to_builtins(self._follower.observed()), "since_ms": self._follower.since_ms},
            "policy": self._boundary.policy.view(),
            "boundary": self._boundary.view(),
            **self._trouble(),
            "push": self._telemetry.outbox.status(),
            "meters": self._telemetry.meters.status(),
            "sources_failed": dict(sample.sources_failed) if sample else {},
        }

    def _models(self) -> list[dict[str, Any]]:
        origins, machine = self._follower.in_force.origins(), self._telemetry.machine
        memory_gb = machine.memory_bytes / chips.GIB
        chip = chips.identify(machine.model, machine.chip, machine.memory_bytes).chip
        known: list[dict[str, Any]] = self._pool.inventory.status()
        return [
            {
                **one,
                "origin": origins.get(str(one["model"]), {"by": "", "text": ""}),
                "expected": expectation.expected(chip, memory_gb, one["figures"].get("weights_bytes", 0)),
            }
            for one in known
        ]

    def _slow(self, models: list[dict[str, Any]]) -> list[str]:
        """Models that are slower here than the chip allows."""
        sample, level = self._telemetry.sampler.last_sample, self._telemetry.heat.level
        hot_ppm, swapped = (sample.throttled_5m_ppm, sample.swap_out_bytes) if sample else (None, None)
        seen = expectation.causes(LEVELS[min(level, len(LEVELS) - 1)], hot_ppm, swapped)
        chip = self._telemetry.machine.chip
        found = [expectation.warning(one["model"], one["figures"], one["expected"], chip, seen) for one in models]
        return [sentence for sentence in found if sentence]

    def rack(self) -> dict[str, Any]:
        """The rack as this node sees it: nodes with their load and speed, circuit breakers, retries, swaps."""
        here = self._dispatch.here()
        return {
            "node": here.node,
            "draining": here.draining,
            "models": [_offered(model) for model in here.models],
            **self._trouble(),
            "tasks": len(asyncio.all_tasks()),
            "last_requests": [trail.request_id for trail in self._dispatch.decisions.last(20)],
        }

    def met(self, node: str, mark: str) -> None:
        """A peer asked for a heartbeat, and proved that it is of this rack."""
        self._heartbeats.sightings.saw(node, mark, self._clock())

    def heartbeat(self) -> Heartbeat:
        """What this node reports of itself to its peers."""
        sightings = self._heartbeats.sightings
        here, tables = self._dispatch.here(), self._pool.prefixes()
        return Heartbeat(
            node=here.node,
            rack=self._node.rack,
            epoch=self._telemetry.spool.epoch,
            draining=here.draining,
            models=tuple(
                msgspec.structs.replace(model, prefixes=tables[model.name].digest()) if model.name in tables else model
                for model in here.models
            ),
            heat=here.heat,
            memory=here.memory,
            t_ms=time.time_ns() // 1_000_000,
            agent=sightings.mine,
            twice=tuple(sorted({found.node for found in sightings.twice(self._clock()) if not found.by})),
            secrets=self._keys.marks,
            policy=self._boundary.policy.now.digest,
            shares=self._boundary.allowances.beat(),
            taints=self._boundary.taints.beat(),
        )

    def policy(self) -> dict[str, Any]:
        """The policy in force with its rules, and what of it is doubtful, for display."""
        rules = msgspec.to_builtins(self._boundary.policy.now.rules)
        return {**self._boundary.policy.view(), "rules": rules, "warnings": self.policy_warnings()}

    def policy_warnings(self) -> list[str]:
        """What an operator has to know of the policy file, and of nodes that decide by another one."""
        now = self._clock()
        views = (self._dispatch.here(), *self._table.view(now))
        rows = {model.name: model.rows for view in views for model in view.models}
        return self._boundary.policy.warnings(rows, self._table.policies(now))

    def _clashes(self) -> list[str]:
        """Who else uses this node's id, or that of a peer."""
        sightings = self._heartbeats.sightings
        seen = [sentence(found, self._node.id) for found in sightings.twice(self._clock())]
        claimed = self._telemetry.pusher.claims.problem
        return [claimed, *seen] if claimed else seen

    def _untold(self) -> list[str]:
        return self._boundary.taints.warnings()

    def _trouble(self) -> dict[str, Any]:
        """What to check first when something fails."""
        now = time.monotonic()
        return {
            "peers": self._peers(now),
            "breakers": self._dispatch.health.view(now),
            "retries_left": self._dispatch.budget.left(),
            "retries_refused": self._dispatch.budget.refused,
            "swaps": self._pool.orders.swaps()[-5:],
        }

    def _peers(self, now: float) -> list[dict[str, Any]]:
        policies = self._table.policies(now)
        return [
            {
                "node": p.node,
                "url": p.url,
                "state": p.state,
                "problem": self._heartbeats.problems.get(p.node, ""),
                "draining": p.draining,
                "hop_ms": round(p.hop_s * 1000, 1),
                "heat": LEVELS[min(p.heat, len(LEVELS) - 1)],
                "memory": p.memory,
                "models": sorted(m.name for m in p.models if m.ready),
                "offers": [_offered(m) for m in p.models],
                "policy": policies.get(p.node, ""),
                "needs_old_secret": self._keys.needs_older(self._table.accepts(p.node)),
            }
            for p in self._table.view(now)
        ]


def _offered(model: ModelView) -> dict[str, Any]:
    """A model of a node, for display; of its prefix hashes only the number."""
    return {**msgspec.structs.asdict(model), "prefixes": len(model.prefixes) // 8}
