"""The audit log of a real agent: on by default, its commands, a folder that is deleted under it, a SIGKILL."""

import json
import shutil
import subprocess
from pathlib import Path

from shared import keys
from shared.batch import unseal
from shared.records import AuditFailing, AuditRecovered
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.rack.harness import SCRIPT, Agent, model, rack, until


def command(agent: Agent, *args: str) -> subprocess.CompletedProcess[str]:
    whole = [SCRIPT, "audit", *args, "--config", str(agent.config)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)


def events(agent: Agent) -> list[object]:
    store = DirectoryStore(agent.folder / "bucket")
    segments = [
        store.get(one.key, 1 << 24).body for one in list_all(store, keys.RAW_PREFIX) if one.key.endswith(".mpz")
    ]
    records = [record for body in segments for batch in unseal(body) for record in batch.records]
    return [record for record in records if isinstance(record, AuditFailing | AuditRecovered)]


def test_an_agent_keeps_an_audit_log_over_a_sigkill_and_a_deleted_folder(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        folder = agent.state / "audit"
        until(lambda: agent.status()["audit"]["synced_seq"] == 1, "the first line is synced")
        agent.kill()
        agent.start()
        until(lambda: agent.status()["audit"]["synced_seq"] == 2, "it goes on")
        sealed = command(agent, "seal", "--json")
        assert json.loads(sealed.stdout)["shipped"]["seq"] == 1, sealed.stderr
        assert command(agent, "verify", "--bucket").returncode == 0
        assert b"mlxrack_audit_ok 1.0" in agent.get("/metrics").body
        assert "audit: ok, 2 lines, 1 of them in the bucket" in command(agent).stdout

        shutil.rmtree(folder)
        until(lambda: len(events(agent)) == 2, "it is told and begun again")
        assert [type(one) for one in events(agent)] == [AuditFailing, AuditRecovered]
        assert agent.chat().status == 200
        assert agent.status()["audit"]["problem"] == ""
        told = command(agent, "verify")
        assert told.returncode == 1
        assert "missing" in told.stdout
        assert agent.stop() == 0
        assert command(agent, "verify").returncode == 1, "without the agent, too"
