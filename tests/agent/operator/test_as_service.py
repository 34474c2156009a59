"""`doctor --as-service`: what the user of the service can do, seen by a process that is that user."""

import json
import os
import plistlib
import pwd
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import cli
from agent.config import AgentConfig
from agent.operator import as_service, install
from agent.operator.checks import Finding
from shared import config as shared_config

SECRET = "a secret of the rack, 61f0c2b7e9"
NOBODY = pwd.getpwnam("nobody")
CONFIG = """
[node]
id = "n1"
rack = "r"
[listen]
port = 0
[paths]
state = "{0}/state"
[peers]
secret = "file:{0}/rack.secret"
nodes = [{{ id = "n2", url = "http://127.0.0.1:15001" }}]
[store]
kind = "s3"
endpoint = "http://127.0.0.1:15002"
bucket = "rack"
access_key = "env:MLXRACK_ACCESS"
secret_key = "file:{0}/mine.secret"
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
Run = Callable[..., tuple[int, dict[str, tuple[str, str]], str]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that every user can enter, with a configuration; one of its secrets is its owner's alone."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o011)
    (tmp_path / "agent.toml").write_text(CONFIG.format(tmp_path))
    for name in ("rack.secret", "mine.secret"):
        (tmp_path / name).write_text(f"{SECRET} {name}\n")
        (tmp_path / name).chmod(0o600)
    return tmp_path


@pytest.fixture
def doctor(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*more: str) -> tuple[int, dict[str, tuple[str, str]], str]:
        status = cli.main(["doctor", "--as-service", *more, "--json", "--config", str(place / "agent.toml")])
        out, err = capsys.readouterr()
        found = [Finding(**one) for one in json.loads(out)]
        assert SECRET not in out + err
        return status, {one.what: (one.verdict, one.seen) for one in found}, out

    return run


def test_each_secret_has_a_verdict_in_the_service_s_environment(
    doctor: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXRACK_ACCESS", SECRET)  # this shell has it, and launchd gives it to nobody
    me = pwd.getpwuid(os.getuid()).pw_name
    status, found, _ = doctor(me)
    assert status == 1
    assert found["secret peers.secret"] == ("ok", f"file:{place}/rack.secret can be used")
    assert found["secret store.secret_key"][0] == "ok"
    verdict, seen = found["secret store.access_key"]
    assert (verdict, "launchd gives a service HOME and PATH alone; use file:, keychain: or op://" in seen) == (
        "problem",
        True,
    )
    assert found["configuration"] == ("ok", f"{me} can read it")
    (place / "agent.toml").write_text(CONFIG.format(place).replace("env:MLXRACK_ACCESS", f"file:{place}/mine.secret"))
    assert doctor(me)[0] == 0


def test_the_installed_service_says_who_and_with_what(
    doctor: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    plist = place / "service.plist"
    variables = {"HOME": str(place), "PATH": "/usr/bin:/bin", "MLXRACK_ACCESS": SECRET}
    plist.write_bytes(plistlib.dumps({"UserName": me, "EnvironmentVariables": variables}))
    monkeypatch.setattr(install, "DAEMON_PLIST", plist)
    status, found, _ = doctor()
    assert (status, found["secret store.access_key"][0]) == (0, "ok")
    assert found["service"] == ("ok", f"looked at as user {me}, with HOME, MLXRACK_ACCESS, PATH (as {plist} says)")


def test_a_configuration_that_cannot_be_used_is_a_finding(doctor: Run, place: Path) -> None:
    (place / "agent.toml").write_text('[node]\nid = "n1"\n')
    status, found, _ = doctor(pwd.getpwuid(os.getuid()).pw_name)
    assert (status, found["configuration"][0]) == (1, "problem")
    assert "agent.toml: 1 problem - node.rack: " in found["configuration"][1]


@needs_root
def test_the_child_is_the_user_with_nothing_of_this_shell(
    doctor: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = place / "python"
    program.write_text(
        "#!/bin/sh\n"
        """printf '[{"what":"id","verdict":"ok","seen":"%s"},' "$(id -u):$(id -g):$(id -G):$(pwd):$(umask)"\n"""
        """printf '{"what":"env","verdict":"ok","seen":"%s"},' "$(env | cut -d= -f1 | sort | tr '\\n' ' ')"\n"""
        f"""printf '{{"what":"cat","verdict":"ok","seen":"%s"}}]' "$(cat {place}/mine.secret > /dev/null; echo $?)"\n"""
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    _, found, _ = doctor("nobody")
    uid, gid = NOBODY.pw_uid, NOBODY.pw_gid
    assert found["id"][1].startswith(f"{uid}:{gid}:{gid}:/:")
    assert set(found["env"][1].split()) - {"_", "SHLVL", "OLDPWD"} == {"HOME", "PATH", "PWD"}
    assert found["cat"][1] != "0", "the other user's secret stays closed"


@needs_root
def test_another_user_cannot_read_what_is_not_its_own(place: Path) -> None:
    """The same, without a new program: whether this Python may be run by others is not what is tested."""
    config = shared_config.load(place / "agent.toml", AgentConfig, lambda _: ())
    os.chown(place / "rack.secret", NOBODY.pw_uid, NOBODY.pw_gid)
    state = place / "state"
    list(as_service.in_place(config, state, state / "logs"))  # what it imports must be there before
    (place / "state").mkdir(mode=0o700, exist_ok=True)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY.pw_gid)
            os.setuid(NOBODY.pw_uid)
            found = [one._asdict() for one in as_service.in_place(config, state, state / "logs")]
            os.write(writer, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        seen = {one["what"]: one for one in json.load(pipe)}
    os.waitpid(child, 0)
    assert seen["secret peers.secret"]["verdict"] == "ok"
    assert seen["secret store.secret_key"]["verdict"] == "problem"
    assert "cannot be read (Permission denied)" in seen["secret store.secret_key"]["seen"]
    assert seen["folder paths.state"]["verdict"] == "problem"
    assert seen["configuration"]["seen"] == "nobody can read it"


@needs_root
def test_a_program_that_the_user_may_not_run_is_said(doctor: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr(sys, "executable", str(closed / "python"))
    (closed / "python").touch(0o755)
    _, found, _ = doctor("nobody")
    assert (found["program"][0], "may not run" in found["program"][1]) == ("problem", True)


def test_who_is_not_root_is_told_to_use_sudo(doctor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    status, found, _ = doctor("root")
    assert (status, list(found)) == (1, ["service"])
    assert (
        "only root can look as root: run `sudo mlxrack-agent doctor --as-service root --config " in found["service"][1]
    )


def test_a_user_that_does_not_exist_is_said(doctor: Run) -> None:
    _, found, _ = doctor("nobody-of-this-name")
    assert (found["service"][0], "does not exist; create it" in found["service"][1]) == ("problem", True)


def test_a_child_that_ends_badly_or_never_is_said(doctor: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    program = place / "python"
    program.write_text("#!/bin/sh\necho 'ImportError: no module' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert "ends with: ImportError: no module" in doctor(me)[1]["configuration"][1]
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(as_service, "LIMIT_S", 0.3)
    assert "not answered within" in doctor(me)[1]["secrets"][1]


@pytest.mark.parametrize("said", ["[]", "{}", "3", "null", '[{"what": 1}]', ""])
def test_a_child_that_says_nothing_is_no_good_news(
    doctor: Run, place: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    program = place / "python"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    status, found, _ = doctor(pwd.getpwuid(os.getuid()).pw_name)
    assert (status, found["configuration"][0]) == (1, "problem")


def test_a_property_list_of_another_shape_is_no_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plist = place / "service.plist"
    plist.write_bytes(plistlib.dumps({"UserName": "root", "EnvironmentVariables": ["x"]}))
    monkeypatch.setattr(install, "DAEMON_PLIST", plist)
    found = as_service.service()
    assert not isinstance(found, str)
    assert set(found.environ) == {"HOME", "PATH"}
