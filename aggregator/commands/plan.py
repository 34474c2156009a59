"""The initial placement from an intake and an inventory, before there is any telemetry."""

from pathlib import Path

from aggregator import intake
from aggregator.placement import PlacementReport
from shared.errors import Refused
from shared.model_shape import Tensor, header_bytes, parse_shape, read_header, weight_bytes


def run(intake_path: Path, inventory_path: Path) -> PlacementReport:
    """Read both files and the models they reference. Raises Refused with the reason."""
    asked = intake.parse(_read(intake_path), intake.Intake, intake_path.name)
    there = intake.parse(_read(inventory_path), intake.Inventory, inventory_path.name)
    measured = {m.name: _measured(intake_path.parent / m.path) for m in asked.models if m.path}
    return intake.propose(asked, there, measured)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"read {path}: {error.strerror}") from None


def _measured(folder: Path) -> intake.Measured:
    """Shape and weight bytes of a model folder, from config.json and the safetensors headers."""
    tensors: list[Tensor] = []
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise Refused(f"{folder}: no model*.safetensors found; expected the folder of an MLX model")
    for path in files:
        with path.open("rb") as file:
            size = header_bytes(file.read(8), path.stat().st_size)
            tensors += read_header(file.read(size))
    shape = parse_shape(_read(folder / "config.json"), tensors)
    return shape, weight_bytes(tensors, shape)
