"""What botocore has to know of S3 and no more: its descriptions of a service fill a dozen megabytes, of which a client
that makes eight calls needs one. Nothing is changed in what is kept."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from botocore.loaders import Loader

OPERATIONS = (
    "PutObject",
    "GetObject",
    "HeadObject",
    "DeleteObject",
    "ListObjectsV2",
    "CreateBucket",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
)
"""What shared/store_s3.py calls, and what uploading a file in parts does."""


class SmallLoader(Loader):
    """Loads as botocore does, and keeps what is used of it."""

    _cache: dict[object, Any]

    def load_service_model(self, service_name: str, type_name: str, api_version: str | None = None) -> Any:
        found = super().load_service_model(service_name, type_name, api_version)
        self._cache.clear()
        return trimmed_model(found) if (service_name, type_name) == ("s3", "service-2") else found

    def load_data_with_path(self, name: str) -> Any:
        data, path = super().load_data_with_path(name)
        self._cache.clear()
        return (trimmed_endpoints(data) if name == "endpoints" else data), path


def trimmed_model(model: dict[str, Any]) -> dict[str, Any]:
    """A service's description with these operations, the shapes that they reach and no documentation."""
    operations = {name: _plain(one) for name, one in model["operations"].items() if name in OPERATIONS}
    shapes: dict[str, Any] = {}
    todo = deque(_shapes_in(operations))
    while todo:
        name = todo.popleft()
        if name not in shapes:
            shapes[name] = _plain(model["shapes"][name])
            todo.extend(_shapes_in(shapes[name]))
    return {
        **_plain({k: v for k, v in model.items() if k not in ("operations", "shapes")}),
        "operations": operations,
        "shapes": shapes,
    }


def trimmed_endpoints(data: dict[str, Any]) -> dict[str, Any]:
    """Every partition with its regions, and S3 as its only service."""
    partitions = [
        {**one, "services": {name: value for name, value in one["services"].items() if name == "s3"}}
        for one in data["partitions"]
    ]
    return {**data, "partitions": partitions}


def _plain(found: Any) -> Any:
    """With its documentation, which is more than half of it, empty."""
    if isinstance(found, dict):
        texts = {"documentation"} if isinstance(found.get("documentation"), str) else set()
        return {key: "" if key in texts else _plain(value) for key, value in found.items()}
    return [_plain(one) for one in found] if isinstance(found, list) else found


def _shapes_in(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "shape" and isinstance(value, str):
                yield value
            else:
                yield from _shapes_in(value)
    elif isinstance(found, list):
        for one in found:
            yield from _shapes_in(one)
