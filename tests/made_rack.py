"""The telemetry of a synthetic rack: days and nights of traffic, heat, restarts, outages, evictions, swaps
and skewed clocks, as real records, batches and segments. Equal seeds give equal bytes.

Used by tests, benchmarks and `make sample-rack`, which shows reports without a rack. Noise: requests are
drawn from a Poisson distribution around the hour's rate, each model's rate wanders by ``wander`` (one standard
deviation) from week to week, and speeds and lengths by 3 % from window to window. Speeds are those of the chip
(tests/made_machine.py); work that does not fit into a window waits for the next one (tests/made_loader.py), and a model
leaves memory only where another one needs its room (tests/made_memory.py).
"""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from shared.batch import Batch
from shared.records import (
    AgentStarted,
    AgentStopped,
    DesiredObserved,
    Event,
    HostSample,
    LoaderExited,
    MemoryPressed,
    OutletReading,
    PeerDown,
    PeerUp,
    Record,
    Served,
    SwapFinished,
    ThrottleEnded,
    ThrottleEvent,
)
from tests.made_loader import Arrived, Loader, MadeModel
from tests.made_machine import BUDGET_BYTES, DAY_MS, HARDWARE, HOUR_MS, MAC, MEMORY_GB, Air, Heat, boot, list_price
from tests.made_memory import Memory

__all__ = ["DAY_MS", "HOUR_MS", "Change", "MadeModel", "MadeRack", "Outage", "batches", "list_price", "outages"]
WEEK_MS = 168 * HOUR_MS
CAUSES = ("cache_miss", "poisoned_kv", "traffic_drop", "throttling", "mix_shift")
_QUIET = ("asleep", "lost")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change from some time on (until ``until_ms``, if given), for one model or, if it names none, for all. ``cause``
    is one of CAUSES, "full" (``strength`` is the share of requests that are refused for want of capacity) or "swap"
    (a new version)."""

    cause: str
    since_ms: int
    until_ms: int = 0
    model: str = ""
    strength: float = 1.0

    def holds(self, at_ms: int) -> bool:
        """Whether it does at that time."""
        return self.since_ms <= at_ms and not (self.until_ms and at_ms >= self.until_ms)


class Outage(NamedTuple):
    """[start, end) without telemetry of the node. ``kind`` is clean (stopped and started), deploy (the same, with the
    next version of the agent), unclean (the agent crashed), memory (it crashed while memory ran short), power (the
    machine went down), asleep (nobody says why; it goes on where it was) or lost (its windows never arrived)."""

    node: str
    start_ms: int
    end_ms: int
    kind: str


class MadeRack(msgspec.Struct, frozen=True, kw_only=True):
    """A rack. ``faults`` is the rate per node and week of restarts, outages, swaps and the like; ``hot`` the share of
    days that are hot (left out: more with more faults); ``cold`` the nodes in cooler air than the others."""

    seed: int = 1
    rack: str = "r"
    nodes: tuple[str, ...] = ("n1", "n2")
    models: tuple[MadeModel, ...] = ()
    since_ms: int = 0
    window_ms: int = 60_000
    faults: float = 0.0
    wander: float = 0.05
    skewed: tuple[str, ...] = ()
    skew_ms: int = 600_000
    skew_step_ms: int = 0
    metered: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    planned: tuple[Outage, ...] = ()
    hot: float | None = None
    intake_c: tuple[float, ...] = ()
    budget_bytes: int = BUDGET_BYTES


def outages(rack: MadeRack, until_ms: int) -> list[Outage]:
    """All restarts and outages, the planned ones included."""
    found = [one for one in rack.planned if one.start_ms < until_ms]
    for node in rack.nodes:
        dice = random.Random(f"{rack.seed} outages {node}")
        at = rack.since_ms
        while rack.faults > 0:
            at += int(dice.expovariate(rack.faults / WEEK_MS)) + HOUR_MS
            if at >= until_ms:
                break
            kind = dice.choice(("clean", "clean", "unclean", "memory", "power"))
            lasts = int(dice.uniform(1, 3) * HOUR_MS) if kind == "power" else int(dice.uniform(20, 120) * 1000)
            one = Outage(node, at, at + lasts, kind)
            at += lasts
            if not any(p.node == node and p.start_ms < one.end_ms and one.start_ms < p.end_ms for p in rack.planned):
                found.append(one)
    return sorted(found, key=lambda one: (one.start_ms, one.node))


def batches(rack: MadeRack, node: str, until_ms: int) -> Iterator[Batch]:
    """Everything one node reports, in order."""
    return _Node(rack, node, until_ms).batches()


class _Run(NamedTuple):
    """A run of the agent: its epoch, the machine's boot, the agent's release, and how the run before ended."""

    epoch: int
    boots: int
    release: int
    previous: str

    @property
    def version(self) -> str:
        return f"0.{self.release}.0"

    def after(self, kind: str) -> "_Run":
        """The run that follows an outage."""
        if kind in _QUIET:
            return self
        clean = kind in ("clean", "deploy")
        return _Run(
            self.epoch + 1,
            self.boots + (kind == "power"),
            self.release + (kind == "deploy"),
            "clean" if clean else "unclean",
        )


class _Node:
    def __init__(self, rack: MadeRack, node: str, until_ms: int) -> None:
        self.rack, self.node, self.until_ms = rack, node, until_ms
        self.dice = random.Random(f"{rack.seed} {node}")
        self.all_outages = outages(rack, until_ms)
        self.mine = [one for one in self.all_outages if one.node == node]
        self.models = [m for m in rack.models if not m.nodes or node in m.nodes]
        self.loaders = {m.loader or m.name: Loader(node, m, self.dice) for m in self.models if m.loader in ("", m.name)}
        self.memory = Memory(rack.budget_bytes, self.dice)
        place = rack.nodes.index(node)
        intake = rack.intake_c[place] if place < len(rack.intake_c) else 23.0
        hot = 0.15 * min(2.0, rack.faults) if rack.hot is None else rack.hot
        self.heat = Heat(Air(f"{rack.seed} air {rack.rack}", intake, hot))
        self.throttled_since: int | None = None
        self.told_day = -1
        for loader in self.loaders.values():
            self.memory.admit(loader, rack.since_ms)

    def batches(self) -> Iterator[Batch]:
        run, seq, at, missing = _Run(1, 1, 1, "first"), 0, self.rack.since_ms, 0
        waiting = list(self.mine)
        while at < self.until_ms:
            end = min(at + self.rack.window_ms, self.until_ms)
            stop = waiting[0] if waiting and waiting[0].start_ms < end else None
            if stop is not None:
                end = _sealed(stop, at)
            if end > at:
                seq += 1
                yield self._batch(run, seq, at, end, self._edges(run, seq, at, stop and stop.kind, end), missing)
            if stop is None:
                at = end
                continue
            waiting.pop(0)
            if stop.kind == "lost":
                lost = (stop.end_ms - stop.start_ms) // self.rack.window_ms
                seq, missing = seq + lost, missing + lost
            after = run.after(stop.kind)
            seq, missing = (seq, missing) if after is run else (0, 0)
            run, at = after, max(at, stop.end_ms)

    def _edges(self, run: _Run, seq: int, at: int, stop: str | None, end: int) -> list[Event]:
        events: list[Event] = []
        if seq == 1:
            self.told_day = -1
            events.append(AgentStarted(t_ms=at, version=run.version, previous=run.previous))
            events += self.memory.started(at)
        if stop in ("clean", "deploy"):
            events.append(AgentStopped(t_ms=end, reason="shutdown requested"))
        short = [one for one in self.mine if one.kind == "memory" and at <= one.start_ms - 90_000 < end]
        if self.memory.held_bytes < 0.6 * self.rack.budget_bytes:
            short = []  # memory cannot have run short
        for one in short:
            budget = self.rack.budget_bytes
            held = int(budget * self.dice.uniform(1.02, 1.06))
            when = one.start_ms - 90_000
            events.append(MemoryPressed(t_ms=when, level="hard", held_bytes=held, budget_bytes=budget))
        return events

    def _batch(self, run: _Run, seq: int, start: int, end: int, events: list[Event], missing: int) -> Batch:
        records: list[Record] = []
        if self.rack.faults > 0:
            self._loader_fault(start, end, events)
        arrived = {m.name: self._arrived(m, start, end) for m in self.models}
        records += [one for found in arrived.values() for one in found.refused]
        slow = self.heat.slowdown() * (1 + 1.6 * self._strength("throttling", start))
        busy_us = 0
        wanted = {name: sum(arrived[m.name].count for m in self._names(name)) for name in self.loaders}
        self.memory.make_room(self.loaders, wanted, start, events)
        for name, loader in self.loaders.items():
            self._swap(loader, start, end, events)
            served, engine = loader.work([arrived[m.name] for m in self._names(name)], start, end, slow)
            busy_us += engine.busy_prefill_us + engine.busy_decode_us
            records += [*served, engine]
        records += self.memory.residents(self.loaders)
        records += self._host(start, end, busy_us, events)
        if start // DAY_MS != self.told_day:
            self.told_day = start // DAY_MS
            records.append(HARDWARE)
        records.append(DesiredObserved(generation=1, state="converged"))
        records += self._seen(start, end)
        skew, shift = self._skew(start)
        return Batch(
            rack=self.rack.rack,
            node=self.node,
            incarnation=1,
            epoch=run.epoch,
            seq=seq,
            t_start_ms=start + shift,
            t_end_ms=end + shift,
            boot_id=boot(self.node, run.boots),
            agent_version=run.version,
            dropped_batches=missing,
            clock_skew_ms=skew,
            records=(*records, *(_shifted(event, shift) for event in events)),
        )

    def _names(self, loader: str) -> list[MadeModel]:
        """The served names that a loader answers."""
        return [m for m in self.models if (m.loader or m.name) == loader]

    def _skew(self, start: int) -> tuple[int, int]:
        """How far the clock is ahead, and by how much times are off."""
        if self.node not in self.rack.skewed:
            return self.dice.randint(-40, 40), 0
        skew = self.rack.skew_ms + start // self.rack.window_ms % 7 * self.rack.skew_step_ms
        return skew, skew

    def _strength(self, cause: str, at: int, model: str = "") -> float:
        """How strong a change is now, 0 without one."""
        found = (c.strength for c in self.rack.changes if c.cause == cause and c.holds(at) and c.model in ("", model))
        return max(found, default=0.0)

    def _arrived(self, model: MadeModel, start: int, end: int) -> Arrived:
        """The requests of a window, and those that were refused."""
        name, dice = model.name, self.dice
        there = [n for n in (model.nodes or self.rack.nodes) if n == self.node or not self._is_away(n, start)]
        rate = model.per_hour * _profile(start) * self._week(model, start) / max(1, len(there))
        rate *= 1 - 0.75 * self._strength("traffic_drop", start)
        count = _poisson(dice, rate / model.burst * (end - start) / HOUR_MS) * model.burst
        noise, mix = dice.gauss(1, 0.03), self._strength("mix_shift", start, name)
        poisoned = self._strength("poisoned_kv", start, name)
        share = model.share * (1 - 0.95 * self._strength("cache_miss", start, name))
        refused = {"capacity": round(count * self._strength("full", start, name))}
        count -= refused["capacity"]
        if self.rack.faults > 0:
            refused |= {"limit": _poisson(dice, count * 0.0012), "request": _poisson(dice, count * 0.0008)}
        prompt = int(count * model.prompt_tok * noise * (1 - 0.85 * mix))
        return Arrived(
            model=model,
            at_ms=start,
            count=count,
            prompt_tok=prompt,
            cached_tok=int(prompt * min(0.95, share * dice.gauss(1, 0.02))),
            answer_tok=int(count * model.answer_tok * noise * (1 + 2.0 * mix) * (1 + 3.0 * poisoned)),
            cut=0.45 if poisoned else 0.06,
            failed=_poisson(dice, count * 0.0004),
            refused=tuple(
                Served(model=name, key_id=model.key, outcome="refused", finish=finish, requests=n)
                for finish, n in refused.items()
                if n > 0
            ),
        )

    def _is_away(self, node: str, at: int) -> bool:
        return any(one.node == node and one.start_ms <= at < one.end_ms for one in self.all_outages)

    def _loader_fault(self, start: int, end: int, events: list[Event]) -> None:
        for name, loader in self.loaders.items():
            if self.memory.holds(name) and self.dice.random() < 0.08 * self.rack.faults * (end - start) / WEEK_MS:
                loader.restarts += 1
                gone = LoaderExited(
                    t_ms=start, model=name, version=loader.version, cause="signal 9", restarts=loader.restarts
                )
                events += [gone, self.memory.loaded(loader, start + 1500)]

    def _swap(self, loader: Loader, start: int, end: int, events: list[Event]) -> None:
        """A new version, by plan or, with faults, by chance."""
        wished = any(
            c.cause == "swap" and c.model in ("", loader.model.name) and start <= c.since_ms < end
            for c in self.rack.changes
        )
        by_chance = self.rack.faults > 0 and self.dice.random() < self.rack.faults * (end - start) / WEEK_MS / 2
        if not (wished or by_chance) or not self.memory.holds(loader.name):
            return
        failed = not wished and self.dice.random() < 0.1
        old, new = loader.version, loader.next_version()
        gap = int(loader.gap_us)
        events.append(
            SwapFinished(
                t_ms=start,
                swap_id=f"{self.node}-{start}",
                model=loader.name,
                from_version=old,
                to_version=new,
                outcome="failed" if failed else "flipped",
                reason="probe 3 differs" if failed else "",
                window_us=int(self.dice.uniform(30, 90) * 1e6),
                probes=30,
                itl_before_us=gap,
                itl_during_us=int(gap * self.dice.uniform(1.2, 1.8)),
                freed_bytes=loader.model.need_bytes,
            )
        )
        if not failed:
            loader.version = new
            events.append(self.memory.loaded(loader, start))

    def _host(self, start: int, end: int, busy_us: int, events: list[Event]) -> list[Record]:
        length_us = (end - start) * 1000
        duty = min(1.0, busy_us / max(1, length_us))
        was_hot = self.heat.throttled
        mean_c = self.heat.work(start, end, duty)
        blocked = self._strength("throttling", start)
        throttled_us = int(length_us * 0.55 * blocked) if blocked else int(min(busy_us, length_us) * 0.85 * was_hot)
        self._throttle(start, bool(blocked) or was_hot, events)
        power = int((MAC.idle_w or 5) * 1000 + 58_000 * duty * self.dice.gauss(1, 0.02)) + self.dice.randint(0, 400)
        temp = int(mean_c * 1000) + self.dice.randint(-300, 300)
        peak = max(temp, int((99.0 if blocked else self.heat.celsius) * 1000))
        held = self.memory.held_bytes + 6 * 10**9
        host = HostSample(
            cpu_ppm=30_000 + int(duty * 120_000),
            memory_total_bytes=MEMORY_GB << 30,
            memory_used_bytes=held,
            memory_used_max_bytes=held + 300_000_000,
            memory_budget_bytes=self.rack.budget_bytes,
            memory_pressure="normal",
            thermal_known_us=length_us,
            throttled_us=throttled_us,
            thermal_level="heavy" if throttled_us else "nominal",
            package_temp_mc=peak,
            package_temp_mean_mc=temp,
            pcore_temp_mc=peak + 800,
            pcore_temp_mean_mc=temp + 500,
            gpu_temp_mc=peak,
            gpu_temp_mean_mc=temp,
            fan_rpm=(1000 + int(3900 * min(1.0, max(0.0, (self.heat.celsius - 60) / 38))),),
            system_power_mw=power,
            system_power_max_mw=power + 9000,
            energy_mj=power * (end - start) // 1000,
            energy_source="system",
        )
        if self.node not in self.rack.metered:
            return [host]
        wall = int(power * 1.08)
        outlet = OutletReading(
            meter="pdu",
            nodes=(self.node,),
            power_mw=wall,
            power_max_mw=wall + 9000,
            energy_mj=wall * (end - start) // 1000,
            covered_us=length_us,
        )
        return [host, outlet]

    def _throttle(self, start: int, hot: bool, events: list[Event]) -> None:
        if hot and self.throttled_since is None:
            self.throttled_since = start
            events.append(ThrottleEvent(t_ms=start, level="heavy"))
        elif not hot and self.throttled_since is not None:
            began, self.throttled_since = self.throttled_since, None
            took_us = (start - began) * 1000
            events.append(ThrottleEnded(t_ms=start, start_ms=began, level="heavy", duration_us=took_us))

    def _seen(self, start: int, end: int) -> list[Record]:
        """Events of the first node that was there about nodes that went down and came up."""
        found: list[Record] = []
        for one in self.all_outages:
            if one.start_ms >= end or one.end_ms < start or one.node == self.node or one.kind in ("clean", *_QUIET):
                continue
            watcher = next((n for n in self.rack.nodes if n != one.node and not self._is_away(n, one.start_ms)), None)
            if watcher != self.node or one.kind == "deploy":
                continue
            if start <= one.start_ms + 3000 < end:
                found.append(PeerDown(t_ms=one.start_ms + 3000, peer=one.node, last_seen_ms=one.start_ms))
            if start <= one.end_ms < end:
                down = (one.end_ms - one.start_ms) * 1000
                found.append(PeerUp(t_ms=one.end_ms, peer=one.node, down_us=down))
        return found

    def _week(self, model: MadeModel, at: int) -> float:
        week = random.Random(f"{self.rack.seed} week {model.name} {at // WEEK_MS}")
        return max(0.2, week.gauss(1, self.rack.wander))


def _sealed(stop: Outage, at: int) -> int:
    """Until when a window that began at that time is known: of one that was cut off by a crash nothing is."""
    if stop.kind in _QUIET:
        return max(at, stop.start_ms)
    return max(at + 1, stop.start_ms) if stop.kind in ("clean", "deploy") else at


def _shifted(event: Event, shift_ms: int) -> Event:
    names = [name for name in ("t_ms", "last_seen_ms", "start_ms") if name in event.__struct_fields__]
    return (
        msgspec.structs.replace(event, **{name: getattr(event, name) + shift_ms for name in names})
        if shift_ms
        else event
    )


def _profile(at: int) -> float:
    """Working days have a morning and an afternoon; nights and weekends are quiet. Mean over a week about 0.45."""
    hour, day = at // HOUR_MS % 24, (at // HOUR_MS // 24 + 3) % 7  # 1970 began on a Thursday
    shape = math.exp(-(((hour - 10.5) / 2.6) ** 2)) + 0.9 * math.exp(-(((hour - 15.5) / 2.4) ** 2))
    return (0.12 + shape) * (0.35 if day >= 5 else 1.0)


def _poisson(dice: random.Random, mean: float) -> int:
    if mean > 50:
        return max(0, round(dice.gauss(mean, math.sqrt(mean))))
    limit, count, product = math.exp(-mean), 0, dice.random()
    while product > limit:
        count += 1
        product *= dice.random()
    return count
