"""Meters that answer are waited for: how long one may be silent is the subject of tests that set it."""

import pytest


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time enough for stand-ins on a crowded machine."""
    monkeypatch.setattr("agent.telemetry.meters.rack.TIMEOUT_S", 120.0)
    monkeypatch.setattr("agent.telemetry.meters.rack.SECRET_S", 60.0)
