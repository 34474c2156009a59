"""What is in force on this node and why, for the status and for whoever changes what an order governs."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.control import standing
from agent.control.adopted import Adopted
from agent.control.standing import Base, Order, Start
from agent.models.pool import Pool
from shared.errors import Refused


class InForce:
    """A read-only view. ``bases`` says what holds without orders; ``lost`` why a model is not served as it was ordered,
    and ``changed`` in what its files differ from those that were ordered, both by model."""

    def __init__(self, pool: Pool, adopted: Adopted, bases: Callable[[], Sequence[Base]], *, lasting: bool) -> None:
        self._pool, self._adopted, self.bases, self._lasting = pool, adopted, bases, lasting
        self.lost: dict[str, str] = {}
        self.changed: dict[str, str] = {}

    def starts(self) -> tuple[Start, ...]:
        """What a start would serve now."""
        return standing.starts(self.bases(), self._adopted.orders, self.lost)

    def loaded_first(self) -> tuple[str, ...]:
        """Models that a start loads before all others, in this order."""
        return standing.loaded_first(self.starts())

    def start(self, name: str) -> Start | None:
        """That of one model, by its own name."""
        return next((one for one in self.starts() if one.names[0] == name), None)

    def serving(self, name: str) -> Start | None:
        """That of the model that answers to a name, which may be another one's; None where nothing configures it."""
        return next((one for one in self.starts() if name in one.names), None)

    def base(self, name: str) -> Base | None:
        """What holds for one model without orders."""
        return next((one for one in self.bases() if one.model.name == name), None)

    def own_name(self, name: str) -> str:
        """The own name of the model that answers to a name; the name itself if there is none."""
        with contextlib.suppress(Refused):
            return self._pool.inventory.served(name).names[0]
        return name

    def governs(self, name: str) -> bool:
        """Whether an order stands for a name, or for the model that has taken it over."""
        ordered = (start.names for start in self.starts() if start.order != Order())
        return name in self._adopted.orders or any(name in names for names in ordered)

    def warnings(self) -> list[str]:
        """What an operator must know of the file in which orders are kept."""
        return self._adopted.problems()

    def lasting(self, name: str) -> str:
        """How long what was just ordered for a name holds, and how to undo it."""
        key = self.own_name(name)
        if key not in self._adopted.orders:
            base, start = self.base(key), self.start(key)
            later = self._at_next_start(start) if start is not None else ""
            says = f"this is what {base.says if base else standing.AGENT_TOML} says, so no order stands for {key}"
            return f"no order stands for {key}, which {later}" if later else says
        if not self._lasting:
            return "until this process ends"
        if self._adopted.unkept:
            return f"NOT KEPT over a restart: {self._adopted.unkept}; it is tried again until it is"
        until = f"a newer generation of the desired state or `mlxrack-agent orders clear {key}`"
        return f"lasts over restarts, until {until}"

    def origins(self) -> dict[str, dict[str, str]]:
        """Where what is served comes from, by the model's own name: ``by`` (order, desired, agent.toml), and ``text``,
        a sentence that also says what the next start would serve instead."""
        return {start.names[0]: {"by": _by(start), "text": self._origin(start)} for start in self.starts()}

    def _origin(self, start: Start) -> str:
        changed = self.changed.get(start.names[0], "")
        return "; ".join(one for one in (standing.origin(start), changed, self._at_next_start(start)) if one)

    def _at_next_start(self, start: Start) -> str:
        """What the next start serves, if that is not what is served now; "" if it is."""
        with contextlib.suppress(Refused):
            now, then = self._pool.inventory.served(start.names[0]).model, start.model
            if now.path != then.path:
                files = (now.name, then.name) if now.name != then.name else (now.path, then.path)
                return f"serves {files[0]} now, and {files[1]} from the next start on"
        return ""

    def listed(self) -> list[dict[str, Any]]:
        """Every order that stands, for display."""
        bases, orders = self.bases(), self._adopted.orders
        waits = standing.waiting(bases, orders)
        known = {base.model.name: base for base in bases}
        return [
            {
                "model": name,
                "ordered": standing.words(order),
                "orders": msgspec.to_builtins(order),
                "instead": standing.instead(order, known[name]) if name in known else "",
                "note": waits.get(name) or self.lost.get(name) or self.changed.get(name, ""),
            }
            for name, order in orders.items()
        ]


def _by(start: Start) -> str:
    if start.order != Order():
        return "order"
    return standing.AGENT_TOML if start.base.says == standing.AGENT_TOML else "desired"
