"""psutil is one source of facts among others: real processes in whose place of it a package stands that fails in every
way, as psutil's virtual_memory() does on macOS 27."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.seaweed import free_port
from shared.batch import unseal
from shared.records import Hardware, HostSample
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.rack.harness import SCRIPT, Agent, end, model, rack, write_config
from tests.rack.test_doctor import doctor, of

RAISES = 'raise RuntimeError("host_statistics64(HOST_VM_INFO64) syscall failed: (ipc/mig) array not large enough")\n'
STAND_INS = {"it raises": f"def __getattr__(name):\n    {RAISES}", "it cannot be imported": RAISES}
FIELDS = """
import json
from agent.telemetry.sensors import Sensors
from agent.telemetry.sensors.host import boot_id, hardware, hardware_id
sensors = Sensors()
for _ in range(2):
    sum(range(10**7))
    read = [one.read() for one in sensors.all]
facts = [hardware().memory_bytes, hardware_id(), boot_id(), len(hardware().cores)]
print(json.dumps([sorted(name for one in read for name in one.fields), facts]))
"""
LOADS = """
import sys
from pathlib import Path
from agent.loader import blas
blas.install()
from agent.loader.mlx.model import TextModel
print(TextModel(Path(sys.argv[1]), limit_tok=64, default_max_tokens=8).vocabulary)
"""
BLIND = """
import sys
from agent.process import machine
machine.memory_bytes = lambda *args, **options: None
from agent.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that the test starts finds the one that raises."""
    monkeypatch.setenv("PYTHONPATH", stand_in(tmp_path, "it raises"))


def stand_in(folder: Path, how: str) -> str:
    package = folder / how / "psutil"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_INS[how])
    return str(package.parent)


def python(code: str, *argv: str, path: str = "") -> subprocess.Popen[str]:
    environ = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.mark.usefixtures("without")
def test_an_agent_serves_and_its_windows_are_whole(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        assert agent.chat().status == 200
        agent.admin("POST", "seal")
        agent.admin("POST", "seal")
        _, found, text = doctor(agent)
        assert "RuntimeError" not in text
        assert of(found, "memory")[0] == "ok"
        assert of(found, "source CPU and disk")[0] == "ok"
        assert of(found, "source meminfo")[0] == "ok"
        assert agent.stop() == 0
    bucket = DirectoryStore(tmp_path / "bucket")
    keys = [one.key for one in list_all(bucket, "raw/") if not one.key.endswith("/claim")]
    records = [r for key in keys for batch in unseal(bucket.get(key, 1 << 30).body) for r in batch.records]
    samples = [one for one in records if isinstance(one, HostSample)]
    assert samples[-1].memory_total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < (samples[-1].memory_used_bytes or 0) < samples[-1].memory_total_bytes
    assert samples[-1].disk_free_bytes
    assert {"cpu", "disk", "host", "memory", "power", "meminfo"}.isdisjoint(samples[-1].sources_failed)
    (hardware,) = {one for one in records if isinstance(one, Hardware)}
    assert hardware.memory_bytes == samples[-1].memory_total_bytes


def test_every_field_of_a_window_has_another_source(tmp_path: Path) -> None:
    """So none is lost: psutil alone gives nothing."""
    paths = ["", *(stand_in(tmp_path, how) for how in STAND_INS)]
    running = [python(FIELDS, path=path) for path in paths]
    whole, *others = [json.loads(said(one)) for one in running]
    assert {"cpu_ppm", "memory_total_bytes", "memory_used_bytes", "swap_total_bytes", "disk_free_bytes"} <= {*whole[0]}
    assert others == [whole, whole]


def test_a_loader_loads_its_model(tmp_path: Path, tiny_model: Path) -> None:
    assert int(said(python(LOADS, str(tiny_model), path=stand_in(tmp_path, "it raises")))) > 0


@pytest.mark.usefixtures("without")
def test_serve_serves_a_folder(tmp_path: Path, tiny_model: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'[node]\nid = "n1"\nrack = "r"\n[paths]\nstate = {json.dumps(str(tmp_path / "state"))}\n')
    command = [SCRIPT, "serve", str(tiny_model), "--config", str(config), "--port", str(free_port())]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = list[str]()
    try:
        assert serving.stdout is not None
        for line in serving.stdout:
            lines.append(line)
            if "Ctrl-C stops it" in line:
                serving.send_signal(signal.SIGINT)
        assert serving.wait(timeout=60) == 0, lines
        assert any("is ready after" in line for line in lines), lines
    finally:
        serving.kill()
        serving.wait()
        assert serving.stdout is not None
        serving.stdout.close()


class Blind(Agent):
    """An agent on a machine whose memory nothing tells."""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BLIND, *words, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_a_machine_whose_memory_nothing_tells_needs_a_configured_budget(tmp_path: Path) -> None:
    agent = Blind(tmp_path, "n1", free_port())
    write_config(agent, [], [model()])
    run = agent.run("run")
    assert run.returncode == 69
    assert "set memory.budget_bytes" in run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    checked = agent.run("check-config").stderr
    assert "1 problem\n  - memory.budget_bytes: neither" in checked, "and the model is not too large for nothing"
    write_config(agent, [], [model()], "[memory]\nbudget_bytes = 1000\n")
    command = [sys.executable, "-c", BLIND, "run", "--config", str(agent.config)]
    agent.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert agent.ready().chat().status == 200
        found = json.loads(agent.run("doctor", "--json").stdout)
        assert of(found, "memory") == ("ok", "0.0 GB for models (configured)")
    finally:
        end([agent])
