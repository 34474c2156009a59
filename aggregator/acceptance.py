"""Turn an accepted placement proposal into the desired state that agents follow. Pure."""

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from aggregator.moves import Step, simulate
from aggregator.packing import Copyable, Placement, Room
from aggregator.placement import Move, PlacementReport, Setting
from shared.desired import Assignment, DesiredState
from shared.errors import Refused

Sources = Callable[[str, str], str | None]
"""Finds a version of a model in the bucket ("" for any version): ``name@version``, or None if it has none."""


def accepted(report: PlacementReport, steps: Collection[int] | None) -> tuple[Move, ...]:
    """The moves to be made: all, or those with these step numbers. Raises Refused if they depend on steps that are
    left out."""
    chosen = tuple(m for m in report.moves if steps is None or m.step in steps)
    if unknown := sorted(set(steps or ()) - {m.step for m in report.moves}):
        raise Refused(f"apply: no step {unknown[0]} in the proposal for {report.period}; it has {len(report.moves)}")
    models, rooms, now = _world(report)
    made = [Step(action=m.action, model=m.model, node=m.node, source=m.source) for m in chosen]
    reached, broken = simulate(models, rooms, now, made)
    if broken:
        first = broken[0]
        raise Refused(f"apply: step {chosen[first.step - 1].step} depends on steps left out: {first.why}")
    for name, wished in sorted(report.least.items()):
        before, after = (sum(model == name for model, _ in at) for at in (now, reached))
        if after < min(before, wished):
            raise Refused(f"apply: {name} needs {wished} copies; these steps alone leave {after}")
    return chosen


def desired(
    report: PlacementReport, chosen: Sequence[Move], before: DesiredState | None, source_of: Sources, now_ms: int
) -> DesiredState:
    """The next desired state: the previous one after the moves. Raises Refused naming what the bucket lacks.

    Only nodes that a move touches change, and on them only what is moved: everything else keeps its version and
    settings, whatever is resident.
    """
    old = before.nodes if before is not None else {}
    nodes = standing(report, chosen, before, source_of)
    for move in chosen:
        others = tuple(a for a in nodes[move.node] if a.model != move.model)
        if move.action == "load":
            others = (*others, _moved(move, old, report, source_of))
        nodes[move.node] = tuple(sorted(others, key=lambda a: a.model))
    for setting in report.settings:
        if given := nodes.get(setting.node):
            nodes[setting.node] = tuple(_set(one, setting) if one.model == setting.model else one for one in given)
    return DesiredState(
        generation=(before.generation if before is not None else 0) + 1,
        written_ms=now_ms,
        note=f"placement of {report.period}: {len(chosen)} of {len(report.moves)} steps",
        nodes=nodes,
        peers=before.peers if before is not None else (),
    )


def standing(
    report: PlacementReport, chosen: Sequence[Move], before: DesiredState | None, source_of: Sources
) -> dict[str, tuple[Assignment, ...]]:
    """What the moves start from: the desired state, and for a touched node without one its current models. Raises
    Refused naming what the bucket lacks."""
    old = before.nodes if before is not None else {}
    new = sorted({move.node for move in chosen} - set(old))
    return {**old, **{node: _standing(report, node, source_of) for node in new}}


def _set(one: Assignment, setting: Setting) -> Assignment:
    return msgspec.structs.replace(one, **{setting.setting: setting.value})


def _standing(report: PlacementReport, node: str, source_of: Sources) -> tuple[Assignment, ...]:
    """A node's current models, as assignments."""
    mine = [p for p in report.placed if p.node == node and p.advice != "load"]
    return tuple(_from_bucket(p.model, p.version, source_of, pinned=p.pinned) for p in mine)


def _moved(
    move: Move, old: Mapping[str, tuple[Assignment, ...]], report: PlacementReport, source_of: Sources
) -> Assignment:
    """The assignment that a move creates: copied from its source node, else from any node, else as it is placed now."""
    first = [a for a in old.get(move.source, ()) if a.model == move.model]
    anywhere = [a for node in sorted(old) for a in old[node] if a.model == move.model]
    for known in (*first, *anywhere):
        return known
    standing = [p for p in report.placed if p.model == move.model and p.version]
    standing.sort(key=lambda p: (p.node != move.source, p.node))
    version = move.version or (standing[0].version if standing else "")
    pinned = any(p.pinned for p in standing if p.node == move.source)
    return _from_bucket(move.model, version, source_of, pinned=pinned)


def _from_bucket(model: str, version: str, source_of: Sources, *, pinned: bool) -> Assignment:
    if (source := source_of(model, version)) is None:
        what = f"version {version}" if version else "any version"
        hint = f"push it from a node that serves it: mlxrack-agent models push FOLDER {model}"
        raise Refused(f"apply: the bucket does not hold {what} of {model}; {hint}")
    name, _, found = source.partition("@")
    return Assignment(model=model, source=name, version=found, pinned=pinned)


def _world(report: PlacementReport) -> tuple[list[Copyable], list[Room], Placement]:
    sizes = {p.model: p.need_bytes for p in report.placed}
    sizes |= {m.model: round(m.gb * 1e9) for m in report.moves if m.gb and m.model not in sizes}
    models = [Copyable(name=name, need_bytes=size, copies=1, load=0.0) for name, size in sizes.items()]
    # a node without a known memory budget counts as unlimited
    rooms = [
        Room(name=n.node, budget_bytes=n.budget_bytes if n.budget_bytes is not None else 1 << 60) for n in report.nodes
    ]
    return models, rooms, frozenset((p.model, p.node) for p in report.placed if p.advice != "load")
