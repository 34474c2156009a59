"""Order the moves from the current to the proposed placement into feasible single steps. Pure.

At no step does a node exceed its memory budget, and no model has fewer copies than at the start or at the end,
whichever is less, and never none of a served model. A copy may be parked temporarily on a node with free memory. Moves
that are impossible without an interruption are omitted and reported.
"""

from collections.abc import Mapping, Sequence

import msgspec

from aggregator.packing import Copyable, Placement, Room, held


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """``action`` is load or unload; ``source`` is the node whose copy this one replaces, "" for an additional copy.
    ``parked`` marks a temporary copy."""

    action: str
    model: str
    node: str
    source: str = ""
    parked: bool = False


class Ordered(msgspec.Struct, frozen=True, kw_only=True):
    """The steps, the placement they reach, and the copies omitted because no memory could be freed for them."""

    steps: tuple[Step, ...]
    reached: Placement
    blocked: tuple[tuple[str, str], ...]


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A problem with a step, found by simulation."""

    step: int
    why: str


def order(models: Sequence[Copyable], rooms: Sequence[Room], now: Placement, goal: Placement) -> Ordered:
    """Steps from ``now`` to ``goal``."""
    plan = _Plan(models, rooms, now, goal)
    while plan.advance():
        pass
    return Ordered(steps=tuple(plan.steps), reached=frozenset(plan.at), blocked=tuple(sorted(goal - plan.at)))


def simulate(
    models: Sequence[Copyable], rooms: Sequence[Room], now: Placement, steps: Sequence[Step]
) -> tuple[Placement, tuple[Broken, ...]]:
    """Simulate the steps: the placement they reach, and every problem on the way."""
    sizes = {m.name: m for m in models}
    budgets = {r.name: r for r in rooms}
    at, wrong = set(now), []
    for number, step in enumerate(steps, 1):
        pair = (step.model, step.node)
        if step.action == "load":
            if pair in at:
                wrong.append(Broken(step=number, why=f"{step.model} is already on {step.node}"))
            at.add(pair)
            if (room := budgets.get(step.node)) is None:
                wrong.append(Broken(step=number, why=f"unknown node {step.node}"))
            elif held(room, models, frozenset(at)) > room.budget_bytes:
                wrong.append(Broken(step=number, why=f"{step.node} lacks the memory for {step.model}"))
            if step.model not in sizes:
                wrong.append(Broken(step=number, why=f"unknown model {step.model}"))
        elif pair not in at:
            wrong.append(Broken(step=number, why=f"{step.model} is not on {step.node}"))
        else:
            at.remove(pair)
            if not any(model == step.model for model, _ in at):
                wrong.append(Broken(step=number, why=f"no node would serve {step.model}"))
    return frozenset(at), tuple(wrong)


class _Plan:
    def __init__(self, models: Sequence[Copyable], rooms: Sequence[Room], now: Placement, goal: Placement) -> None:
        self.sizes: Mapping[str, int] = {m.name: m.need_bytes for m in models}
        self.models, self.rooms = models, {r.name: r for r in rooms}
        self.at, self.goal = set(now), goal
        self.steps: list[Step] = []
        counts = [(sum(m == name for m, _ in now), sum(m == name for m, _ in goal)) for name in self.sizes]
        self.least = {
            name: max(min(before, after), 1 if before else 0)
            for name, (before, after) in zip(self.sizes, counts, strict=True)
        }
        self.free = {
            name: room.budget_bytes - sum(self.sizes.get(m, 0) for m, n in now if n == name)
            for name, room in self.rooms.items()
        }
        self.parked: set[str] = set()

    def advance(self) -> bool:
        """Add one step; False if none is left, or none is feasible."""
        return self._load() or self._unload() or self._park()

    def _load(self) -> bool:
        """Load the largest wanted copy that fits."""
        wanted = sorted(self.goal - self.at, key=lambda p: (-self.sizes[p[0]], p))
        for model, node in wanted:
            if self.free.get(node, 0) >= self.sizes[model]:
                leaving = sorted(n for m, n in self.at - self.goal if m == model)
                self._do("load", model, node, leaving[0] if leaving else "")
                return True
        return False

    def _unload(self) -> bool:
        """Unload an unwanted copy, preferably where it frees memory for a wanted one; its model keeps enough copies."""
        waiting = {n for _, n in self.goal - self.at}
        gone = sorted(self.at - self.goal, key=lambda p: (p[1] not in waiting, -self.sizes.get(p[0], 0), p))
        for model, node in gone:
            if sum(m == model for m, _ in self.at) > self.least.get(model, 0):
                self._do("unload", model, node)
                return True
        return False

    def _park(self) -> bool:
        """Park a copy that blocks a wanted one on a node with free memory."""
        waiting = sorted({n for _, n in self.goal - self.at})
        for node in waiting:
            for model, _ in sorted(p for p in self.at - self.goal if p[1] == node and p[0] not in self.parked):
                fitting = [
                    n
                    for n in sorted(self.free, key=lambda n: (-self.free[n], n))
                    if (model, n) not in self.at and self.free[n] >= self.sizes[model]
                ]
                if fitting:
                    self.parked.add(model)
                    self._do("load", model, fitting[0], node, parked=True)
                    return True
        return False

    def _do(self, action: str, model: str, node: str, source: str = "", parked: bool = False) -> None:
        sign = 1 if action == "load" else -1
        self.free[node] = self.free.get(node, 0) - sign * self.sizes.get(model, 0)
        (self.at.add if sign > 0 else self.at.discard)((model, node))
        self.steps.append(Step(action=action, model=model, node=node, source=source, parked=parked))
