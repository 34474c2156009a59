"""One conclusion for each model: what does not fit, what was evicted without need, and the plan, reconciled. Pure.

A lack of memory is capacity only where nothing else helps. The order: the steps of the plan; a node whose memory allows
a larger budget; the node that evicted a model, where its budget allows all that was wanted at the same time (pin), or
its memory does (budget); other nodes that serve it already (leave). Memory that one conclusion takes is not there for
the next.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Literal

import msgspec

from aggregator import heat, packing
from aggregator.demand import Crowd, Facts, Known
from aggregator.eviction import Conclusion
from aggregator.moves import Ordered
from aggregator.packing import CAP, Copyable, Packed, Placement
from aggregator.phrases import listed

_CALLS_FOR = ("move", "capacity", "restore", "budget", "blocked")
"""Remedies of a whole model: of two, for two of its copies, the first one is said. The others are of one node."""


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """What does not fit, why, and the remedy. ``more_nodes`` is how many further nodes would do, where they would."""

    kind: Literal["memory", "away", "budget", "held_back", "load", "heat"]
    why: str
    remedy: str
    models: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    missing_bytes: int = 0
    more_nodes: int = 0

    @property
    def text(self) -> str:
        """In one sentence."""
        return f"{self.why}: {self.remedy}."


class Concluded(msgspec.Struct, frozen=True, kw_only=True):
    """Every model's conclusions, and what does not fit."""

    conclusions: tuple[Conclusion, ...]
    shortages: tuple[Shortage, ...]


def conclude(facts: Facts, packed: Packed, ordered: Ordered, known: Known) -> Concluded:
    """Reconcile a plan with what was evicted."""
    memory = _Memory(facts, ordered.reached)
    away = tuple(sorted(set(facts.silent) - known.retired))
    missing, held_back = _short(facts, packed)
    found = [_raised(model, count, memory, away) for model, count in missing]
    found += [_blocked(model, memory) for model in sorted({*(m for m, _ in ordered.blocked), *held_back})]
    found += [_moved(model, facts, ordered) for model in sorted({s.model for s in ordered.steps if not s.parked})]
    whole = {c.model: c for c in sorted(found, key=lambda c: -_CALLS_FOR.index(c.kind))}
    there = _Evicted(memory, whole).conclusions()
    told = {*whole, *(c.model for c in there)}
    stands = {m.name: memory.standing(m.name) for m in facts.models if m.name not in told}
    rest = [Conclusion(model=m, kind="fits" if nodes else "none", nodes=nodes) for m, nodes in stands.items()]
    made = [memory.settled(c) for c in (*whole.values(), *there, *rest)]
    return Concluded(
        conclusions=tuple(sorted(made, key=lambda c: (c.model, c.node))),
        shortages=(
            *_lacking([c for c in found if c.kind in ("capacity", "restore")], facts, known),
            *_budgets([c for c in made if c.kind == "budget"], facts),
            *others(facts, packed, held_back, known, away),
        ),
    )


def _short(facts: Facts, packed: Packed) -> tuple[list[tuple[Copyable, int]], list[str]]:
    """Copies for which no node has the memory, and models that limits hold back."""
    sizes = {m.name: m for m in facts.models}
    missing, held_back = [], []
    for name, count in packed.short:
        if _could_stand(sizes[name], facts, packed.pairs):
            held_back.append(name)
        else:
            missing.append((sizes[name], count))
    return missing, held_back


def _could_stand(model: Copyable, facts: Facts, pairs: Placement) -> bool:
    """Whether any node has the memory for another copy, regardless of other constraints."""
    return any(
        (model.name, room.name) not in pairs
        and room.budget_bytes - packing.held(room, facts.models, pairs) >= model.need_bytes
        for room in facts.rooms
    )


class _Memory:
    """Budgets of the nodes as they will be, and who stands there after the moves."""

    def __init__(self, facts: Facts, reached: Placement) -> None:
        self.facts, self.reached, self.needs = facts, reached, facts.needs
        self.rooms = {room.name: room for room in facts.rooms}
        self.budget = {room.name: room.budget_bytes for room in facts.rooms}
        self.added: dict[str, set[str]] = {name: set() for name in self.rooms}
        self.crowds: dict[str, list[Crowd]] = {}
        for crowd in facts.crowds:
            self.crowds.setdefault(crowd.node, []).append(crowd)

    def most(self, node: str, model: str) -> int:
        """The most that is or was wanted on a node at the same time, with this model and those added."""
        stand = {name for name, where in self.reached if where == node} | self.added[node] | {model}
        there = {name: self.needs.get(name, 0) for name in stand}
        added = {name: self.needs.get(name, 0) for name in (*self.added[node], model)}
        crowds = ({**crowd.wanted, **added} for crowd in self.crowds.get(node, ()))
        return max(sum(wanted.values()) for wanted in (there, *crowds))

    def standing(self, model: str) -> tuple[str, ...]:
        """Where a model stands after the moves."""
        return tuple(sorted(node for name, node in self.reached if name == model))

    def allowing(self, model: Copyable) -> str:
        """The node whose memory allows its budget to be raised for another copy, with the most left, which takes it;
        "" if there is none."""
        fitting = [
            (self.facts.ceiling(room) - self.most(room.name, model.name), room.name)
            for room in self.facts.rooms
            if (model.name, room.name) not in self.reached and (not model.only or room.name in model.only)
        ]
        left, name = max(fitting, default=(-1, ""))
        if left < 0:
            return ""
        self.added[name].add(model.name)
        self.budget[name] = max(self.budget[name], self.most(name, model.name))
        return name

    def settled(self, one: Conclusion) -> Conclusion:
        """With the budgets that all conclusions together need."""
        if one.kind != "budget":
            return one
        return msgspec.structs.replace(one, budgets=tuple(self.budget[node] for node in one.nodes))


def _raised(model: Copyable, count: int, memory: _Memory, away: tuple[str, ...]) -> Conclusion:
    """Budgets to be raised for copies that do not fit, or how much is missing."""
    nodes: list[str] = []
    while len(nodes) < count and (node := memory.allowing(model)):
        nodes.append(node)
        memory.reached |= {(model.name, node)}
    if len(nodes) == count:
        return Conclusion(model=model.name, kind="budget", nodes=tuple(nodes), need_bytes=model.need_bytes)
    missing = model.need_bytes * (count - len(nodes))
    return Conclusion(model=model.name, kind="restore" if away else "capacity", nodes=away, need_bytes=missing)


def _blocked(model: str, memory: _Memory) -> Conclusion:
    need = memory.needs[model]
    free = {
        name: room.budget_bytes - packing.held(room, memory.facts.models, memory.reached)
        for name, room in memory.rooms.items()
    }
    nodes = [n for n in sorted(free) if free[n] >= need and (model, n) not in memory.reached]
    return Conclusion(model=model, kind="blocked", nodes=tuple(nodes), need_bytes=need)


def _moved(model: str, facts: Facts, ordered: Ordered) -> Conclusion:
    """``nodes`` are those on which it is new; none where it only leaves one."""
    new = sorted(node for name, node in ordered.reached - facts.now if name == model)
    return Conclusion(model=model, kind="move", nodes=tuple(new), need_bytes=facts.needs.get(model, 0))


class _Evicted:
    """Conclusions about models on the nodes that evicted them without need. ``whole`` are those about a model as a
    whole, which hold on every node."""

    def __init__(self, memory: _Memory, whole: Mapping[str, Conclusion]) -> None:
        self.memory, self.whole = memory, whole
        self.found: dict[tuple[str, str], Conclusion] = {}

    def conclusions(self) -> list[Conclusion]:
        """Each (model, node) once."""
        for node, mine in sorted(self.memory.crowds.items()):
            if node in self.memory.rooms:
                self._judge(node, mine)
            else:
                self._note(node, {c.model for c in mine}, "fits")
        return list(self.found.values())

    def _judge(self, node: str, crowds: Sequence[Crowd]) -> None:
        """Who does not fit, with its budget as large as it can be, leaves; for the others it is raised, or they are
        pinned."""
        ceiling = self.memory.facts.ceiling(self.memory.rooms[node])
        unfit = [c for c in crowds if self._total(node, c) > ceiling]
        strangers = {name for c in unfit for name in (c.model, c.made_room_for) if name and not self._here(name, node)}
        self._note(node, strangers, "leave")
        evicted = sorted({c.model for c in crowds})
        most = {model: self._largest(node, crowds, model) for model in evicted}
        raised = [m for m in evicted if most[m] > self.memory.budget[node] and (m, node) not in self.found]
        for model in raised:
            if most[model] <= ceiling and model not in self.whole:
                self.memory.budget[node] = max(self.memory.budget[node], most[model])
                need = self._need(model)
                self._add(Conclusion(model=model, kind="budget", node=node, nodes=(node,), need_bytes=need))
        # where it fits only since others leave, that is enough
        crowded = {c.model for c in crowds if sum(c.wanted.values()) > self.memory.budget[node]}
        pins = [m for m in evicted if m not in crowded and m not in self.whole and (m, node) not in self.found]
        self._pin(node, crowds, pins)
        self._note(node, set(evicted), "fits")

    def _pin(self, node: str, crowds: Sequence[Crowd], models: Sequence[str]) -> None:
        """Pin as many as fit together with each crowd, those that need least first; the memory left is what each of
        them leaves."""
        pinned = {m.name for m in self.memory.facts.models if node in m.pinned}
        for model in sorted(models, key=lambda m: (self._need(m), m)):
            if self._with(node, crowds, pinned | {model}) <= self.memory.budget[node]:
                pinned.add(model)
        room = self.memory.budget[node] - self._with(node, crowds, pinned)
        for model in sorted(pinned.intersection(models)):
            need = self._need(model)
            self._add(Conclusion(model=model, kind="pin", node=node, nodes=(node,), need_bytes=need, room_bytes=room))

    def _with(self, node: str, crowds: Sequence[Crowd], pinned: Set[str]) -> int:
        """The most that is wanted at once while these models never leave."""
        here = {name: self._need(name) for name in (*pinned, *(m for m, n in self.memory.reached if n == node))}
        most = [{**{name: self._need(name) for name in pinned}, **self._wanted(node, c)} for c in crowds]
        return max(sum(wanted.values()) for wanted in (here, *most))

    def _wanted(self, node: str, crowd: Crowd) -> dict[str, int]:
        """What of a crowd is still wanted there: not what leaves, or gets its place elsewhere."""
        there = {
            name: need
            for name, need in crowd.wanted.items()
            if self._here(name, node) or (name not in self.whole and self._kind(name, node) != "leave")
        }
        return there | {name: self._need(name) for name in self.memory.added[node]}

    def _kind(self, model: str, node: str) -> str:
        found = self.found.get((model, node))
        return found.kind if found is not None else ""

    def _total(self, node: str, crowd: Crowd) -> int:
        return sum(self._wanted(node, crowd).values())

    def _largest(self, node: str, crowds: Sequence[Crowd], model: str) -> int:
        return max(self._total(node, c) for c in crowds if c.model == model)

    def _here(self, model: str, node: str) -> bool:
        return (model, node) in self.memory.reached

    def _need(self, model: str) -> int:
        return self.memory.needs.get(model, 0)

    def _note(self, node: str, models: Set[str], kind: Literal["leave", "fits"]) -> None:
        """For those without another conclusion; what stands nowhere is not left to other nodes."""
        for model in sorted(models - set(self.whole)):
            nodes = self.memory.standing(model)
            if (model, node) not in self.found:
                self._add(Conclusion(model=model, kind=kind if nodes else "none", node=node, nodes=nodes))

    def _add(self, one: Conclusion) -> None:
        if one.model not in self.whole:
            self.found[one.model, one.node] = one


def _lacking(found: Sequence[Conclusion], facts: Facts, known: Known) -> Iterator[Shortage]:
    """One shortage of memory for all models that have none."""
    if not found:
        return
    missing, away = sum(c.need_bytes for c in found), found[0].nodes
    sizes, models = facts.needs, tuple(c.model for c in found)
    copies = listed([f"{c.need_bytes // max(1, sizes[c.model])} x {c.model}" for c in found])
    why = f"Not enough memory for {copies} ({missing / 1e9:.1f} GB)"
    biggest, largest = max((r.budget_bytes for r in facts.rooms), default=0), max(sizes[m] for m in models)
    drop = max(models, key=lambda name: (sizes[name], name))
    fits = biggest >= largest > 0
    more = max(1, math.ceil(missing / biggest)) if fits else 1
    node = f"{_nodes(more)} of {biggest / 1e9:.1f} GB" if fits else f"a node with at least {largest / 1e9:.1f} GB"
    if away:
        why = f"{why} while {listed(away)} {'is' if len(away) == 1 else 'are'} away"
        remedy = f"bring {_them(away)} back first"
        yield Shortage(kind="away", why=why, remedy=remedy, models=models, nodes=away, missing_bytes=missing)
        return
    remedy = f"add {node} for models, or drop {drop}"
    if known.dearer:
        remedy = f"serve {drop} from an API host, which costs less than this rack, or add {node} for models"
    yield Shortage(kind="memory", why=why, remedy=remedy, models=models, missing_bytes=missing, more_nodes=more)


def _budgets(found: Sequence[Conclusion], facts: Facts) -> Iterator[Shortage]:
    """Budgets that are to be raised, node by node."""
    budgets = {room.name: room.budget_bytes for room in facts.rooms}
    wanted = {node: value for c in found for node, value in zip(c.nodes, c.budgets, strict=True)}
    for node, value in sorted(wanted.items()):
        models = tuple(sorted({c.model for c in found if node in c.nodes}))
        yield Shortage(
            kind="budget",
            why=(
                f"The memory budget of {node} is too small for {listed(models)}, and its memory allows "
                f"{facts.ceilings[node] / 1e9:.1f} GB for models"
            ),
            remedy=f"raise memory.budget_bytes of {node} from {budgets[node] / 1e9:.1f} to {value / 1e9:.1f} GB",
            models=models,
            nodes=(node,),
            missing_bytes=value - budgets[node],
        )


def explained(facts: Facts, packed: Packed) -> tuple[str, ...]:
    """Why not everything fits, and the remedy, before there is any telemetry; empty if it does."""
    missing, held_back = _short(facts, packed)
    lacking = [Conclusion(model=m.name, kind="capacity", need_bytes=m.need_bytes * count) for m, count in missing]
    found = (*_lacking(lacking, facts, Known()), *others(facts, packed, held_back, Known(), ()))
    return tuple(one.text for one in found)


def others(
    facts: Facts, packed: Packed, held_back: Sequence[str], known: Known, away: tuple[str, ...]
) -> Iterator[Shortage]:
    """Shortages of another kind than memory."""
    if held_back:
        counts = dict(packed.short)
        copies = listed([f"{counts[name]} x {name}" for name in held_back])
        why = f"{copies} not placed yet, though there is memory"
        remedy = "raise placement.max_moves, allow more nodes in placement.models, or cool those that heat slows"
        yield Shortage(kind="held_back", why=why, remedy=remedy, models=tuple(held_back))
    busy = [(name, share) for name, share in packed.over if name not in facts.throttled]
    if busy:
        where = listed([f"{name} by {share:.0%}" for name, share in busy])
        why = f"Load at the 95th percentile exceeds the limit ({where})"
        more = max(1, math.ceil(sum(share for _, share in busy) / CAP - 1e-9))
        remedy = f"add {_nodes(more)} like the fastest, or move the busiest model elsewhere"
        if away:
            remedy, more = f"bring {listed(away)} back first", 0
        elif known.dearer:
            remedy = f"serve part of it from an API host, which costs less than this rack, or add {_nodes(more)}"
        nodes = tuple(name for name, _ in busy)
        yield Shortage(kind="load", why=why, remedy=remedy, nodes=nodes, more_nodes=more)
    hot = [name for name, _ in packed.over if name in facts.throttled]
    if hot:
        why = f"{throttled(facts, hot[0])}, and its load fits on no other node"
        if len(hot) > 1:
            which = listed([f"{name} ({facts.throttled[name]:.1%} of the time)" for name in hot])
            why = f"Heat throttled {which}, and their load fits on no other node"
        remedy = f"improve {'its' if len(hot) == 1 else 'their'} cooling"
        yield Shortage(kind="heat", why=why, remedy=remedy, nodes=tuple(hot))


def throttled(facts: Facts, node: str) -> str:
    """For how long heat slowed a node, in words."""
    return f"{node} was throttled {heat.percent_beside(facts.throttled[node], heat.MOVE_SHARE)} of the time"


def _nodes(count: int) -> str:
    return "one more node" if count == 1 else f"{count} more nodes"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
