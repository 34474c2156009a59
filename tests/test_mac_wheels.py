"""The check of wheels for a Mac: a wheel that is missing is told from an index that cannot be asked."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import mac_wheels
from tests.mac_wheels import Outcome

CONSTRAINTS = """# a comment
alpha==1.0  # base
beta==2.0  # agent, aggregator
mlx==3.0  # agent
mlx-metal==3.0; sys_platform == 'darwin'  # agent
mlx-cpu==3.0; sys_platform == 'linux'  # agent
old==1.0; python_version < '3.13'  # store
tool==9.0
"""
ALL = ("agent", "aggregator", "store")


def report(*wheels: tuple[str, str, Sequence[str]]) -> dict[str, Any]:
    return {"install": [{"metadata": {"name": n, "version": v, "requires_dist": r}} for n, v, r in wheels]}


def test_the_pins_of_a_mac_are_those_of_its_markers_and_not_of_this_machine_s() -> None:
    found = mac_wheels.pins(CONSTRAINTS, ALL, "3.11")
    assert found == {"alpha": "1.0", "beta": "2.0", "mlx": "3.0", "mlx-metal": "3.0", "old": "1.0"}
    assert "old" not in mac_wheels.pins(CONSTRAINTS, ALL, "3.13")
    assert mac_wheels.pins(CONSTRAINTS, (), "3.13") == {"alpha": "1.0"}


@pytest.mark.parametrize(
    ("requires", "words"),
    [
        (["alpha>=1"], []),
        (["alpha>=1; extra == 'more'", "gone; sys_platform == 'linux'", "gone; python_version < '3.11'"], []),
        (["gone>=1; platform_machine == 'arm64' and sys_platform == 'darwin'"], ["needs gone there"]),
        (["Alpha>=1.1"], ["needs Alpha>=1.1, and 1.0 is pinned"]),
    ],
)
def test_what_only_a_mac_needs_has_to_be_pinned(requires: list[str], words: list[str]) -> None:
    pinned = {"alpha": "1.0", "mlx": "3.0"}
    found = list(mac_wheels.judged(report(("alpha", "1.0", ()), ("MLX", "3.0", requires)), pinned, "3.11"))
    assert [word in one for one, word in zip(found, words, strict=True)] == [True] * len(words)
    assert "pip has left it out" in next(mac_wheels.judged(report(("alpha", "1.0", ())), pinned, "3.11"))


@pytest.mark.parametrize(
    ("text", "problem", "silent"),
    [
        ("ERROR: No matching distribution found for a==1", "a==1: no wheel for macosx_14_0_arm64", ""),
        ("ERROR: something else", "ERROR: something else", ""),
        ("", "pip said nothing", ""),
        (
            "WARNING: Retrying after 'Failed to establish'\nERROR: No matching distribution found for a",
            "",
            "Failed to establish",
        ),
        ("ERROR: HTTP error 503\nERROR: 503 Server Error: busy for url: x\nERROR: No matching ...", "", "503"),
        ("ERROR: 403 Client Error: Forbidden\nERROR: No matching distribution found for a==1", "", "403"),
        (
            "WARNING: Location 'x' is ignored\nERROR: 404 Client Error: Not Found",
            "ERROR: 404 Client Error: Not Found",
            "",
        ),
    ],
)
def test_an_index_that_is_away_says_nothing_of_wheels(text: str, problem: str, silent: str) -> None:
    found = mac_wheels.said("3.11", text)
    assert list(found.problems) == ([problem] if problem else [])
    assert silent in found.silent
    assert bool(found.silent) is bool(silent)


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([Outcome("3.11", 5), Outcome("3.12", 5)], 0),
        ([Outcome("3.11", 5), Outcome("3.12", silent="away")], os.EX_TEMPFAIL),
        ([Outcome("3.11", silent="away"), Outcome("3.12", problems=["a: no wheel"])], 1),
    ],
)
def test_nothing_passes_in_silence(outcomes: list[Outcome], status: int) -> None:
    lines, found = mac_wheels.verdict(outcomes)
    assert (found, len(lines)) == (status, len(outcomes))


def wheel(folder: Path, name: str, tag: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as made:
        made.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        made.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n")
        made.writestr(f"{info}/RECORD", "")


def test_pip_itself_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    wheel(tmp_path, "pure", "py3-none-any")
    wheel(tmp_path, "metal", "cp314-cp314-macosx_14_0_arm64")
    wheel(tmp_path, "newer", "cp314-cp314-macosx_15_0_arm64")
    here = ["--no-index", "--find-links", str(tmp_path)]
    both = {"pure": "1.0", "metal": "1.0"}
    assert mac_wheels.ask("3.14", both, here) == Outcome("3.14", 2, [])
    missing = mac_wheels.ask("3.14", {**both, "newer": "1.0"}, here)
    assert missing.problems == ["newer==1.0: no wheel for macosx_14_0_arm64"]
    dead = ["--index-url", "http://127.0.0.1:9/simple", "--timeout", "2"]
    away = mac_wheels.ask("3.14", both, dead)
    assert (away.silent != "", away.problems) == (True, ())


def test_the_project_offers_more_than_the_base() -> None:
    assert {"agent", "aggregator"} <= set(mac_wheels.extras())
    assert "dev" not in mac_wheels.extras()
