"""The kept part of botocore's service descriptions is complete for the store's calls."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from botocore.loaders import Loader

from shared import store_s3
from shared.botocore_data import OPERATIONS, SmallLoader


def references(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "shape" and isinstance(value, str):
                yield value
            else:
                yield from references(value)
    elif isinstance(found, list):
        for one in found:
            yield from references(one)


def test_every_referenced_shape_exists_unchanged() -> None:
    whole, small = Loader().load_service_model("s3", "service-2"), SmallLoader().load_service_model("s3", "service-2")
    assert set(small["operations"]) == set(OPERATIONS)
    assert set(references(small)) == set(small["shapes"])
    assert small["metadata"] == whole["metadata"]
    assert len(small["shapes"]) < len(whole["shapes"]) / 2
    members = whole["shapes"]["PutObjectRequest"]["members"]
    assert small["shapes"]["PutObjectRequest"]["members"].keys() == members.keys()
    assert small["shapes"]["PutObjectRequest"]["members"]["Body"]["documentation"] == ""


def test_all_regions_and_only_the_s3_service_are_kept() -> None:
    whole, small = Loader().load_data("endpoints"), SmallLoader().load_data("endpoints")
    for before, after in zip(whole["partitions"], small["partitions"], strict=True):
        assert before["regions"] == after["regions"]
        assert set(after["services"]) <= {"s3"}


def test_every_call_of_the_store_is_among_the_operations() -> None:
    source = inspect.getsource(store_s3)
    called = set(re.findall(r"self\._client\.([a-z0-9_]+)\(", source)) - {"upload_fileobj"}
    words = {"".join(part.capitalize() for part in name.split("_")) for name in called}
    assert words <= set(OPERATIONS), words
