"""A real agent keeps its machine awake from its start to its end."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.mac_stand_ins import put
from tests.rack import harness
from tests.rack.harness import model, rack, until

PROGRAM = """#!{python} -P
import sys
from agent import cli
from agent.process import awake
awake.of_this_machine = lambda: awake.Awake([{program!r}, *awake.COMMAND[1:]], delay_s=0.05)
sys.exit(cli.main())
"""


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_agent_holds_it_while_it_runs_and_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = put(tmp_path / "bin", "caffeinate") / "caffeinate"
    script = tmp_path / "agent"
    script.write_text(PROGRAM.format(python=sys.executable, program=str(program)))
    script.chmod(0o755)
    monkeypatch.setattr(harness, "SCRIPT", str(script))
    with rack(tmp_path, [model()]) as (agent,):
        until(lambda: agent.status()["awake"]["state"] == "held", "it is held")
        first = agent.status()["awake"]["pid"]
        os.kill(first, signal.SIGKILL)
        until(lambda: agent.status()["awake"]["starts"] == 2 and agent.status()["awake"]["pid"], "it is held again")
        second = agent.status()["awake"]["pid"]
        assert agent.status()["warnings"] == []
        (tmp_path / "bin/refuses").touch()
        os.kill(second, signal.SIGKILL)
        until(lambda: any("may go to sleep" in one for one in agent.status()["warnings"]), "the operator is told")
        (tmp_path / "bin/refuses").unlink()
        until(lambda: agent.status()["awake"]["pid"], "it is held once more")
        third = agent.status()["awake"]["pid"]
        assert agent.stop() == 0
        assert not lives(third), "a stopped agent lets go before it ends"
