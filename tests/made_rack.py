"""The telemetry of a synthetic rack: days and nights of traffic, heat, restarts, outages, evictions, swaps
and skewed clocks, as real records, batches and segments. Equal seeds give equal bytes.

Used by tests, benchmarks and `make sample-rack`, which shows reports without a rack. Noise: requests are
drawn from a Poisson distribution around the hour's rate, each model's rate wanders by ``wander`` (one standard
deviation) from week to week, and speeds and lengths by 3 % from window to window.
"""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from shared import chips
from shared.batch import Batch
from shared.records import (
    AgentStarted,
    AgentStopped,
    DesiredObserved,
    EngineWindow,
    Event,
    Hardware,
    HostSample,
    ModelEvicted,
    ModelLoaded,
    ModelMissed,
    OutletReading,
    PeerDown,
    PeerUp,
    Record,
    Resident,
    Served,
    SwapFinished,
    ThrottleEnded,
    ThrottleEvent,
    prompt_bucket,
)
from shared.sketch import Sketch, SketchWire

HOUR_MS = 3_600_000
WEEK_MS = 168 * HOUR_MS
CAUSES = ("cache_miss", "poisoned_kv", "traffic_drop", "throttling", "mix_shift")
MODEL, MEMORY_GB = "Mac16,11", 64
"""What every node is: the largest mini of its year."""


def list_price() -> float:
    """US dollars for one node."""
    mac = chips.find_mac(MODEL)
    return (chips.price(mac, MEMORY_GB)[0] if mac else None) or 0.0


class MadeModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model's traffic. Times are per token on a node of speed 1; ``share`` of a prompt is in the prompt cache."""

    name: str
    per_hour: float
    prompt_tok: float = 1_500.0
    answer_tok: float = 220.0
    share: float = 0.55
    prefill_us: float = 900.0
    decode_us: float = 9_000.0
    need_bytes: int = 6_000_000_000
    nodes: tuple[str, ...] = ()
    key: str = "app"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change at some time, for one model or, if it names none, for all."""

    cause: str
    since_ms: int
    model: str = ""
    strength: float = 1.0


class MadeRack(msgspec.Struct, frozen=True, kw_only=True):
    """A rack. ``faults`` is the rate per node and week of restarts, outages, evictions and the like."""

    seed: int = 1
    rack: str = "r"
    nodes: tuple[str, ...] = ("n1", "n2")
    models: tuple[MadeModel, ...] = ()
    since_ms: int = 0
    window_ms: int = 60_000
    faults: float = 0.0
    wander: float = 0.05
    skewed: tuple[str, ...] = ()
    metered: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()


class Outage(NamedTuple):
    """[start, end) without telemetry of the node; ``kind`` is clean, unclean or power."""

    node: str
    start_ms: int
    end_ms: int
    kind: str


def outages(rack: MadeRack, until_ms: int) -> list[Outage]:
    """All restarts and outages."""
    found = []
    for node in rack.nodes:
        dice = random.Random(f"{rack.seed} outages {node}")
        at = rack.since_ms
        while rack.faults > 0:
            at += int(dice.expovariate(rack.faults / WEEK_MS)) + HOUR_MS
            if at >= until_ms:
                break
            kind = dice.choice(("clean", "unclean", "power"))
            lasts = int(dice.uniform(1, 3) * HOUR_MS) if kind == "power" else int(dice.uniform(20, 120) * 1000)
            found.append(Outage(node, at, at + lasts, kind))
            at += lasts
    return sorted(found, key=lambda one: one.start_ms)


def batches(rack: MadeRack, node: str, until_ms: int) -> Iterator[Batch]:
    """Everything one node reports, in order."""
    return _Node(rack, node, until_ms).batches()


class _Node:
    def __init__(self, rack: MadeRack, node: str, until_ms: int) -> None:
        self.rack, self.node, self.until_ms = rack, node, until_ms
        self.dice = random.Random(f"{rack.seed} {node}")
        self.all_outages = outages(rack, until_ms)
        self.mine = [one for one in self.all_outages if one.node == node]
        self.models = [m for m in rack.models if not m.nodes or node in m.nodes]
        self.speed = 1.0
        self.resident = {m.name: True for m in self.models}
        self.version = {m.name: "v1" for m in self.models}
        self.evicted_ms: dict[str, int] = {}
        self.throttled_since: int | None = None

    def batches(self) -> Iterator[Batch]:
        epoch, seq, at = 1, 0, self.rack.since_ms
        waiting = list(self.mine)
        previous = "first"
        while at < self.until_ms:
            end = min(at + self.rack.window_ms, self.until_ms)
            stop = waiting[0] if waiting and waiting[0].start_ms < end else None
            if stop is not None:
                end = max(at + 1, stop.start_ms) if stop.kind == "clean" else at  # unsealed telemetry is lost
            if end > at:
                seq += 1
                events: list[Event] = []
                if seq == 1:
                    events.append(AgentStarted(t_ms=at, version="0.1.0", previous=previous))
                if stop is not None and stop.kind == "clean":
                    events.append(AgentStopped(t_ms=end, reason="shutdown requested"))
                yield self._batch(epoch, seq, at, end, events)
            if stop is None:
                at = end
            else:
                waiting.pop(0)
                epoch, seq, at = epoch + 1, 0, stop.end_ms
                previous = "clean" if stop.kind == "clean" else "unclean"

    def _batch(self, epoch: int, seq: int, start: int, end: int, events: list[Event]) -> Batch:
        heat = self._heat(start)
        records: list[Record] = []
        busy_us = 0
        for model in self.models:
            served, engine = self._model(model, start, end, heat, events)
            records += served
            busy_us += engine.busy_prefill_us + engine.busy_decode_us
            records.append(engine)
            if self.resident[model.name]:
                need, version = model.need_bytes, self.version[model.name]
                records.append(Resident(model=model.name, version=version, state="ready", need_bytes=need))
        duty = min(1.0, busy_us / 1000 / max(1, end - start))
        records += self._host(start, end, heat, duty, events)
        if seq == 1:
            mac = chips.find_mac(MODEL)
            assert mac is not None
            memory_bytes = MEMORY_GB * chips.GIB
            records.append(Hardware(model=MODEL, chip=f"Apple {mac.chip}", memory_bytes=memory_bytes, cores=(10, 4)))
        records.append(DesiredObserved(generation=1, state="converged"))
        records += self._seen(start, end)
        skew = 600_000 if self.node in self.rack.skewed else self.dice.randint(-40, 40)
        shift = skew if abs(skew) > 1000 else 0
        return Batch(
            rack=self.rack.rack,
            node=self.node,
            incarnation=1,
            epoch=epoch,
            seq=seq,
            t_start_ms=start + shift,
            t_end_ms=end + shift,
            boot_id=f"boot-{epoch}",
            agent_version="0.1.0",
            clock_skew_ms=skew,
            records=(*records, *(_shifted(event, shift) for event in events)),
        )

    def _model(
        self, model: MadeModel, start: int, end: int, heat: float, events: list[Event]
    ) -> tuple[list[Served], EngineWindow]:
        name, dice = model.name, self.dice
        self._swap_or_evict(model, start, end, events)
        causes = {c.cause: c.strength for c in self.rack.changes if c.since_ms <= start and c.model in ("", name)}
        rate = model.per_hour * _profile(start) * self._week(model, start) / max(1, len(model.nodes or self.rack.nodes))
        rate *= 1 - 0.75 * causes.get("traffic_drop", 0)
        count = _poisson(dice, rate * (end - start) / HOUR_MS)
        noise = dice.gauss(1, 0.03)
        share = model.share * (1 - 0.95 * causes.get("cache_miss", 0))
        mix = causes.get("mix_shift", 0)
        prompt = int(count * model.prompt_tok * noise * (1 - 0.85 * mix))
        answer = int(count * model.answer_tok * noise * (1 + 2.0 * mix) * (1 + 3.0 * causes.get("poisoned_kv", 0)))
        cached = int(prompt * min(0.95, share * dice.gauss(1, 0.02)))
        slow = heat * (1 + 1.6 * causes.get("throttling", 0)) / self.speed
        prefill_us = int((prompt - cached) * model.prefill_us * slow * dice.gauss(1, 0.03))
        decode_us = int(answer * model.decode_us * slow * dice.gauss(1, 0.03))
        engine = EngineWindow(
            model=name,
            version=self.version[name],
            busy_prefill_us=max(0, prefill_us),
            busy_decode_us=max(0, decode_us),
            prefill_tok=prompt - cached,
            cached_tok=cached,
            decode_tok=answer,
            steps=answer // 2,
            queue_max=min(count, 5),
            queue_us=count * 20_000,
            cache_hits=count // 2,
            cache_misses=count - count // 2,
            peak_bytes=model.need_bytes,
        )
        if not count:
            return [], engine
        long = causes.get("poisoned_kv", 0) > 0
        cut = int(count * (0.45 if long else 0.06))
        ttft = 60_000 + (prompt - cached) / count * model.prefill_us * slow
        parts = [("stop", count - cut), ("length", cut)]
        found: list[Served] = []
        for finish, requests in parts:
            if not requests:
                continue
            part = requests / count
            rest = found[0] if found else None
            found.append(
                Served(
                    model=name,
                    version=self.version[name],
                    worker=self.node,
                    key_id=model.key,
                    finish=finish,
                    prompt_bucket_tok=prompt_bucket(int(model.prompt_tok)),
                    requests=requests,
                    prompt_tok=prompt - rest.prompt_tok if rest else int(prompt * part),
                    cached_tok=cached - rest.cached_tok if rest else int(cached * part),
                    completion_tok=answer - rest.completion_tok if rest else int(answer * part),
                    ttft_us=_sketch(dice, ttft, 0.4, requests),
                    itl_us=_sketch(dice, model.decode_us * slow * 2, 0.3, requests * 8),
                    total_us=_sketch(dice, ttft + answer / count * model.decode_us * slow, 0.4, requests),
                )
            )
        failed = _poisson(dice, count * 0.0004)
        if failed:
            found.append(Served(model=name, worker="", key_id=model.key, outcome="failed", requests=failed))
        return _whole(found, prompt, cached, answer), engine

    def _swap_or_evict(self, model: MadeModel, start: int, end: int, events: list[Event]) -> None:
        name, dice, faults = model.name, self.dice, self.rack.faults
        if faults <= 0:
            return
        odds = faults * (end - start) / WEEK_MS
        if name in self.evicted_ms and not self.resident[name]:
            gone = self.evicted_ms[name]
            if start - gone > 5 * 60_000:
                version = self.version[name]
                events.append(
                    ModelMissed(
                        t_ms=start, model=name, version=version, reason="memory", after_us=(start - gone) * 1000
                    )
                )
                events.append(
                    ModelLoaded(
                        t_ms=start + 1, model=name, version=version, load_us=9_000_000, need_bytes=model.need_bytes
                    )
                )
                self.resident[name] = True
        elif dice.random() < odds and len(self.models) > 1:
            other = dice.choice([m.name for m in self.models if m.name != name])
            events.append(
                ModelEvicted(
                    t_ms=start,
                    model=name,
                    version=self.version[name],
                    reason="memory",
                    for_model=other,
                    bytes=model.need_bytes,
                    age_us=HOUR_MS * 1000,
                    requests_last_hour=int(model.per_hour),
                    idle_us=60_000_000,
                    reload_us=9_000_000,
                )
            )
            self.resident[name], self.evicted_ms[name] = False, start
        elif dice.random() < odds / 2:
            old = self.version[name]
            new = f"v{int(old[1:]) + 1}"
            failed = dice.random() < 0.1
            events.append(
                SwapFinished(
                    t_ms=start,
                    swap_id=f"{self.node}-{start}",
                    model=name,
                    from_version=old,
                    to_version=new,
                    outcome="failed" if failed else "flipped",
                    reason="probe 3 differs" if failed else "",
                    window_us=int(dice.uniform(30, 90) * 1e6),
                    probes=30,
                )
            )
            if not failed:
                self.version[name] = new

    def _heat(self, at: int) -> float:
        """The slowdown by heat: 1, or more on some afternoons."""
        if self.rack.faults <= 0:
            return 1.0
        day = random.Random(f"{self.rack.seed} heat {self.node} {at // (24 * HOUR_MS)}")
        hot = day.random() < 0.15 * min(2.0, self.rack.faults)
        return 1.35 if hot and 13 <= at // HOUR_MS % 24 < 16 else 1.0

    def _host(self, start: int, end: int, heat: float, duty: float, events: list[Event]) -> list[Record]:
        length_us = (end - start) * 1000
        throttling = max(
            (c.strength for c in self.rack.changes if c.cause == "throttling" and c.since_ms <= start), default=0
        )
        throttled = 0.55 * throttling if throttling else (0.4 if heat > 1 else 0.0)
        if throttled and self.throttled_since is None:
            self.throttled_since = start
            events.append(ThrottleEvent(t_ms=start, level="heavy"))
        elif not throttled and self.throttled_since is not None:
            began, self.throttled_since = self.throttled_since, None
            events.append(ThrottleEnded(t_ms=start, start_ms=began, level="heavy", duration_us=(start - began) * 1000))
        power = int((5 + 60 * duty) * 1000 * self.dice.gauss(1, 0.02))
        temp = int((38 + 45 * duty + (22 if throttled else 0)) * 1000 * self.dice.gauss(1, 0.01))
        host = HostSample(
            cpu_ppm=int(duty * 300_000),
            memory_total_bytes=64 << 30,
            memory_used_bytes=int(30e9),
            memory_budget_bytes=48 << 30,
            memory_pressure="normal",
            thermal_known_us=length_us,
            throttled_us=int(length_us * throttled),
            thermal_level="heavy" if throttled else "nominal",
            package_temp_mc=temp + 2000,
            package_temp_mean_mc=temp,
            pcore_temp_mc=temp + 4000,
            fan_rpm=(1000 + int(2000 * duty),),
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

    def _seen(self, start: int, end: int) -> list[Record]:
        """Events of the first other node about nodes that went down and came up."""
        found: list[Record] = []
        for one in self.all_outages:
            watcher = next((n for n in self.rack.nodes if n != one.node), None)
            if watcher != self.node or one.kind == "clean":
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


def _whole(found: list[Served], prompt: int, cached: int, answer: int) -> list[Served]:
    """Rounding must not lose a token: the remainder goes to the last part."""
    ok = [one for one in found if one.outcome == "ok"]
    if len(ok) != 1:
        return found
    only = msgspec.structs.replace(ok[0], prompt_tok=prompt, cached_tok=cached, completion_tok=answer)
    return [only, *(one for one in found if one.outcome != "ok")]


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


def _sketch(dice: random.Random, median: float, sigma: float, count: int) -> SketchWire:
    """Values around a median; few draws stand for many, as in a short window."""
    sketch, left = Sketch(), count
    for draws in range(min(count, 8), 0, -1):
        times = left // draws
        sketch.add(int(median * math.exp(dice.gauss(0, sigma))), times)
        left -= times
    return sketch.to_wire()
