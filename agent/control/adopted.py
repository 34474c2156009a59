"""What this node has adopted: the desired state, what came of it, and what an operator ordered here. Kept in one file,
so that a start without the bucket serves what was served, and a generation and the orders that it ends change together.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.control.standing import Change, Order, Orders, Swapped, Switch, unreadable
from shared.desired import Assignment, DesiredState, unknown_field
from shared.durable import write_whole
from shared.errors import Retryable
from shared.logs import get_logger

SET_ASIDE = ".unreadable"
MOST_SAID = 300

log = get_logger("agent.control.adopted")
T = TypeVar("T")


class _Followed(msgspec.Struct, kw_only=True, frozen=True):
    """``served`` are paths that were brought and proved, by model."""

    desired: DesiredState | None = None
    served: dict[str, str] = {}


class Adopted:
    """A change of the desired state is on disk before it is in force; Retryable when the disk refuses it. An order has
    been carried out when it comes here: it is in force at once, and ``keep`` brings it to the disk. For any thread;
    orders are changed in one. With ``lasting`` unset, orders end with the process, and those in the file stay there.
    """

    def __init__(self, file: Path, node_id: str, *, lasting: bool = True) -> None:
        self._file, self._node_id, self._lasting = file, node_id, lasting
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._followed, self._unkept = _Followed(), ""
        self._orders: Orders = {}
        self._doubts: list[str] = []
        self._set_aside = False
        self._read()
        with contextlib.suppress(OSError), self._aside.open("rb"):
            self._set_aside = True
        self._in_file: Orders = self._orders
        if not lasting:
            self._orders = {}

    @property
    def desired(self) -> DesiredState | None:
        """The newest generation; None before the first."""
        return self._followed.desired

    @property
    def served(self) -> dict[str, str]:
        """The path that was brought for each assigned model."""
        return self._followed.served

    @property
    def orders(self) -> Orders:
        """What stands of an operator's orders until the desired state's next generation for this node."""
        return self._orders

    @property
    def follows(self) -> bool:
        """Whether the desired state says anything about this node."""
        return self.desired is not None and self._node_id in self.desired.nodes

    @property
    def assigned(self) -> Sequence[Assignment]:
        """What this node should serve."""
        return self.desired.nodes.get(self._node_id, ()) if self.desired is not None else ()

    @property
    def unkept(self) -> str:
        """Why the orders are not on disk; "" when they are."""
        return self._unkept

    def problems(self) -> list[str]:
        """What an operator must know of the file, a sentence each."""
        found = list(self._doubts)
        if self._set_aside:
            found.append(
                f"orders: not all that was ordered here is known, because {self._file.name} could not be read at a "
                f"start ({self._aside} is that file); give those orders again, then `mlxrack-agent orders clear "
                "--unreadable` ends this warning"
            )
        if self._unkept:
            found.append(f"orders: {self._unkept}; they are in force, and end with this process if that stays so")
        return found

    def on_others(self, model: str) -> bool:
        """Whether another node should serve a model."""
        nodes = self.desired.nodes if self.desired is not None else {}
        return any(one.model == model for node, each in nodes.items() if node != self._node_id for one in each)

    def adopt(self, desired: DesiredState) -> None:
        """A newer generation; orders end with it if it names this node. One that was given meanwhile stands."""
        before = self._orders
        ends = self._node_id in desired.nodes
        self._follow(msgspec.structs.replace(self._followed, desired=desired), ends=ends)
        with self._changing:
            if ends and self._orders is before:
                self._orders = {}
        if ends and before:
            log.info("orders_ended", models=sorted(before), generation=desired.generation)

    def brought(self, model: str, path: str) -> None:
        """An assigned model is served from this path."""
        served = {**self.served, model: path}
        self._follow(msgspec.structs.replace(self._followed, served=served))

    def change(self, change: Change) -> None:
        """An order was carried out, or has ended."""
        with self._changing:
            self._orders = change(self._orders)

    def keep(self) -> None:
        """Bring the orders to the disk; ``unkept`` says why they are not there. Blocks."""
        with self._writing:
            try:
                self._write(self._followed, self._to_keep)
            except OSError as error:
                why = f"{self._file} cannot be written ({error.strerror})"
                if why != self._unkept:
                    log.error("orders_not_kept", reason=why)
                self._unkept = why

    def forget_unreadable(self) -> None:
        """Remove the file that could not be read. Blocks."""
        self._set_aside = False
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)

    # ---- the file ----

    @property
    def _aside(self) -> Path:
        return self._file.with_name(self._file.name + SET_ASIDE)

    @property
    def _to_keep(self) -> Orders:
        return self._orders if self._lasting else self._in_file

    def _follow(self, followed: _Followed, *, ends: bool = False) -> None:
        """``ends``: with no orders."""
        with self._writing:
            try:
                self._write(followed, {} if ends else self._to_keep)
            except OSError as error:
                why = f"desired state: {self._file} cannot be written ({error.strerror})"
                raise Retryable(why, code="disk_full") from None
            self._followed = followed

    def _write(self, followed: _Followed, orders: Orders) -> None:
        write_whole(self._file, msgspec.json.encode({**msgspec.structs.asdict(followed), "orders": orders}))
        self._in_file, self._unkept = orders, ""

    def _read(self) -> None:
        try:
            raw = self._file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._doubts.append(f"orders: {self._file} cannot be read ({error.strerror}), so none is in force")
            log.warning("desired_not_read", reason=f"{self._file} is not used, the bucket is asked: {error}"[:500])
            return
        try:
            parts = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, RecursionError) as error:
            self._doubt("file", error)
            return
        self._followed = _Followed(
            desired=self._part(parts, "desired", DesiredState | None, None),
            served=self._part(parts, "served", dict[str, str], {}),
        )
        self._orders = {**self._older(parts), **self._orders_in(parts)}

    def _orders_in(self, parts: dict[str, msgspec.Raw]) -> Orders:
        found: dict[str, Order] = {}
        for name, one in self._part(parts, "orders", dict[str, msgspec.Raw], {}).items():
            order = self._part({name: one}, name, Order, Order())
            if why := unreadable(order):
                self._doubt(f"order for {name}", why)
            elif order != Order():
                found[name] = order
        return found

    def _older(self, parts: dict[str, msgspec.Raw]) -> Orders:
        """As 0.1 kept them: a path by model, "" for one that was unloaded."""
        found: dict[str, Order] = {}
        for name, path in self._part(parts, "ordered", dict[str, str], {}).items():
            swap = Swapped(table={"name": name, "path": path}, names=(name,)) if path else None
            found[name] = Order(swap=swap, resident=Switch(on=bool(path)))
        return found

    def _part(self, parts: dict[str, msgspec.Raw], name: str, kind: Any, default: Any) -> Any:
        """One part of the file; what a newer version added to it is said, and does not cost the rest."""
        if name not in parts:
            return default
        try:
            found = msgspec.json.decode(parts[name], type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            self._doubt(name, error)
            return default
        if kind is Order and (lost := unknown_field(msgspec.json.decode(parts[name]), msgspec.to_builtins(found))):
            self._doubts.append(f"orders: {name}: {lost} was ordered with another version and is not in force")
        return found

    def _doubt(self, what: str, why: object) -> None:
        """Not used. Where orders were in it the file is set aside, as it was, because it will be written again."""
        log.warning("desired_not_read", reason=f"{self._file}: its {what} is not used: {why}"[:MOST_SAID])
        if what not in ("desired", "served"):
            self._doubts.append(f"orders: in {self._file} the {what} cannot be read, and is not in force"[:MOST_SAID])
            with contextlib.suppress(OSError):
                os.link(self._file, self._aside)
