"""MLX's device information; printed as one line of JSON by a short-lived process."""

import json
import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx


def runtime() -> str:
    """What the times of a model's steps depend on beside the model."""
    return f"{_name(dict(mx.device_info()))}, {platform.platform()}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"


def main() -> int:
    """``recommended_bytes`` is the recommended limit for all models together; null where no GPU reports one."""
    told: dict[str, Any] = dict(mx.device_info())
    print(
        json.dumps(
            {
                "device": _name(told),
                "memory_bytes": told.get("memory_size"),
                "recommended_bytes": told.get("max_recommended_working_set_size"),
            }
        )
    )
    return 0


def _name(told: dict[str, Any]) -> str:
    return str(told.get("device_name", told.get("architecture", "")))
