"""MLX's device information; printed as one line of JSON by a short-lived process."""

import json
from typing import Any

import mlx.core as mx


def main() -> int:
    """``recommended_bytes`` is the recommended limit for all models together; null where no GPU reports one."""
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
