"""What MLX says of the machine's GPU; printed as one line of JSON by a short-lived process of its own."""

import json
from typing import Any

import mlx.core as mx


def main() -> int:
    """``recommended_bytes`` is what all models together should not exceed; null where there is no GPU that says so."""
    told: dict[str, Any] = dict(mx.device_info())
    print(
        json.dumps(
            {
                "device": str(told.get("device_name", told.get("architecture", ""))),
                "memory_bytes": told.get("memory_size"),
                "recommended_bytes": told.get("max_recommended_working_set_size"),
            }
        )
    )
    return 0
