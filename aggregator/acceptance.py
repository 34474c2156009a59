"""From a proposal that somebody accepts to the desired state that agents follow. Pure."""

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from aggregator.moves import Step, simulate
from aggregator.packing import Copyable, Placement, Room
from aggregator.placement import Move, Placed, PlacementReport
from shared.desired import Assignment, DesiredState
from shared.errors import Refused

Sources = Callable[[str, str], str | None]
"""Where the bucket has a version of a model ("" for whichever it has), as ``name@version``; None when it has not."""


def accepted(report: PlacementReport, steps: Collection[int] | None) -> tuple[Move, ...]:
    """The moves that are to be made: all, or those with these numbers. Raises Refused when they cannot be carried out
    without the others."""
    chosen = tuple(m for m in report.moves if steps is None or m.step in steps)
    unknown = sorted(set(steps or ()) - {m.step for m in report.moves})
    if unknown:
        raise Refused(f"apply: the proposal for {report.period} has no step {unknown[0]}; it has {len(report.moves)}")
    models, rooms, now = _world(report)
    made = [Step(action=m.action, model=m.model, node=m.node, source=m.source) for m in chosen]
    _, broken = simulate(models, rooms, now, made)
    if broken:
        first = broken[0]
        raise Refused(f"apply: step {chosen[first.step - 1].step} cannot be done without the others: {first.why}")
    return chosen


def desired(
    report: PlacementReport,
    chosen: Sequence[Move],
    before: DesiredState | None,
    source_of: Sources,
    now_ms: int,
) -> DesiredState:
    """The next desired state: where everything stands, after the moves. Raises Refused naming what the bucket lacks.

    What a node was assigned before keeps its settings, and a node that the proposal does not name is left as it was.
    """
    versions = _versions(report.placed, before)
    at = {(p.model, p.node) for p in report.placed if p.advice != "load"}
    for move in chosen:
        (at.add if move.action == "load" else at.discard)((move.model, move.node))
    old = before.nodes if before is not None else {}
    nodes = dict(old)
    for node in sorted({n.node for n in report.nodes}):
        mine = sorted(model for model, where in at if where == node)
        nodes[node] = tuple(_assignment(model, node, old, versions, source_of, report) for model in mine)
    return DesiredState(
        generation=(before.generation if before is not None else 0) + 1,
        written_ms=now_ms,
        note=f"placement of {report.period}: {len(chosen)} of {len(report.moves)} steps",
        nodes=nodes,
        peers=before.peers if before is not None else (),
    )


def _world(report: PlacementReport) -> tuple[list[Copyable], list[Room], Placement]:
    sizes = {p.model: p.need_bytes for p in report.placed}
    sizes |= {m.model: round(m.gb * 1e9) for m in report.moves if m.gb and m.model not in sizes}
    models = [Copyable(name=name, need_bytes=size, copies=1, load=0.0) for name, size in sizes.items()]
    # a node without a known budget holds what it holds
    rooms = [
        Room(name=n.node, budget_bytes=n.budget_bytes if n.budget_bytes is not None else 1 << 60) for n in report.nodes
    ]
    return models, rooms, frozenset((p.model, p.node) for p in report.placed if p.advice != "load")


def _versions(placed: Sequence[Placed], before: DesiredState | None) -> dict[str, str]:
    """The version of each model: what stands in memory, else what was desired."""
    found = {a.model: a.version for nodes in (before.nodes.values() if before else ()) for a in nodes}
    return found | {p.model: p.version for p in placed if p.version}


def _assignment(
    model: str,
    node: str,
    old: Mapping[str, tuple[Assignment, ...]],
    versions: Mapping[str, str],
    source_of: Sources,
    report: PlacementReport,
) -> Assignment:
    everywhere = [a for nodes in old.values() for a in nodes if a.model == model]
    here = [a for a in old.get(node, ()) if a.model == model]
    settings = {s.setting: s.value for s in report.settings if s.model == model and s.node == node}
    cache_bytes = settings.get("cache_bytes")
    known = next(iter([*here, *everywhere]), None)
    version = versions.get(model, known.version if known is not None else "")
    if known is not None and known.version == version:
        return known if cache_bytes is None else msgspec.structs.replace(known, cache_bytes=cache_bytes)
    source = source_of(model, version)
    if source is None:
        what = f"version {version}" if version else "any version"
        mend = f"on a node that serves it: mlxrack-agent models push FOLDER {model}"
        raise Refused(f"apply: the bucket has not {what} of {model}; {mend}")
    name, _, found = source.partition("@")
    return Assignment(model=model, source=name, version=found, cache_bytes=cache_bytes)
