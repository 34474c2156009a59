"""One client's request on its way through the wall: what was decided, and what came of it. Plain data."""

from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

from agent.policy.deciding import Decision, Place
from agent.policy.facts import Facts
from agent.policy.rules import Rules
from agent.wire.frames import Tokens
from agent.wire.priority import NEUTRAL, Priority

Left = Literal["", "no_replica", "full", "waited", "always"]
"""Why a request was answered elsewhere: no node serves the model, the rack refused it or failed at it, it had waited
too long for its first token, or the policy sends it there at once; "" where it was not."""


class Passage(msgspec.Struct, kw_only=True):
    """``rules`` are those that it was decided by, whatever is put in force meanwhile. ``model`` is the served name that
    answers on the rack. A ``private`` one is SENSITIVE. ``settled``: a part of the answer, or a sign of life, has gone
    to the client, so it stays where it is. ``at`` is the place that answers it. Of a SENSITIVE one ``said`` are the
    answers by part, of each of which ``told`` is awaited when it is complete. ``calls`` are its parts, of
    agent.gateway.call."""

    request_id: str
    t_ms: int
    began_s: float
    stream: bool
    facts: Facts
    rules: Rules
    decision: Decision
    places: tuple[Place, ...] = ()
    model: str = ""
    priority: Priority = NEUTRAL
    settled: bool = False
    at: Place | None = None
    left: Left = ""
    checked: bool = False
    redacted: Mapping[str, int] = {}
    usd: Decimal | None = None
    said: dict[int, list[Tokens]] = msgspec.field(default_factory=dict)
    told: Callable[[int], Awaitable[None]] | None = None
    reservation: Any = None
    calls: list[Any] = msgspec.field(default_factory=list)
    code: str = ""

    @property
    def private(self) -> bool:
        """Whether it is SENSITIVE."""
        return bool(self.facts.sensitive)

    @property
    def elsewhere(self) -> tuple[Place, ...]:
        """Places that are not the rack, in order."""
        return tuple(one for one in self.places if one.category != "rack")
