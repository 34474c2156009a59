"""The GPU's recommended working set, queried in a child process; a machine without a GPU reports that."""

import os
import sys

import pytest

from agent.process.gpu import Device, ask, budget_bytes

SAYS = '{"device": "Apple M4", "memory_bytes": 17179869184, "recommended_bytes": 11453251584}'


async def test_mlx_reports_the_recommended_size() -> None:
    device = await ask(os.environ)
    assert device.reason == "" or "no GPU" in device.reason
    assert (device.recommended_bytes is None) == bool(device.reason)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"print('{SAYS}')", ""),
        ('print(\'{"device": "cpu"}\')', "no GPU reports"),
        ("raise SystemExit(3)", "MLX returned no device information (exit status 3)"),
        ("print('[1')", "MLX returned no device information (exit status 0)"),
    ],
)
async def test_the_agent_starts_whatever_the_probe_prints(script: str, reason: str) -> None:
    device = await ask(os.environ, (sys.executable, "-c", script))
    assert reason in device.reason
    assert bool(device.reason) == bool(reason)


async def test_a_failed_process_start_is_reported() -> None:
    assert "cannot start a process" in (await ask(os.environ, ("/no such program",))).reason


@pytest.mark.parametrize(("configured", "recommended", "expected"), [(5, 7, 5), (0, 7, 7), (0, None, 9), (5, None, 5)])
def test_configuration_overrides_the_recommendation(configured: int, recommended: int | None, expected: int) -> None:
    assert budget_bytes(configured, Device(recommended_bytes=recommended), 9)[0] == expected
