"""What `mlxrack-agent run` says while its models are loaded: the URL once one of them answers, or why none does."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

POLL_S = 0.5
SAY_AGAIN_S = (10.0, 30.0, 60.0)
"""Into a load its progress is said, and from then on as often as the last one."""


class Said:
    """Decides what is said next. ``base`` is the URL for clients, which with ``keys`` need one; ``preloaded`` are the
    models that are to be loaded at the start. Touches no clock."""

    def __init__(self, base: str, preloaded: Collection[str], *, keys: bool) -> None:
        self._base, self._preloaded, self._keys = base, preloaded, keys
        self._told: dict[str, str] = {}
        self._announced = False

    def next(self, status: Mapping[str, Any], seconds: float) -> tuple[list[str], bool]:
        """Lines for what has changed after ``seconds``, and whether there is nothing more to wait for."""
        models: Sequence[Mapping[str, Any]] = status["models"]
        pending = [self._pending(model) for model in models]
        lines = [line for model in models for line in self._of(model, seconds)]
        answering = [model["names"][0] for model in models if model["state"] == "ready"]
        if answering and not self._announced:
            lines += self._url(f"{answering[0]} answers")
        elif not any(pending) and not self._announced:
            lines += self._without_models(status)
        return lines, not any(pending)

    def _pending(self, model: Mapping[str, Any]) -> bool:
        """Whether a model is on its way into memory, or has not been seen to be."""
        name = model["names"][0]
        fresh = model["state"] == "cold" and not model["reason"] and name in self._preloaded and name not in self._told
        return fresh or model["state"] == "starting"

    def _of(self, model: Mapping[str, Any], seconds: float) -> list[str]:
        name, state = model["names"][0], model["state"]
        reason = model["reason"].removeprefix(f"model {name}: ")
        if state == "starting":
            step, why = _step(seconds), f" again ({reason})" if reason else ""
            text, said = f"{name}: loading{why} ..." + (f" {seconds:.0f} s" if step else ""), f"{step}{why}"
        elif state == "ready":
            text, said = f"{name}: ready after {seconds:.1f} s", "ready"
        elif reason:
            text = said = f"{name}: {state}: {reason}"
        elif self._pending(model):
            return []
        else:
            text = said = f"{name}: is loaded at its first request"
        if self._told.get(name) == said:
            return []
        self._told[name] = said
        return [text]

    def _url(self, why: str) -> list[str]:
        self._announced = True
        open_to = "" if self._keys else "; there are no [[keys]], so clients on this machine alone may connect"
        return [f"URL: {self._base} ({why}{open_to})"]

    def _without_models(self, status: Mapping[str, Any]) -> list[str]:
        """What is said where nothing is being loaded and nothing answers."""
        models = status["models"]
        if any(model["state"] == "cold" and not model["reason"] for model in models):
            return self._url("models are loaded at their first request")
        if not models and status["peers"]:
            return self._url("no models here; requests are forwarded to the peers")
        self._announced = True
        if not models:
            remedy = "add [[models]] to the configuration, or try one: `mlxrack-agent serve MODEL`"
            return [f"no model answers: neither models nor peers are configured; {remedy}"]
        elsewhere = "; requests are forwarded to peers that have it" if status["peers"] else ""
        return [f"no model answers here{elsewhere}: see the reasons above, and `mlxrack-agent doctor`"]


def _step(seconds: float) -> int:
    """How often progress has been due by now."""
    passed = sum(seconds >= at for at in SAY_AGAIN_S)
    return passed + int(max(0.0, seconds - SAY_AGAIN_S[-1]) // SAY_AGAIN_S[-1])


async def watch(look: Callable[[], Mapping[str, Any]], said: Said, say: Callable[[str], None]) -> None:
    """Say what ``said`` decides until no model is being loaded any more. ``look`` returns the agent's status."""
    began, done = time.monotonic(), False
    while not done:
        lines, done = said.next(look(), time.monotonic() - began)
        for line in lines:
            say(line)
        await asyncio.sleep(POLL_S)
