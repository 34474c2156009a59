"""botocore's description of S3, trimmed: the full service data take a dozen megabytes, of which a client that makes
eight calls needs one. What is kept is unchanged."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from botocore.loaders import Loader

OPERATIONS = (
    *("PutObject", "GetObject", "HeadObject", "DeleteObject", "ListObjectsV2", "CreateBucket"),
    *("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"),
)
"""Operations that shared/store_s3.py calls, and those of a multipart upload."""


class SmallLoader(Loader):
    """botocore's loader, which keeps only the data in use."""

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
    """A service description reduced to OPERATIONS and the shapes they reach, without documentation."""
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
    """Every partition with its regions, and S3 as the only service."""
    partitions = [
        {**one, "services": {name: value for name, value in one["services"].items() if name == "s3"}}
        for one in data["partitions"]
    ]
    return {**data, "partitions": partitions}


def _plain(found: Any) -> Any:
    """The same with empty documentation, which is more than half of the data."""
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
