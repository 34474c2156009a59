"""How a request that ended counts, and whose doing it was if it was not answered. Pure.

Whoever is down or full answers nothing, so availability would be measured by the survivors alone if refusals had no
reason: what the rack could not serve counts against it, what the client has to change does not.
"""

from typing import Literal, NamedTuple

from agent.wire.frames import CRASHED, SUSPECT
from shared.errors import RackError, Refused

Outcome = Literal["ok", "cancelled", "failed", "refused"]
Reason = Literal["", "capacity", "limit", "request"]
"""Why a request was not served: nothing could serve it; its key's own limit; its own fault. "" where it was begun."""


class Ended(NamedTuple):
    """The labels of a request's end."""

    outcome: Outcome
    reason: Reason = ""


OK, CANCELLED, FAILED = Ended("ok"), Ended("cancelled"), Ended("failed")
TURNED_AWAY, LIMITED, AT_FAULT = Ended("refused", "capacity"), Ended("refused", "limit"), Ended("refused", "request")
NO_NODE = Ended("failed", "capacity")
"""It was admitted, and no node could take it."""

BY_CODE: dict[str, Ended] = {
    **dict.fromkeys(("draining", "queue_full", "bodies_full", "connections_full"), TURNED_AWAY),
    **dict.fromkeys(("key_queue_full", "key_bodies_full"), LIMITED),
    **dict.fromkeys(("no_capacity", "memory_pressure", "not_ready"), NO_NODE),
    **dict.fromkeys(("worker_lost", "loader_lost", "engine_failed", "deadline_exceeded", CRASHED, SUSPECT), FAILED),
    "analysis_failed": FAILED,
    "loop": TURNED_AWAY,  # refused by a node whose peers.nodes is wrong
}
"""Every code with which a request ends that its client need not change; tests/agent/gateway/test_outcomes.py finds
those of the code that are missing here."""


def ended(error: RackError) -> Ended:
    """How a request counts that ended with this error."""
    return BY_CODE.get(error.code, AT_FAULT if isinstance(error, Refused) else FAILED)
