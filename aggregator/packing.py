"""Assign copies of models to nodes: memory is a hard limit, load a soft one, moves have a cost. Pure.

The number of copies of a model is decided beforehand (its demand over the capacity of a node), and each copy carries an
equal share of the load; where the copies go is a mixed-integer program:

    minimise   SHORT x unplaced copies + OVER x load above a node's limit + gigabytes to be moved
    such that  the copies on a node fit its memory, and no node has two copies of one model.

A greedy placement is always computed; HiGHS starts from it and bounds its distance from the optimum. Nothing depends on
the clock or the input order: limits are counted in nodes of the search tree, one thread, one seed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import highspy
import msgspec
import numpy as np

SHORT, OVER, GB, DISTURB = 10_000.0, 100.0, 0.05, 0.5
"""An unplaced copy outweighs everything; one per cent of load above the limit is worth moving 20 GB. Of two equally
effective moves, the one that disturbs less load is taken."""
CAP = 0.80
GAP, LOOSE_GAP = 0.01, 0.30
SEARCH_NODES = 300
NEAREST = 12
WHOLE = 40
"""Candidate nodes per model in a rack of over WHOLE nodes: its current ones, and others that differ by model."""


class Copyable(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be placed: bytes of one copy, number of copies, and their total load in nodes of speed 1 (2.5 keeps
    two and a half such nodes busy). ``only`` are the allowed nodes; none means any. ``pinned`` are nodes from which it
    must not move."""

    name: str
    need_bytes: int
    copies: int
    load: float
    only: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Load of one copy."""
        return self.load / self.copies if self.copies else 0.0


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """A node: memory budget, speed relative to the others, and load limit."""

    name: str
    budget_bytes: int
    speed: float = 1.0
    limit: float = CAP


Placement = frozenset[tuple[str, str]]
"""(model, node) pairs."""


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """A placement with its score. ``gap`` bounds its distance from the optimum (in racks of over WHOLE nodes: from the
    best of the candidates), None if nothing was proven; ``greedy_score`` is the score of greedy alone."""

    pairs: Placement
    score: float
    greedy_score: float
    gap: float | None
    short: tuple[tuple[str, int], ...]
    over: tuple[tuple[str, float], ...]


def pack(models: Sequence[Copyable], rooms: Sequence[Room], now: Placement, most_moves: int | None = None) -> Packed:
    """Place all copies. ``now`` is the current placement, ``most_moves`` the maximum number of copies moved."""
    models, rooms = sorted(models, key=lambda m: m.name), sorted(rooms, key=lambda r: r.name)
    now = frozenset((m, n) for m, n in now if any(x.name == m for x in models) and any(r.name == n for r in rooms))
    # largest first packs best if everything fits, smallest first leaves out the fewest if not
    starts = [
        improved(models, rooms, greedy(models, rooms, now, most_moves, large), now, most_moves)
        for large in (True, False)
    ]
    first = min(starts, key=lambda pairs: score(models, rooms, pairs, now))
    first_score = score(models, rooms, first, now)
    pairs, gap = _solved(models, rooms, now, first, most_moves)
    best_score = score(models, rooms, pairs, now)
    if best_score > first_score - 1e-9:  # never worse than the start, never different without gain
        pairs, best_score = first, first_score
    return Packed(
        pairs=pairs,
        score=best_score,
        greedy_score=first_score,
        gap=gap,
        short=tuple((m.name, n) for m in models if (n := m.copies - _copies(pairs, m.name)) > 0),
        over=tuple((r.name, load - r.limit) for r in rooms if (load := load_of(r, models, pairs)) > r.limit + 1e-9),
    )


def score(models: Sequence[Copyable], rooms: Sequence[Room], pairs: Placement, now: Placement) -> float:
    """The objective value of a placement; lower is better."""
    by_name = {m.name: m for m in models}
    short = sum(max(0, m.copies - _copies(pairs, m.name)) for m in models)
    over = sum(max(0.0, load_of(room, models, pairs) - room.limit) for room in rooms)
    moved = sum(cost_of_move(by_name[model]) for model, node in sorted(pairs - now))
    return SHORT * short + OVER * over + moved


def cost_of_move(model: Copyable) -> float:
    """The cost of moving one copy."""
    return GB * model.need_bytes / 1e9 + DISTURB * model.share


def load_of(room: Room, models: Sequence[Copyable], pairs: Placement) -> float:
    """The load of a node under a placement."""
    return sum(m.share for m in models if (m.name, room.name) in pairs) / room.speed


def held(room: Room, models: Sequence[Copyable], pairs: Placement) -> int:
    """Memory of a node in use, in bytes."""
    return sum(m.need_bytes for m in models if (m.name, room.name) in pairs)


def greedy(
    models: Sequence[Copyable],
    rooms: Sequence[Room],
    now: Placement,
    most_moves: int | None = None,
    large_first: bool = True,
) -> Placement:
    """Largest (or smallest) models first; a copy stays on its node if it fits there, else it goes where the resulting
    load is lowest, then where most memory is free."""
    free = {r.name: r.budget_bytes for r in rooms}
    load = {r.name: 0.0 for r in rooms}
    by_name = {r.name: r for r in rooms}
    pairs: set[tuple[str, str]] = set()
    left = len(rooms) * len(models) if most_moves is None else most_moves

    def put(model: Copyable, node: str) -> None:
        pairs.add((model.name, node))
        free[node] -= model.need_bytes
        load[node] += model.share / by_name[node].speed

    sign = -1 if large_first else 1
    order = sorted(models, key=lambda m: (sign * m.need_bytes, -m.load, m.name))
    for model in order:
        here = [n for m, n in now if m == model.name and n in free and _may(model, n)]
        here.sort(key=lambda n: (n not in model.pinned, load[n], n))
        for node in here[: model.copies]:
            if free[node] >= model.need_bytes:
                put(model, node)
    for model in order:
        while _copies(pairs, model.name) < model.copies and left > 0:
            fitting = [
                (max(0.0, load[n] + model.share / r.speed - r.limit), load[n] + model.share / r.speed, -free[n], n)
                for n, r in by_name.items()
                if (model.name, n) not in pairs and free[n] >= model.need_bytes and _may(model, n)
            ]
            if not fitting:
                break
            put(model, min(fitting)[3])
            left -= 1
    return frozenset(pairs)


def improved(
    models: Sequence[Copyable],
    rooms: Sequence[Room],
    pairs: Placement,
    now: Placement,
    most_moves: int | None = None,
    rounds: int = 100,
) -> Placement:
    """Local search from the greedy placement, best step first: move a copy off an overloaded node, or exchange two
    copies."""
    search = _Search(models, rooms, pairs, now, most_moves)
    for _ in range(rounds):
        if not (search.step(search.moves()) or search.step(search.exchanges())):
            break
    return frozenset(search.at)


Change = tuple[tuple[str, str, str], ...]
"""(model, from, to) of each copy that moves."""


class _Search:
    def __init__(
        self,
        models: Sequence[Copyable],
        rooms: Sequence[Room],
        pairs: Placement,
        now: Placement,
        most_moves: int | None,
    ) -> None:
        self.models = {m.name: m for m in models}
        self.rooms = {r.name: r for r in rooms}
        self.now, self.most_moves = now, most_moves
        self.at = set(pairs)
        self.free = {r.name: r.budget_bytes - held(r, models, pairs) for r in rooms}
        self.load = {r.name: load_of(r, models, pairs) for r in rooms}

    def step(self, changes: Iterable[Change]) -> bool:
        """Apply the change with the largest gain; False if none gains."""
        best: tuple[float, Change] | None = None
        for change in changes:
            gain = self._gain(change)
            if gain < -1e-9 and (best is None or (gain, change) < best):
                best = (gain, change)
        if best is None:
            return False
        for name, source, target in best[1]:
            self._carry(name, source, target)
        return True

    def moves(self) -> Iterator[Change]:
        """Every copy on an overloaded node to every node with enough memory."""
        for name, source in self._hot():
            need = self.models[name].need_bytes
            for target in self.rooms:
                if self._fits(name, target) and self.free[target] >= need:
                    yield ((name, source, target),)

    def exchanges(self) -> Iterator[Change]:
        """Every copy on an overloaded node exchanged with every copy elsewhere that has less load."""
        others = sorted(self.at)
        for name, source in self._hot():
            mine = self.models[name]
            for other, target in others:
                its = self.models[other]
                if self._stays(other, target):
                    continue
                if target == source or its.share >= mine.share or not self._fits(name, target):
                    continue
                more = mine.need_bytes - its.need_bytes
                if self._fits(other, source) and self.free[target] >= more and self.free[source] >= -more:
                    yield ((name, source, target), (other, target, source))

    def _hot(self) -> list[tuple[str, str]]:
        hot = {n for n, r in self.rooms.items() if self.load[n] > r.limit + 1e-9}
        return sorted(pair for pair in self.at if pair[1] in hot and not self._stays(*pair))

    def _stays(self, name: str, node: str) -> bool:
        return node in self.models[name].pinned

    def _fits(self, name: str, target: str) -> bool:
        return (name, target) not in self.at and _may(self.models[name], target)

    def _gain(self, change: Change) -> float:
        """Change of the score, negative for a gain; 0 if it would exceed the maximum number of moves."""
        loads: dict[str, float] = {}
        moved, cost = 0, 0.0
        for name, source, target in change:
            model = self.models[name]
            loads[source] = loads.get(source, 0.0) - model.share
            loads[target] = loads.get(target, 0.0) + model.share
            sign = ((name, target) not in self.now) - ((name, source) not in self.now)
            moved, cost = moved + sign, cost + sign * cost_of_move(model)
        if self.most_moves is not None and moved > 0 and len(self.at - self.now) + moved > self.most_moves:
            return 0.0
        return cost + OVER * sum(self._over(node, more) for node, more in loads.items())

    def _over(self, node: str, more: float) -> float:
        room = self.rooms[node]
        return max(0.0, self.load[node] + more / room.speed - room.limit) - max(0.0, self.load[node] - room.limit)

    def _carry(self, name: str, source: str, target: str) -> None:
        model = self.models[name]
        self.at.remove((name, source))
        self.at.add((name, target))
        for node, sign in ((source, -1), (target, 1)):
            self.free[node] -= sign * model.need_bytes
            self.load[node] += sign * model.share / self.rooms[node].speed


def _may(model: Copyable, node: str) -> bool:
    return not model.only or node in model.only or node in model.pinned


def _copies(pairs: Set[tuple[str, str]], name: str) -> int:
    return sum(1 for model, _ in pairs if model == name)


def _candidates(
    models: Sequence[Copyable], rooms: Sequence[Room], now: Placement, start: Placement
) -> list[tuple[int, int]]:
    """The (node, model) pairs that get a variable in the program."""
    by_room = sorted(range(len(rooms)), key=lambda i: (-rooms[i].budget_bytes * rooms[i].speed, rooms[i].name))
    found = []
    for j, model in enumerate(models):
        kept = {i for i, r in enumerate(rooms) if (model.name, r.name) in now or (model.name, r.name) in start}
        fitting = [i for i in by_room if rooms[i].budget_bytes >= model.need_bytes and _may(model, rooms[i].name)]
        # large racks: each model gets a different range of nodes, so that together they cover all
        offset = (j * 7) % max(1, len(fitting))
        near = (
            (fitting[offset:] + fitting[:offset])[: max(NEAREST, 2 * model.copies)] if len(rooms) > WHOLE else fitting
        )
        found += [(i, j) for i in sorted(kept.intersection(fitting) | set(near))]
    return found


def _solved(
    models: Sequence[Copyable], rooms: Sequence[Room], now: Placement, start: Placement, most_moves: int | None
) -> tuple[Placement, float | None]:
    """Solve with HiGHS from a start; returns the placement and its proven gap."""
    pairs = _candidates(models, rooms, now, start)
    if not pairs:
        return start, None
    short = any(m.copies > _copies(start, m.name) for m in models)
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    options: Mapping[str, bool | int | float] = {
        "output_flag": False,
        "threads": 1,
        "random_seed": 1,
        # in a rack that is too small there is no good placement to find, only a proof that takes minutes
        "mip_rel_gap": LOOSE_GAP if short else GAP,
        "mip_abs_gap": 0.01,
        "mip_max_nodes": 1 if short else SEARCH_NODES,
        "mip_max_stall_nodes": 100,
        "simplex_iteration_limit": 100_000,
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    count, n_models, n_rooms = len(pairs), len(models), len(rooms)
    total = count + n_models + n_rooms
    cost = np.zeros(total)
    lower, upper = np.zeros(total), np.ones(total)
    for v, (i, j) in enumerate(pairs):
        moved = (models[j].name, rooms[i].name) not in now
        # a tiny difference between equal choices, so that equal input gives an equal placement
        cost[v] = (cost_of_move(models[j]) if moved else 0.0) + 1e-6 * v / count
        lower[v] = float(rooms[i].name in models[j].pinned and (models[j].name, rooms[i].name) in start)
    for j, model in enumerate(models):
        cost[count + j], upper[count + j] = SHORT, model.copies
    for i in range(n_rooms):
        cost[count + n_models + i], upper[count + n_models + i] = OVER, highspy.kHighsInf
    rows = _rows(models, rooms, now, pairs, most_moves)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = total, len(rows)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, lower, upper
    lp.row_lower_ = np.array([low for low, _, _ in rows])
    lp.row_upper_ = np.array([high for _, high, _ in rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(row) for _, _, row in rows)])
    lp.a_matrix_.index_ = np.array([v for _, _, row in rows for v, _ in row], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([x for _, _, row in rows for _, x in row], dtype=float)
    kinds = [highspy.HighsVarType.kInteger] * (count + n_models) + [highspy.HighsVarType.kContinuous] * n_rooms
    lp.integrality_ = kinds
    solver.passModel(lp)
    solution = highspy.HighsSolution()
    solution.col_value = _started(models, rooms, pairs, start)
    solver.setSolution(solution)
    solver.run()
    values = solver.getSolution().col_value
    info = solver.getInfo()
    if not len(values) or info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return start, None
    found = frozenset((models[j].name, rooms[i].name) for v, (i, j) in enumerate(pairs) if values[v] > 0.5)
    return found, gap if math.isfinite(gap := float(info.mip_gap)) else None


Row = tuple[float, float, list[tuple[int, float]]]


def _rows(
    models: Sequence[Copyable],
    rooms: Sequence[Room],
    now: Placement,
    pairs: Sequence[tuple[int, int]],
    most_moves: int | None,
) -> list[Row]:
    count, inf = len(pairs), float(highspy.kHighsInf)
    of_model: list[list[int]] = [[] for _ in models]
    of_room: list[list[int]] = [[] for _ in rooms]
    for v, (i, j) in enumerate(pairs):
        of_model[j].append(v)
        of_room[i].append(v)
    rows: list[Row] = []
    for j, model in enumerate(models):
        rows.append((float(model.copies), float(model.copies), [*((v, 1.0) for v in of_model[j]), (count + j, 1.0)]))
    for i, room in enumerate(rooms):
        memory = [(v, models[pairs[v][1]].need_bytes / 1e9) for v in of_room[i]]
        rows.append((-inf, room.budget_bytes / 1e9, memory))
        load = [(v, models[pairs[v][1]].share / room.speed) for v in of_room[i]]
        rows.append((-inf, room.limit, [*load, (count + len(models) + i, -1.0)]))
    if most_moves is not None:
        moved = [(v, 1.0) for v, (i, j) in enumerate(pairs) if (models[j].name, rooms[i].name) not in now]
        rows.append((-inf, float(most_moves), moved))
    return rows


def _started(
    models: Sequence[Copyable], rooms: Sequence[Room], pairs: Sequence[tuple[int, int]], start: Placement
) -> list[float]:
    taken = [1.0 if (models[j].name, rooms[i].name) in start else 0.0 for i, j in pairs]
    short = [float(max(0, m.copies - _copies(start, m.name))) for m in models]
    over = [max(0.0, load_of(r, models, start) - r.limit) for r in rooms]
    return [*taken, *short, *over]
