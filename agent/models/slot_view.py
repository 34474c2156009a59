"""A slot as routing, batches, the memory guard, reconcile and the status see it."""

from typing import Any

import msgspec

from agent.models.memory_guard import Held
from agent.models.slot import Loaded, Slot
from agent.process.footprint import footprint_bytes
from agent.views import Actual, ModelView
from agent.wire.frames import Working
from agent.wire.step_times import TYPICAL_TOK, StepTimes
from shared.records import ModelLoaded, ModelTimed, Resident


def model_view(slot: Slot, name: str, now_s: float, *, refusing: bool, versions: tuple[str, ...]) -> ModelView:
    """As routing sees it under one of its names."""
    loaded = slot.loaded
    base = ModelView(
        name=name,
        version=loaded.spec.version if loaded else "",
        ready=slot.ready and not refusing,
        coming=slot.life.coming or (loaded is not None and not slot.ready),
        in_flight=slot.leases,
        versions=versions,
        rows=slot.model.rows,
    )
    if loaded is None:
        return base
    process, plan, timed = loaded.process, loaded.spec.plan, loaded.process.throughput.timed
    speed = process.throughput.speed(now_s)
    held = process.working.kv_bytes if process.working and plan.kv_bytes else 0
    return msgspec.structs.replace(
        base,
        context_tok=process.ready.context_tok if process.ready else 0,
        prefill_tok=process.throughput.workload.prefill_tok,
        prefill_tps=speed.prefill_tps or (timed.prefill_tps(slot.model.prefill_chunk_tok) if timed else None),
        gap_us=timed.gap_us(slot.model.rows) if timed and speed.gap_us is None else speed.gap_us,
        answer_tok=speed.answer_tok,
        crowd=process.throughput.crowd if timed else None,
        kv_ppm=min(10**6, held * 10**6 // plan.kv_bytes) if held else 0,
    )


def resident(slot: Slot) -> Resident:
    """For the batch."""
    return Resident(
        model=slot.name,
        version=slot.spec.version if slot.spec else "",
        state=slot.life.state,
        pinned=slot.pinned,
        need_bytes=slot.spec.need_bytes if slot.spec else 0,
        footprint_bytes=footprint_bytes(slot.loaded.process.pid) if slot.loaded else None,
        restarts=slot.life.restarts,
    )


def actual(slot: Slot) -> Actual:
    """As reconcile sees it."""
    departed = slot.life.departed
    returns = slot.spec is not None and departed is not None and departed.reason != "ordered"
    return Actual(
        model=slot.name,
        names=tuple(slot.names),
        version=slot.loaded.spec.version if slot.loaded else "",
        offers=slot.spec.version if slot.spec and returns else "",
        pinned=slot.pinned,
        changing=bool(slot.life.claim) or slot.life.state in ("starting", "draining"),
    )


def loaded_event(slot: Slot, loaded: Loaded, t_ms: int, *, fused: bool) -> ModelLoaded:
    """The record of the load that has just completed."""
    planned, peak = _first_prompt(loaded, fused=fused)
    return ModelLoaded(
        t_ms=t_ms,
        model=slot.name,
        version=loaded.spec.version,
        load_us=int(loaded.load_s * 1e6),
        need_bytes=loaded.spec.need_bytes,
        footprint_bytes=footprint_bytes(loaded.process.pid),
        planned_peak_bytes=planned,
        peak_bytes=peak,
    )


def timed_event(slot: Slot, loaded: Loaded, times: StepTimes, measured_ms: int, t_ms: int) -> ModelTimed:
    """The record of figures that are put to use."""
    return ModelTimed(
        t_ms=t_ms,
        model=slot.name,
        version=loaded.spec.version,
        runtime=loaded.process.ready.runtime if loaded.process.ready else "",
        measured_ms=measured_ms,
        took_us=times.took_us,
        spread_ppm=times.spread_ppm,
        prompt_us=round(times.prompt_us(TYPICAL_TOK, slot.model.prefill_chunk_tok)),
        rows=tuple(one.rows for one in times.decode),
        step_us=tuple(round(times.step_us(one.rows, TYPICAL_TOK)) for one in times.decode),
        verify_rows=tuple(one.rows for one in times.verify),
        verify_tok=tuple(one.tokens for one in times.verify),
        verify_us=tuple(round(one.us) for one in times.verify),
    )


def figures(slot: Slot, loaded: Loaded) -> dict[str, Any]:
    """Step times for display: tokens per second of a prompt and of one answer, microseconds of steps; {} for none."""
    if (times := loaded.process.throughput.timed) is None:
        return {}
    return {
        "prefill_tps": round(times.prefill_tps(slot.model.prefill_chunk_tok), 1),
        "decode_tps": round(1e6 / max(1.0, times.step_us(1, TYPICAL_TOK)), 1),
        "context_tok": TYPICAL_TOK,
        "step_us": {str(one.rows): round(times.step_us(one.rows, TYPICAL_TOK)) for one in times.decode},
        "verify_us": {f"{one.rows}x{one.tokens}": round(one.us) for one in times.verify},
        "weights_bytes": loaded.spec.plan.weights_bytes,
        "spread_ppm": times.spread_ppm,
        "took_s": round(times.took_us / 1e6, 1),
    }


def status(slot: Slot, now_s: float, *, fused: bool) -> dict[str, object]:
    """For display."""
    loaded, spec, life = slot.loaded, slot.spec, slot.life
    planned, peak = _first_prompt(loaded, fused=fused) if loaded else (None, None)
    closed = "closed" if life.closed_for else life.state
    return {
        "model": slot.name,
        "names": slot.names,
        "state": closed if life.in_rotation else "out of rotation",
        "reason": f"makes room for {life.closed_for}" if life.closed_for else life.reason,
        "version": loaded.spec.version if loaded else "",
        "path": spec.path if spec else "",
        "pid": loaded.process.pid if loaded else None,
        "in_flight": slot.leases,
        "waiting": len(slot.waiting),
        "pinned": slot.pinned,
        "keep_alive_s": slot.keep_alive_s,
        "need_bytes": spec.need_bytes if spec else None,
        "footprint_bytes": footprint_bytes(loaded.process.pid) if loaded else None,
        "peak_bytes": slot.peak_bytes or None,
        "first_prompt_planned_bytes": planned,
        "first_prompt_peak_bytes": peak,
        "plan_error_ppm": round((peak - planned) / planned * 1e6) if planned and peak else None,
        "load_s": round(loaded.load_s, 2) if loaded else None,
        "requests_last_hour": slot.demand.last_hour(now_s),
        "restarts": life.restarts,
        "last_exit": life.last_exit,
        "silent_s": round(loaded.process.silent_s, 1) if loaded else 0.0,
        "blas": loaded.process.ready.blas if loaded and loaded.process.ready else "",
        "figures": figures(slot, loaded) if loaded else {},
        "conversation": loaded.process.ready.talks if loaded and loaded.process.ready else {},
    }


def _first_prompt(loaded: Loaded, *, fused: bool) -> tuple[int | None, int | None]:
    """MLX's peak at the loader's first prompt, as planned and as measured."""
    ready = loaded.process.ready
    if ready is None or not ready.peak_bytes:
        return None, None
    return loaded.spec.planned_warm_bytes(ready.warm_tok, fused=fused), ready.peak_bytes


def held_by(loaded: Loaded) -> Held:
    """What a loader holds, by source, as the memory guard sees it."""
    working, plan = loaded.process.working or Working(), loaded.spec.plan
    if loaded.spec.model.engine == "fake":  # its numbers are synthetic, and its process holds no model
        return Held(name=loaded.name, engine_bytes=working.active_bytes)
    overhead = plan.overhead_bytes
    return Held(
        name=loaded.name,
        engine_bytes=working.active_bytes + working.reuse_bytes + overhead,
        footprint_bytes=footprint_bytes(loaded.process.pid),
        ledger_bytes=plan.weights_bytes + working.kv_bytes + working.cache_bytes + overhead,
    )
