"""One served model on this node: what stands behind its names now, and how it is doing. The pool changes it."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import NamedTuple

import psutil

from agent.config import Model
from agent.frames import Answer, Ask, Reported
from agent.loader_process import LoaderProcess
from agent.modelstore import ModelSpec
from shared.records import EngineWindow


class Loaded(NamedTuple):
    """What answers: the files and the process that holds them."""

    name: str
    spec: ModelSpec
    process: LoaderProcess
    since_s: float


class Slot:
    """One served model on this node, under one or more names."""

    def __init__(self, model: Model) -> None:
        self.names = [model.name]
        self.model = model
        self.loaded: Loaded | None = None
        self.spec: ModelSpec | None = None
        self.state = "cold"
        self.reason = ""
        self.in_rotation = True
        self.restarts = 0
        self.last_exit = ""
        self.crashes: deque[float] = deque()
        self.last_used_s = 0.0
        self.requests: deque[float] = deque()
        self.pinned = model.pinned
        self.standby_bytes = 0
        self.died_starting = False
        self.changing = asyncio.Lock()
        self.changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a request may be leased now."""
        return self.loaded is not None and self.in_rotation and self.loaded.process.usable

    @property
    def leases(self) -> int:
        """Requests that use the loader."""
        return self.loaded.process.in_flight if self.loaded else 0

    @property
    def occupied_bytes(self) -> int:
        """Planned bytes of what is in memory or on its way there."""
        held = self.spec.need_bytes if self.spec and (self.loaded or self.state in ("starting", "draining")) else 0
        return held + self.standby_bytes

    def become(self, state: str, reason: str = "") -> None:
        """Note the state for people and wake whoever waits for it."""
        self.state, self.reason = state, reason
        self.changed.set()
        self.changed = asyncio.Event()


class Lease:
    """The right to use one loader for one request."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.version = loaded.spec.version

    def generate(self, request: Ask) -> AsyncGenerator[Answer, None]:
        """Answers to the request; see LoaderProcess.generate."""
        return self._loaded.process.generate(request)


def window_of(model: str, version: str, reported: Reported) -> EngineWindow:
    """A loader's report as the record of a window; the fields are the same."""
    counts = {name: getattr(reported, name) for name in Reported.__struct_fields__}
    return EngineWindow(model=model, version=version, **counts)


def footprint_bytes(pid: int) -> int | None:
    """Resident bytes of a process as the system counts them; None when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None
