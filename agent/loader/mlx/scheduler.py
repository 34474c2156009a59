"""Starts and preempts the rows of an engine as ``agent.loader.row_placement`` decides, by ``agent.loader.ranking``."""

from agent.loader.counts import Counts
from agent.loader.mlx.batch import Batch, Entry
from agent.loader.mlx.entries import entry
from agent.loader.mlx.model import TextModel
from agent.loader.mlx.row import Row
from agent.loader.mlx.rows import Rows
from agent.loader.prefill_pace import PrefillPace
from agent.loader.ranking import Standings, begin, could_start, least, paused, seen
from agent.loader.row_placement import Limits, Placement
from agent.loader.scheduling import together


class Scheduler:
    """Moves rows between the queue and the batches, before each step."""

    def __init__(self, rows: Rows, model: TextModel, pace: PrefillPace, counts: Counts, limits: Limits) -> None:
        self._rows, self._model = rows, model
        self._pace, self._counts = pace, counts
        self.limits = limits
        self._paused_s = 0.0
        self._could: set[int] = set()
        """Rows that could have the turn of this step."""

    def plan(self, now_s: float) -> None:
        """Make room and start the next rows. Raises whatever removing a row from its batch raises."""
        self.make_room()
        self._start(now_s)

    def make_room(self) -> None:
        """When the rows exceed the memory planned for them, preempt the youngest of the lowest rank; it resumes."""
        while (placement := self._placement).outgrown() is not None:
            self._rows.put_back(self._rows.by_id[least(placement.rows, self._standings)])

    def due(self, now_s: float) -> list[Batch]:
        """The batches to step. Those that pause for another's first token do so no longer than decoding rows may wait
        for a chunk; then they have a step."""
        batches = self._rows.batches
        if not any(row.request.priority.leaves_rows for row in self._rows.by_id.values()):
            return list(batches)
        wait = paused(self._placement, self._standings)
        if not wait or (self._paused_s and now_s - self._paused_s > self._pace.stall_s):
            self._paused_s = 0.0
            return list(batches)
        self._paused_s = self._paused_s or now_s
        return [batch for at, batch in enumerate(batches) if at not in wait]

    def chunk_tok(self, before_tok: float) -> int:
        """Prompt tokens for one step."""
        decoding = any(row not in self._rows.prefilling for row in self._rows.running)
        return self._pace.chunk_tok(before_tok, decoding=decoding)

    @property
    def _placement(self) -> Placement:
        return self._rows.placement(self.limits._replace(pressed=self._pace.pressed))

    @property
    def _standings(self) -> Standings:
        return {number: row.standing for number, row in self._rows.by_id.items()}

    def _start(self, now_s: float) -> None:
        if not (ready := [row for row in self._rows.waiting if row.behind is None]):
            return
        ready = self._highest(ready, now_s)
        prefilling = [row.turn(now_s) for row in self._rows.prefilling]
        candidates = [row.candidate(now_s) for row in ready]
        aside, begins, preempts = begin(
            self._placement, candidates, prefilling, self._pace.rate_tok_per_s, self._standings
        )
        if aside is not None:
            row = self._rows.by_id[aside]
            row.yielded += row.rank < ready[0].rank
            self._rows.set_aside(row)
        for number in preempts:
            self._rows.by_id[number].yielded += 1
            self._rows.put_back(self._rows.by_id[number])
        if begins is not None:
            self._begin(self._group(self._rows.by_id[begins], ready, now_s), now_s)

    def _highest(self, ready: list[Row], now_s: float) -> list[Row]:
        """Those of the highest rank that waits."""
        placed = {row.id: row.standing for row in self._rows.running}
        self._could = could_start({row.id: row.standing for row in ready}, placed, self.limits.rows)
        for row in ready:
            row.rank = self._rows.turns.rank(row.id, now_s, could=row.id in self._could)
        highest = max(row.rank for row in ready)
        return [row for row in ready if row.rank == highest]

    def _group(self, best: Row, ready: list[Row], now_s: float) -> list[Row]:
        """Rows prefilled with ``best`` in one chunk: short prompts of which none waits for another's prefix."""
        if best.breaks or not self._rows.cache.sliceable:
            return [best]  # some recurrent models process the padding of unequal prompts as text
        others = [row for row in ready if row is not best and not row.breaks]
        self._rows.queue_behind([best], others)
        turns = [row.turn(now_s) for row in others if row.behind is None]
        largest = self.chunk_tok(best.length_tok - best.left_tok)
        group: list[Row] = []
        for number in together(best.turn(now_s), turns, self._pace.rate_tok_per_s, largest):
            row = self._rows.by_id[number]
            self._rows.queue_behind(group, [row])
            if row.behind is None:
                group.append(row)
        return group

    def _begin(self, group: list[Row], now_s: float) -> None:
        """Add rows to batches while there is room."""
        placement = seen(self._placement, group[0].standing, self._standings)
        for at, ids in sorted(placement.seats([row.candidate(now_s) for row in group]).items()):
            self._join(self._rows.batch(at), [self._rows.by_id[number] for number in ids], now_s)

    def _join(self, batch: Batch, rows: list[Row], now_s: float) -> None:
        joining, entries = [], []
        for row in rows:
            self._rows.waiting.remove(row)
            self._rows.turns.take(row.id, now_s, self._could)
            row.joined_s, row.begun_s = now_s, row.begun_s or now_s
            try:
                entries.append(self._entry(row))
                joining.append(row)
            except Exception as error:  # noqa: BLE001  # one row's failure must not affect the others
                row.broken = error
                self._rows.fail(row)
        if not joining:
            return
        try:
            batch.add(joining, entries)
        except Exception:  # noqa: BLE001  # mlx-lm raises before it changes anything
            for row in joining:
                self._rows.fail(row)
            return
        self._rows.prefilling += joining

    def _entry(self, row: Row) -> Entry:
        layers, cached_tok = self._rows.state_of(row)
        if not row.looked_up:
            row.looked_up, row.cached_tok = True, min(cached_tok, len(row.prompt))
            self._counts.add("cached_tok", cached_tok)
            self._counts.add("queue_us", int((row.begun_s - row.since_s) * 1e6))
        row.left_tok = row.length_tok - cached_tok
        return entry(self._model, row, layers, cached_tok)
