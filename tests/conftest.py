"""Fixtures for all tests: blocking calls in the event loop fail, and a tiny real model is provided."""

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings

from scripts.seaweed import SeaweedFS
from tests.tiny_model import write_tiny_model

# A test run starts some thousand processes. Where the environment forbids it, no bytecode is kept, and each of them
# compiles the whole product again, and each worker all tests: a quarter of a run's CPU time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# a crowded machine draws examples slowly, and that says nothing about the code
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with real racks first: they last longest, and one that begins last keeps the other workers waiting."""
    items.sort(key=lambda item: "rack" not in item.path.parts)


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A blocking call in agent code on the event loop raises."""
    if not inspect.iscoroutinefunction(request.function):
        yield None
        return
    with blockbuster_ctx("agent") as buster:
        # /proc is in memory: reading a process's size there does not block
        for function in ("io.BufferedReader.read", "os.read", "io.TextIOWrapper.read", "os.stat"):
            if function in buster.functions:
                buster.functions[function].can_block_in("agent/process/footprint.py", "footprint_bytes")
        for blocking in buster.functions.values():
            # their loops run in separate threads, for this reason
            blocking.can_block_in("agent/telemetry/meters/snmp_client.py", "_get")
            blocking.can_block_in("agent/telemetry/meters/kasa_client.py", {"_get", "_connect"})
            # one line into the page cache, and a new file an hour
            blocking.can_block_in("agent/audit/log.py", {"_append", "_opened"})
        yield buster


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight llama: 2 layers, 64 wide, byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server for the whole session."""
    node = {
        "name": "n1",
        "credentials": [{"accessKey": "n1", "secretKey": "n1secretn1secret"}],
        "actions": ["Write:scoped/raw/v1/node=n1/*", "Read:scoped/raw/v1/node=n1/*"],
    }
    with SeaweedFS(tmp_path_factory.mktemp("seaweed"), [node]) as server:
        yield server
