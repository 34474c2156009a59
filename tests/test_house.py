"""Rules of the repository: import contracts, names of code in design guides, package names."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import agent
import aggregator
import shared
from agent.config import AgentConfig
from aggregator.config import AggregatorConfig
from scripts import house
from scripts.document_config import document

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
GUIDES = ("agent/DESIGN.md", "aggregator/DESIGN.md")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [BIN / "lint-imports", "--no-logo", "--no-cache", "--config", folder / "pyproject.toml"]
    # -P is not enough: the copy must come before the editable install's path
    environ = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("agent", "aggregator", "shared", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


IMPURE = [
    ("agent/gateway/routing.py", "import time"),
    ("agent/gateway/routing.py", "import secrets"),
    ("agent/gateway/routing.py", "from shared.secrets import resolve"),
    ("agent/gateway/routing.py", "from shared.logs import get_logger"),
    ("agent/gateway/routing.py", "from agent.models.pool import Pool"),
    ("agent/models/swap.py", "import asyncio"),
    ("agent/models/swap.py", "import ctypes"),
    ("agent/models/swap.py", "import selectors"),
    ("agent/models/swap.py", "import tempfile"),
    ("agent/models/lifecycle.py", "def late() -> None:\n    import random"),
    ("agent/telemetry/sensors/reading.py", "import subprocess"),
    ("aggregator/cost.py", "import os"),
    ("aggregator/uptime.py", "import sqlite3"),
    ("shared/records.py", "import pathlib"),
    ("shared/bucket.py", "import boto3"),
]


def test_a_pure_module_s_import_outside_the_allow_list_is_found(copy: Path) -> None:
    for file, line in IMPURE:
        path = copy / file
        path.write_text(path.read_text() + f"\n{line}\n")
    run = lint(copy)
    assert run.returncode == 1
    assert "The core decides without touching the world BROKEN" in run.stdout
    for file, line in IMPURE:
        words = line.split()
        imported = words[words.index("import") + 1] if "from" not in words else words[1]
        assert f"{file.removesuffix('.py').replace('/', '.')} -> {imported} " in run.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("agent/models/pool.py", "import mlx.core", "MLX is imported by the engine alone"),
        ("agent/telemetry/sensors/host.py", "def late() -> None:\n    import psutil", "psutil is asked in one place"),
        ("agent/daemon.py", "import agent.loader.mlx.engine", "The daemon process never loads the engine"),
        (
            "agent/gateway/analysis.py",
            "import kingfisher_sdk",
            "The secret scanner is loaded by the analyzer's process alone",
        ),
        ("agent/loader/serve.py", "import agent.config", "The loader knows frames only"),
        ("agent/telemetry/spool.py", "import agent.gateway.call", "Layers of the agent"),
        ("agent/mesh/peers.py", "import agent.models.swap", "Layers of the agent"),
        ("aggregator/window.py", "import aggregator.load", "Layers of the aggregator"),
        ("shared/ids.py", "import agent.config", "Two programs, one vocabulary"),
        ("aggregator/load.py", "import aiohttp", "The aggregator needs nothing of the agent's"),
        ("agent/cli.py", "import reportlab", "The agent needs nothing of the aggregator's"),
    ],
)
def test_a_planted_import_breaks_its_contract(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    path.write_text(path.read_text() + f"\n{line}\n")
    run = lint(copy)
    assert run.returncode == 1, run.stdout + run.stderr
    broken = {text.split(" BROKEN")[0] for text in run.stdout.splitlines() if " BROKEN" in text}
    assert contract in broken


def test_a_new_package_needs_a_layer(copy: Path) -> None:
    (copy / "agent/parlour.py").write_text("")
    run = lint(copy)
    assert run.returncode == 1
    assert "Layers of the agent BROKEN" in run.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("agent/gateway/routing.py", "datetime.now()"),
        ("agent/gateway/routing.py", "datetime.datetime.now(datetime.UTC)"),
        ("agent/models/swap.py", "date.today()"),
        ("aggregator/uptime.py", "dt.datetime.utcnow()"),
        ("aggregator/cost.py", "open('/etc/hosts')"),
        ("shared/keys.py", "__import__('time').time()"),
    ],
)
def test_a_planted_call_is_found(copy: Path, file: str, line: str) -> None:
    assert house.planted(copy) == []
    path = copy / file
    path.write_text(path.read_text() + f"\n\ndef late() -> object:\n    return {line}\n")
    (found,) = house.planted(copy)
    assert found.startswith(f"{file}:")


WALLS = [
    ("agent/egress/failures.py", "import genai_prices", "The agent needs nothing of the aggregator's"),
    ("agent/egress/exchange.py", "import agent.wire.frames", "What leaves is made by redaction alone"),
    ("agent/egress/providers.py", "import agent.models.pool", "What leaves is made by redaction alone"),
    ("agent/gateway/dispatch.py", "import aiohttp", "HTTP clients are walled in"),
    ("agent/egress/providers.py", "from aiohttp import ClientSession", "HTTP clients are walled in"),
    ("agent/policy/rules.py", "def late() -> None:\n    import urllib3", "HTTP clients are walled in"),
    ("agent/telemetry/pusher.py", "import httpx2", "HTTP clients are walled in"),
    ("agent/egress/exchange.py", "import openai", "No provider's own client"),
    ("agent/loader/serve.py", "import google.genai", "No provider's own client"),
]


def test_a_planted_hole_in_the_wall_breaks_its_contract(copy: Path) -> None:
    for file, line, _ in WALLS:
        path = copy / file
        path.write_text(path.read_text() + f"\n{line}\n")
    run = lint(copy)
    assert run.returncode == 1, run.stdout + run.stderr
    for file, line, contract in WALLS:
        words, module = line.split(), file.removesuffix(".py").replace("/", ".")
        imported = words[1] if words[0] == "from" else words[words.index("import") + 1]
        assert f"{contract} BROKEN" in run.stdout
        named = imported if imported.startswith("agent.") else imported.partition(".")[0]
        assert f"{module} -> {named} " in run.stdout


WAYS_OUT = [
    ("agent/gateway/dispatch.py", "import http.client"),
    ("agent/gateway/attempt.py", "from http import client"),
    ("agent/models/pool.py", "from urllib.request import urlopen"),
    ("agent/policy/redaction/redacted.py", "def late() -> None:\n    import socket"),
    ("agent/daemon.py", "import smtplib"),
    ("agent/telemetry/pusher.py", "async def late() -> None:\n    await asyncio.open_connection('x', 1)"),
    ("agent/gateway/routing.py", 'URL = "https://api.openai.com/v1"'),
    ("aggregator/cost.py", 'URL = "https://API.Anthropic.com"'),
    ("shared/ids.py", 'HOST = "openrouter.ai"'),
    ("agent/api/chat.py", "def late() -> str:\n    return f'https://ollama.com/{1}'"),
]


def test_a_planted_way_out_is_found(copy: Path) -> None:
    assert house.outbound(copy) == []
    for file, line in WAYS_OUT:
        path = copy / file
        path.write_text(path.read_text() + f"\n\n{line}\n")
    found = house.outbound(copy)
    assert sorted(one.partition(":")[0] for one in found) == sorted(file for file, _ in WAYS_OUT)


@pytest.mark.parametrize(
    "line",
    [
        "from agent.policy.redaction.redacted import _SEAL",
        "from agent.policy.redaction import redacted\nSEAL = redacted._SEAL",
        "from agent.policy.redaction import redacted\nSEAL = getattr(redacted, '_SEAL')",
        "from agent.policy.redaction import Redacted\nMADE = Redacted(None)",
        "from agent.policy.redaction import Redacted as R\nMADE = R(None)",
        "from agent.policy import redaction\nMADE = redaction.Redacted(None)",
        "from agent.policy.redaction import Redacted\nMADE = object.__new__(Redacted)",
        "from agent.policy.redaction import Redacted\nMADE = Redacted.__new__(Redacted)",
        "from agent.policy.redaction import Redacted\nclass Mine(Redacted):\n    pass",
        "from typing import cast\nfrom agent.policy.redaction import Redacted\nMADE = cast(Redacted, None)",
    ],
)
def test_a_redacted_made_outside_its_package_is_found(copy: Path, line: str) -> None:
    assert house.unsealed(copy) == []
    path = copy / "agent/gateway/dispatch.py"
    path.write_text(path.read_text() + f"\n\n{line}\n")
    assert any(one.startswith("agent/gateway/dispatch.py:") for one in house.unsealed(copy))


@pytest.mark.parametrize(
    "line",
    [
        *(
            "from kingfisher_sdk import Validator",
            "from kingfisher_sdk import Revoker",
            "from kingfisher_sdk import _native",
        ),
        *(
            "import kingfisher_sdk.validation",
            "import kingfisher_sdk\nX = kingfisher_sdk.Validator()",
            "import kingfisher_sdk.git",
        ),
        "from kingfisher_sdk.revocation import Revoker",
    ],
)
def test_what_the_secret_scanner_can_do_over_a_network_is_banned(copy: Path, line: str) -> None:
    path = copy / "agent/gateway/analyzer.py"
    path.write_text(path.read_text() + f"\n\n{line}\n")
    command: list[str | Path] = [
        BIN / "ruff",
        "check",
        "--no-cache",
        "--select",
        "TID251",
        "--config",
        copy / "pyproject.toml",
        path,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "TID251" in run.stdout
    assert "TID251" in (copy / "pyproject.toml").read_text().split("select = [")[1].split("]")[0]


def test_the_contracts_hold(copy: Path) -> None:
    run = lint(copy)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def test_the_structure_keeps_its_limits() -> None:
    assert [row for row in house.measures(ROOT) if not row.ok] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_every_name_in_a_design_guide_exists(guide: str) -> None:
    """Design guides refer to code as `path/file.py` or `path/file.py:name`."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = re.findall(r"`((?:agent|aggregator|shared|scripts|tests|launchd|docs)/[\w./-]+\.\w+)(?::([\w.]+))?`", text)
    assert len(named) > 20
    for path, name in named:
        file = ROOT / path
        assert file.is_file(), path
        if name:
            last = name.split(".")[-1]
            source = file.read_text(encoding="utf-8")
            assert re.search(rf"^\s*(?:async )?(?:def|class) {last}\b|^{last}\b", source, re.MULTILINE), (
                f"{path}:{name}"
            )


def test_import_names_are_this_repository() -> None:
    for package in (agent, aggregator, shared):
        assert Path(package.__file__ or "").is_relative_to(ROOT)
    owners = packages_distributions()
    for name in ("agent", "aggregator", "shared"):
        assert set(owners.get(name, ["mlxrack"])) <= {"mlxrack"}, f"another distribution owns the name {name}"


def test_the_configuration_reference_is_up_to_date() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for kind in (AgentConfig, AggregatorConfig):
        assert document(kind) in text, "run `make docs`"


def test_the_changelog_has_the_current_version() -> None:
    assert shared.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_contain_no_index_url() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    assert all(
        re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+]+(; sys_platform == '\w+')?(  # [a-z, ]+)?", line) for line in lines
    )
    assert "mlx-lm==0.32.2  # agent" in lines
