"""Orders by an operator, the desired state or the start of the agent: load, unload, swap, pin.

An order once begun is completed, whether or not its caller still waits. Orders for one model run one after another.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence

from agent.config import STORED, Live, Model
from agent.files.modelstore import ModelSpec
from agent.files.probes import Probe
from agent.models import lifecycle as life
from agent.models.lifecycle_run import Lifecycles
from agent.models.slot import Slot, Slots
from agent.models.swap_run import SwapRun
from agent.models.warmup import answer_of
from shared.errors import Refused, Retryable
from shared.records import Event, SwapFinished

KEPT_SWAPS = 20


class Orders:
    """``carried_by_peer`` tells whether a peer serves a name now."""

    def __init__(
        self,
        slots: Slots,
        lifecycles: Lifecycles,
        live: Live,
        *,
        emit: Callable[[Event], None],
        carried_by_peer: Callable[[str], bool],
        wall_ms: Callable[[], int],
    ) -> None:
        self._slots, self._lifecycles = slots, lifecycles
        self._live, self._others = live, dict[str, Model]()
        self._emit, self._carried_by_peer, self._wall_ms = emit, carried_by_peer, wall_ms
        self._swaps: deque[SwapRun] = deque(maxlen=KEPT_SWAPS)

    def _known(self) -> dict[str, Model]:
        """What a swap finds under a name: its own files."""
        return {model.name: model for model in self._live.now.models} | self._others

    def swaps(self) -> list[dict[str, str]]:
        """The last swaps since the agent's start, newest last."""
        return [run.view for run in self._swaps]

    async def load(self, name: str, *, ordered: bool = True) -> ModelSpec:
        """Load a configured model, evicting idle ones if necessary. Raises Refused with the reason. Unless it is
        ``ordered``, models that were just loaded are not evicted."""
        return await self._lifecycles.tasks.finish(self._load(name, ordered=ordered))

    async def unload(self, name: str) -> None:
        """Drain and stop a model's loader. Raises Refused when it is not resident."""
        await self._lifecycles.tasks.finish(self._unload(name))

    async def swap(self, old: str, new: str, *, flipped: Callable[[], None] = lambda: None) -> SwapFinished:
        """Replace the files behind ``old`` with those of the configured model ``new`` without losing a request; its
        own files are those of ``old`` itself. ``flipped`` is called as soon as they are served."""
        if (model := self._known().get(new)) is None:
            known = ", ".join(self._known()) or "none"
            remedy = f'add [[models]] with name = "{new}" to agent.toml, then `mlxrack-agent reload`'
            if new.startswith(STORED) or "/" in new:
                remedy = f'add [[models]] with path = "{new}" and a name of its own to agent.toml, then '
                remedy += "`mlxrack-agent reload`, and swap to that name"
            raise Refused(
                f"swap {old} {new}: {new} is not configured (known: {known}); {remedy}", code="model_not_found"
            )
        return await self.swap_to(old, model, flipped=flipped)

    async def swap_to(
        self, old: str, model: Model, *, again: bool = False, flipped: Callable[[], None] = lambda: None
    ) -> SwapFinished:
        """Replace the files behind ``old`` with those of ``model``, configured or not; ``again`` even if only settings
        differ."""
        return await self._lifecycles.tasks.finish(self._swap(old, model, flipped, again=again))

    async def pin(self, name: str, *, pinned: bool) -> None:
        """A pinned model is evicted by order only."""
        self._slots.named(name).pinned = pinned

    def adopt(self, model: Model) -> None:
        """Serve a name that is not configured, or another model under a configured one that is not resident."""
        self._others[model.name] = model
        if self._slots.find(model.name) is None:
            self._slots.add(model)
        else:
            self._adopted(self._slots.named(model.name), model)

    def adopt_swapped(self, model: Model, names: Sequence[str]) -> None:
        """Serve other files under names of which the first is served and not resident; the others are taken from who
        has them, or given back. What ``swap`` finds under their names stays as it is."""
        slot = self._slots.named(names[0])
        if self._adopted(slot, model):
            self._slots.give_back(slot, {name: one for name, one in self._known().items() if name not in names})
            for name in names:
                self._slots.rename(slot, name)

    def _adopted(self, slot: Slot, model: Model) -> bool:
        if slot.loaded is not None or slot.life.claim:
            return False
        slot.model, slot.spec, slot.pinned = model, None, model.pinned
        self._lifecycles.feed(slot, "adopt")
        return True

    def configured(self, name: str, own: Model | None = None) -> None:
        """A name's model is that of the configuration again, if it has one; or its ``own``, with other files."""
        self._others.pop(name, None)
        if own is not None and own.name == name and (own.path != self._known().get(name, own).path):
            self._others[name] = own

    async def record_probes(self, name: str) -> tuple[Probe, ...]:
        """A model's probes with its current answers. Raises RackError."""
        slot = self._slots.named(name)
        if not slot.ready or slot.loaded is None:
            raise Retryable(f"model {name} is not ready on this node ({slot.life.state})", code="not_ready")
        loaded = slot.loaded
        loaded.process.in_flight += 1
        try:
            probes = loaded.spec.probes
            answers = [await answer_of(loaded.process, probe.prompt, probe.max_tokens) for probe in probes]
        finally:
            loaded.process.in_flight -= 1
        return tuple(
            Probe(prompt=probe.prompt, answer=one.text, max_tokens=probe.max_tokens)
            for probe, one in zip(probes, answers, strict=True)
        )

    async def _unclaimed(self, name: str) -> Slot:
        """The slot behind a name, as soon as no other order or load holds its claim."""
        while (slot := self._slots.named(name)).life.claim:
            await slot.changed.wait()
        return slot

    async def _load(self, name: str, *, ordered: bool) -> ModelSpec:
        while (slot := await self._unclaimed(name)).loaded is None:
            await self._lifecycles.load(slot, ordered=ordered)
        return slot.loaded.spec

    async def _unload(self, name: str) -> None:
        slot = await self._unclaimed(name)
        if slot.loaded is None:
            raise Refused(f"unload {name}: not resident ({slot.life.state})", code="conflict")
        await self._lifecycles.evict(slot, "ordered")

    async def _swap(self, old: str, model: Model, flipped: Callable[[], None], *, again: bool) -> SwapFinished:
        slot, other = self._slots.named(old), self._slots.find(model.name)
        if slot.life.claim:
            raise Refused(f"swap {old}: already loading, swapping or being evicted; see status", code="conflict")
        if other is not slot and other is not None and (other.loaded is not None or other.life.claim):
            raise Refused(f"swap {old}: {model.name} is itself resident or loading; unload it first", code="conflict")
        if not self._lifecycles.feed(slot, "claim"):
            raise Refused(f"swap {slot.name}: not resident ({slot.life.state}); load it first", code="conflict")
        if other is not None and other is not slot:
            self._lifecycles.feed(other, "reserve")
        try:
            flip = functools.partial(self._flipped, slot, old, model, flipped)
            return await self._performed(slot, model, flip, again=again)
        finally:
            for one in {slot, other} - {None}:
                assert one is not None
                self._lifecycles.feed(one, "release")

    def _flipped(self, slot: Slot, old: str, model: Model, flipped: Callable[[], None]) -> None:
        """A model that serves its own files again gives back the names that swaps had brought it."""
        if old == model.name == slot.name:
            self._slots.give_back(slot, self._known())
        flipped()

    async def _performed(self, slot: Slot, model: Model, flipped: Callable[[], None], *, again: bool) -> SwapFinished:
        spec = await self._lifecycles.describe(model)
        old = slot.loaded
        if old is not None and spec.version == old.spec.version and not again:
            raise Refused(f"swap {slot.name}: {model.name} is already the active version", code="conflict")
        cold = await self._planned(slot, spec, model.name)
        if old is None or slot.loaded is not old:
            raise Refused(f"swap {slot.name}: its loader has just exited; retry", code="conflict")
        limit_s, wall_ms = self._live.now.limits.request_s, self._wall_ms
        run = SwapRun(self._lifecycles, slot, spec, old, request_s=limit_s, wall_ms=wall_ms, flipped=flipped)
        self._swaps.append(run)
        finished = await run.run(cold=cold)
        self._emit(finished)
        return finished

    async def _planned(self, slot: Slot, spec: ModelSpec, new: str) -> bool:
        """Plan memory for the swap; True when it has to be cold. Raises Refused when that is impossible, too."""
        how, short = self._lifecycles.room.for_swap(slot, spec)
        if how == "hot":
            await self._lifecycles.room.make(spec, new, ordered=True)
            self._lifecycles.feed(slot, life.Planned(standby_bytes=spec.need_bytes))
            return False
        if not self._carried_by_peer(slot.name):
            raise Refused(f"swap {slot.name}: {short}, and no peer serves {slot.name} meanwhile", code="no_memory")
        held = slot.loaded.spec.need_bytes if slot.loaded else 0
        self._lifecycles.feed(slot, life.Planned(standby_bytes=max(0, spec.need_bytes - held)))
        return True
