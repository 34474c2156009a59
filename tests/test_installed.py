"""The wheel in new virtual environments, far from the repository, as an operator installs it. Slow, and it downloads:
set MLXRACK_WALK."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif("MLXRACK_WALK" not in os.environ, reason="downloads packages; set MLXRACK_WALK")
ROOT = Path(__file__).parent.parent


class Installed:
    """A virtual environment, and a folder to be in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)

    def run(self, *command: str, status: int | None = 0) -> str:
        """A command of the environment; what it says. It ends with ``status``, unless that is None."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLXRACK"))}
        program = str(self.bin / command[0]) if "/" not in command[0] else command[0]
        run = subprocess.run(
            [program, *command[1:]],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            env={**environ, "XDG_STATE_HOME": str(self.folder / "state"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        assert status is None or run.returncode == status, (
            command,
            run.returncode,
            run.stdout[-2000:],
            run.stderr[-2000:],
        )
        assert "Traceback" not in run.stderr
        return run.stdout + run.stderr

    def shell(self, line: str) -> str:
        """A line as it would be typed or pasted."""
        return self.run("/bin/sh", "-c", line)

    def versions(self) -> dict[str, str]:
        """What is installed."""
        lines = self.run("pip", "freeze", "--all").splitlines()
        return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.split(r"==|[; ]", line.lower().replace("_", "-"))[:2] for line in lines)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("first", "second", "program", "verbs"),
    [
        ("aggregator", "agent", "mlxrack-agent", (("doctor",), ("run",), ("status",), ("serve", "org/x"))),
        ("agent", "aggregator", "mlxrack-aggregator", (("rollup",), ("weekly",), ("alert",))),
    ],
)
def test_one_extra_then_the_line_that_the_other_program_prints(
    wheel: Path, tmp_path: Path, first: str, second: str, program: str, verbs: tuple[tuple[str, ...], ...]
) -> None:
    began = time.monotonic()
    here = Installed(tmp_path / "somewhere else")
    here.run("pip", "install", "--quiet", f"{wheel}[{first}]")
    print(f"pip install [{first}]: {time.monotonic() - began:.0f} s")
    (here.folder / "aggregator.toml").write_text('rack = "r"\n[store]\npath = "bucket"\n')
    (here.folder / "agent.toml").write_text('[node]\nid = "n1"\nrack = "r"\n')
    line = ""
    for verb in verbs:
        said = here.run(program, *verb, status=os.EX_UNAVAILABLE)
        assert said.count("\n") == 1, said
        line = said.strip().rpartition("needs it: ")[2]
        assert line.endswith(f"-m pip install 'mlxrack[{second}]'")
    module = program.removeprefix("mlxrack-")
    said = here.run("python", "-P", "-m", module, *verbs[0], status=os.EX_UNAVAILABLE)
    assert said.strip().endswith(f"-m pip install 'mlxrack[{second}]'")
    began = time.monotonic()
    here.shell(line)
    print(f"the printed line: {time.monotonic() - began:.0f} s")
    differing = {name: version for name, version in here.versions().items() if pinned().get(name, version) != version}
    assert differing == {}
    here.run("mlxrack-aggregator", "rollup")
    assert "blas" in here.run("mlxrack-agent", "doctor", status=None).lower()
    for one in ("mlxrack-agent", "mlxrack-aggregator"):
        assert "Reach the machine." in here.run(one, "help", "node-down")
        assert here.run(one, "help", "aggregator.cron") == (ROOT / "scripts/aggregator.cron").read_text()
        assert "node-down" in here.run(one, "help")
    paths = '[paths]\nstate = "/usr/local/var/mlxrack"\nlogs = "/usr/local/var/log/mlxrack"\n'
    (here.folder / "agent.toml").write_text(f'[node]\nid = "n1"\nrack = "r"\n{paths}')
    assert "dev.mlxrack.agent" in here.run("mlxrack-agent", "install", "--dry-run")
    said = here.run("mlxrack-agent", "store", "serve", "--folder", "s", "--port", "31990", status=os.EX_UNAVAILABLE)
    assert "-m pip install 'mlxrack[store]'" in said or (here.bin / "weed").exists()
