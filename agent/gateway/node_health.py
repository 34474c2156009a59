"""What this gateway measured of each node's answers: circuit breakers and gaps, by node and model. Pure: the time is an
argument."""

from collections.abc import Mapping
from typing import Any

from agent.gateway.circuit_breaker import CircuitBreaker, State
from agent.gateway.timeouts import TokenGaps


class NodeHealth:
    """The health of all nodes as one gateway sees it. A breaker exists from a node's first failure on."""

    def __init__(self) -> None:
        self._breakers: dict[str, dict[str, CircuitBreaker]] = {}
        self._gaps: dict[tuple[str, str], TokenGaps] = {}

    def states(self, model: str, now_s: float) -> Mapping[str, State]:
        """Nodes whose circuit breaker for a model is not closed."""
        if not (breakers := self._breakers.get(model)):
            return {}
        states = {node: breaker.state(now_s) for node, breaker in breakers.items()}
        return {node: state for node, state in states.items() if state != "closed"}

    def begin(self, node: str, model: str, now_s: float) -> bool:
        """A request is sent; True if it is the one that a half-open breaker lets through."""
        breaker = self._breakers.get(model, {}).get(node)
        return breaker.begin(now_s) if breaker is not None else False

    def ok(self, node: str, model: str, now_s: float, *, probe: bool) -> None:
        """The node completed a request."""
        if (breaker := self._breakers.get(model, {}).get(node)) is not None:
            breaker.ok(now_s, probe=probe)

    def failed(self, node: str, model: str, now_s: float, reason: str, *, probe: bool) -> None:
        """The node failed a request."""
        self._breakers.setdefault(model, {}).setdefault(node, CircuitBreaker()).failed(now_s, reason, probe=probe)

    def given_up(self, node: str, model: str, *, probe: bool) -> None:
        """A request ended without evidence about the node."""
        if (breaker := self._breakers.get(model, {}).get(node)) is not None:
            breaker.given_up(probe=probe)

    def fresh(self, node: str, now_s: float) -> None:
        """A node came back or restarted."""
        for breakers in self._breakers.values():
            if node in breakers:
                breakers[node].fresh(now_s)

    def gaps(self, node: str, model: str) -> TokenGaps:
        """TokenGaps between the pieces of its answers."""
        return self._gaps.setdefault((node, model), TokenGaps())

    def view(self, now_s: float) -> list[dict[str, Any]]:
        """Every breaker that is not closed, for display."""
        return [
            {
                "node": node,
                "model": model,
                "state": state,
                "for_s": round(breaker.left_s(now_s), 1),
                "reason": breaker.reason,
            }
            for model, breakers in sorted(self._breakers.items())
            for node, breaker in sorted(breakers.items())
            if (state := breaker.state(now_s)) != "closed"
        ]
