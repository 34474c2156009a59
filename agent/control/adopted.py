"""What this node has adopted: the desired state, what came of it, and what an operator ordered here. Kept on disk, so
that a start without the bucket serves what was served."""

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared.desired import Assignment, DesiredState
from shared.durable import write_whole
from shared.errors import Retryable
from shared.logs import get_logger

log = get_logger("agent.control.adopted")


class _Kept(msgspec.Struct, kw_only=True, frozen=True):
    """``served`` are paths that were brought and proved, ``ordered`` what an operator's orders left: a path, or ""
    for unloaded; both by model."""

    desired: DesiredState | None = None
    served: dict[str, str] = {}
    ordered: dict[str, str] = {}


class Adopted:
    """Every change is on disk before it is in force; Retryable when the disk refuses it. For any thread."""

    def __init__(self, file: Path, node_id: str) -> None:
        self._file, self._node_id = file, node_id
        self._changing = threading.Lock()
        try:
            self._kept = msgspec.json.decode(file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            self._kept = _Kept()
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            log.warning("desired_not_read", reason=f"{file} is not used, the bucket is asked: {error}"[:500])
            self._kept = _Kept()

    @property
    def desired(self) -> DesiredState | None:
        """The newest generation; None before the first."""
        return self._kept.desired

    @property
    def served(self) -> dict[str, str]:
        """The path that was brought for each assigned model."""
        return self._kept.served

    @property
    def ordered(self) -> dict[str, str]:
        """What wins over the desired state until its next generation: a path by model, "" for an unloaded one."""
        return self._kept.ordered

    @property
    def follows(self) -> bool:
        """Whether the desired state says anything about this node."""
        return self.desired is not None and self._node_id in self.desired.nodes

    @property
    def assigned(self) -> Sequence[Assignment]:
        """What this node should serve."""
        return self.desired.nodes.get(self._node_id, ()) if self.desired is not None else ()

    def on_others(self, model: str) -> bool:
        """Whether another node should serve a model."""
        nodes = self.desired.nodes if self.desired is not None else {}
        return any(one.model == model for node, each in nodes.items() if node != self._node_id for one in each)

    def adopt(self, desired: DesiredState) -> None:
        """A newer generation; orders end with the one before."""
        with self._changing:
            self._keep(_Kept(desired=desired, served=self.served))

    def brought(self, model: str, path: str) -> None:
        """An assigned model is served from this path."""
        with self._changing:
            self._keep(msgspec.structs.replace(self._kept, served={**self.served, model: path}))

    def order(self, model: str, path: str, *, differs: bool) -> None:
        """An operator's order for a model, or that it is again what the desired state says."""
        with self._changing:
            others = {name: kept for name, kept in self.ordered.items() if name != model}
            self._keep(msgspec.structs.replace(self._kept, ordered={**others, model: path} if differs else others))

    def _keep(self, kept: _Kept) -> None:
        try:
            write_whole(self._file, msgspec.json.encode(kept))
        except OSError as error:
            why = f"desired state: {self._file} cannot be written ({error.strerror})"
            raise Retryable(why, code="disk_full") from None
        self._kept = kept
