"""check-config and doctor as an operator runs them: everything that can be known without starting is said at once."""

import json
import os
import plistlib
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from agent import cli
from agent.mesh.peers import Heartbeat
from agent.operator import checks, install, resolved
from agent.operator.checks import Secret
from shared import config as shared_config

BASE = '[node]\nid = "n1"\nrack = "r"\n[listen]\nport = 0\n[paths]\nstate = "{0}/state"\n'
SECRET = "a secret of the rack, 61f0c2b7e9"
PEERS = '[peers]\nsecret = "{1}"\nnodes = [{{ id = "n2", url = "{0}" }}]\n[store]\npath = "/tmp"\n'


class Said(NamedTuple):
    """What a command printed."""

    status: int
    out: str
    err: str


Check = Callable[..., Said]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(more: str = "", *verb: str, base: str = BASE) -> Said:
        path = tmp_path / "agent.toml"
        path.write_text(base.format(tmp_path) + more)
        capsys.readouterr()
        status = cli.main([*(verb or ("check-config",)), "--config", str(path)])
        return Said(status, *capsys.readouterr())

    return run


def secret_file(folder: Path, mode: int = 0o600, text: str = SECRET) -> str:
    path = folder / "rack.secret"
    path.write_text(text + "\n")
    path.chmod(mode)
    return f"file:{path}"


def model(path: str, more: str = "") -> str:
    return f'[[models]]\nname = "m"\npath = "{path}"\n{more}'


@pytest.mark.parametrize(
    ("more", "key", "words"),
    [
        (model("/no/such/folder"), "models[0].path", "no such folder"),
        (model("mlx-community/Qwen3-8B-4bit"), "models[0].path", "models pull mlx-community/Qwen3-8B-4bit"),
        (model("https://huggingface.co/org/m"), "models[0].path", "models pull org/m"),
        (model("store:nothing"), "models[0].path", "nothing named nothing is in the store"),
        (model("EMPTY"), "models[0].path", "no .safetensors file"),
        (model("/etc/passwd"), "models[0].path", "is a file"),
        (model("x", 'engine = "fake"\nprobes = "/no/probes"\n'), "models[0].probes", "cannot be read"),
        (model("x", 'engine = "fake"\nneed_bytes = 900000000000000\n'), "models[0].path", "it can never be loaded"),
        (PEERS.format("http://mini-2:8470/v1", "env:UNSET_X"), "peers.nodes[0].url", "without /v1"),
        (PEERS.format("http://mini-2:8470/v1/", "env:UNSET_X"), "peers.nodes[0].url", "without /v1"),
        (PEERS.format("http://mini-2:8470?x=1", "env:UNSET_X"), "peers.nodes[0].url", "is not the address of a node"),
        (PEERS.format("http://", "env:UNSET_X"), "peers.nodes[0].url", "is not the address of a node"),
        (PEERS.format("http://127.0.0.1:0x", "env:UNSET_X"), "peers.nodes[0].url", "is not the address of a node"),
        (PEERS.format("http://mini-2:8470", "env:UNSET_X"), "peers.secret", "the environment variable is not set"),
        (PEERS.format("http://mini-2:8470", "file:/no/file"), "peers.secret", "cannot be read"),
        ('[disk_cache]\nsecret = "env:UNSET_X"\n', "disk_cache.secret", "the environment variable is not set"),
        (
            '[[meters]]\nname = "p"\nkind = "shelly"\nat = "http://10.0.0.9"\nnodes = ["n1"]\nsecret = "env:UNSET_X"\n',
            "meters[0].secret",
            "the environment variable is not set",
        ),
        ('[store]\nprefix = "x"\n', "store.path", "or remove [store]"),
        (
            '[store]\nendpoint = "http://127.0.0.1:1"\nbucket = "rack"\n',
            "store.kind",
            "must be 's3' for store.endpoint",
        ),
        ('[model_store]\npath = "/dev/null/models"\n', "model_store.path", "is a file"),
        ('[tls]\ncertificate = "/no/c.pem"\nkey = "/no/k.pem"\n', "tls", "/no/c.pem"),
    ],
)
def test_what_can_be_known_without_starting_is_said(
    check: Check, tmp_path: Path, more: str, key: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    said = check(more.replace("EMPTY", str(tmp_path / "empty")))
    lines = [line for line in said.err.splitlines() if line.startswith(f"  - {key}:")]
    assert (said.status, any(words in line for line in lines)) == (os.EX_CONFIG, True), said.err
    assert "Traceback" not in said.err


def test_problems_of_the_file_hide_none_of_the_machine_s(check: Check, tmp_path: Path) -> None:
    """A typing error, a literal secret and a wrong hash, beside a folder that does not exist and a secret for all."""
    secret = secret_file(tmp_path, 0o644)
    said = check(
        f'[lissen]\nport = 1\n[disk_cache]\nsecret = "{secret}"\n[peers]\nsecret = "plain"\n'
        f'[[keys]]\nid = "web shop"\nsha256 = "zz"\n{model("/no/such/folder")}[telemetry]\nsample_s = "often"\n'
    )
    assert said.status == os.EX_CONFIG
    for words in (
        "lissen: unknown key; did you mean 'listen'?",
        "peers.secret: is a literal value",
        "keys[0].id 'web shop'",
        "keys[0].sha256: must be a SHA-256",
        "telemetry.sample_s: expected float",
        f"disk_cache.secret: {secret}: the file is writable or readable by group or others; chmod 600",
        "models[0].path: no such folder",
    ):
        assert words in said.err, said.err
    assert SECRET not in said.err


def test_a_value_that_cannot_be_read_is_judged_once(check: Check) -> None:
    said = check('[[models]]\nname = "m"\nengine = "mxl"\n[[models]]\nname = "n"\npath = 7\n')
    assert said.err.count("models[1].path") == 1
    assert "models[0].path" not in said.err


def test_the_state_folder_is_looked_at_and_not_made(check: Check, tmp_path: Path) -> None:
    assert check().status == 0
    assert not (tmp_path / "state").exists()
    (tmp_path / "state").write_text("a file")
    said = check()
    assert (said.status, "is a file, so" in said.err) == (os.EX_CONFIG, True)
    (tmp_path / "state").unlink()
    (tmp_path / "state").symlink_to("/no/where")
    assert "link that leads nowhere" in check().err


def test_a_state_folder_of_another_node_is_named(check: Check, tmp_path: Path) -> None:
    (tmp_path / "state/spool").mkdir(parents=True)
    identity = {"spool_id": "x", "node": "n7", "rack": "r", "hardware": "h"}
    (tmp_path / "state/spool/identity.json").write_text(json.dumps(identity))
    assert "that of node 'n7' of rack 'r'" in check().err


def test_an_address_that_this_machine_does_not_have(check: Check) -> None:
    host = '[node]\nid = "n1"\nrack = "r"\n[paths]\nstate = "{0}/s"\n[listen]\nport = 0\nhost = "192.0.2.7"\n'
    more = "insecure_http = true\n[[keys]]\nid = 'k'\nsha256 = '" + "0" * 64 + "'\n"
    assert "listen.host: this machine has no address 192.0.2.7" in check(more, base=host).err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = check(base=BASE.replace("port = 0", f"port = {port}"))
    assert (said.status, f"another program listens at 127.0.0.1:{port}" in said.out) == (0, True)


def test_models_that_take_turns_are_a_warning(check: Check) -> None:
    fake = 'engine = "fake"\nneed_bytes = 9000000000\n'
    two = f'[[models]]\nname = "a"\n{fake}[[models]]\nname = "b"\n{fake}[memory]\nbudget_bytes = 10000000000\n'
    said = check(two)
    assert said.status == 0
    assert "warning: memory: a, b need 18.0 GB together" in said.out


def test_a_real_model_s_memory_is_compared(check: Check, tiny_model: Path) -> None:
    said = check(model(str(tiny_model), "[memory]\nbudget_bytes = 1000\n"))
    assert (said.status, "it can never be loaded, not even for one short request" in said.err) == (os.EX_CONFIG, True)
    assert check(model(str(tiny_model))).status == 0


def test_a_certificate_that_does_not_fit_its_node(check: Check, tmp_path: Path) -> None:
    assert check("", "tls", "init").status == 0
    assert check("", "tls", "issue", "n9").status == 0
    folder = tmp_path / "state/tls"
    files = f'[tls]\ncertificate = "{folder}/n9.pem"\nkey = "{folder}/n9.key"\nca = "{folder}/ca.pem"\n'
    said = check(files)
    assert (said.status, "n9" in said.err, "cannot be used between nodes" in said.err) == (os.EX_CONFIG, True, True)


def test_a_service_s_environment_counts_and_not_the_shell_s(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = PEERS.format("http://127.0.0.1:1", "env:RACK_X")
    monkeypatch.setenv("RACK_X", SECRET)
    assert check(more).status == 0
    plist = tmp_path / "service.plist"
    plist.write_bytes(plistlib.dumps({"EnvironmentVariables": {"HOME": "/h"}}))
    monkeypatch.setattr(install, "DAEMON_PLIST", plist)
    said = check(more)
    assert (said.status, f"(as seen by the installed service ({plist}))" in said.err) == (os.EX_CONFIG, True)
    monkeypatch.delenv("RACK_X")
    plist.write_bytes(plistlib.dumps({"EnvironmentVariables": {"RACK_X": SECRET}}))
    assert check(more).status == 0
    plist.write_bytes(b"not a property list")
    assert "(as seen by this shell)" in check(more).err


def test_a_keychain_is_asked_by_doctor_alone(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(resolved, "resolve", lambda reference, _: asked.append(reference) or SECRET)  # type: ignore[func-returns-value]
    more = PEERS.format("http://127.0.0.1:1", "keychain:rack")
    assert check(more).status == 0
    assert asked == []
    looking = resolved.Resolver({}, "this shell", may_ask=True)
    assert looking.problem(Secret("peers.secret", "keychain:rack", strong=True)) == ("", "this shell")
    assert asked == ["keychain:rack"]


def test_values_of_secrets_are_never_shown(check: Check, tmp_path: Path) -> None:
    for text in ("hunter2hunter2", "x" * 40, SECRET):
        reference = secret_file(tmp_path, stat.S_IRUSR, text)
        said = check(PEERS.format("http://127.0.0.1:1", reference))
        assert text not in said.out + said.err


@pytest.mark.parametrize("name", ["web shop ü", "", "a/b", "x" * 64, ".x", "é"])
def test_no_name_is_made_that_the_configuration_refuses(check: Check, name: str) -> None:
    verbs = (
        ("new-key", name),
        ("new-key", "ok", f"--cache-group={name or ' '}"),
        ("tls", "issue", name),
        ("tls", "init", f"--rack={name or ' '}"),
    )
    for verb in verbs:
        said = check("", *verb)
        assert (said.status, "use 1 to 63 letters" in said.err, said.out) == (1, True, ""), verb


def test_a_configuration_is_found_where_the_machine_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The current folder's first, then the machine's; for both programs."""
    from aggregator import cli as aggregator_cli

    machine, here = tmp_path / "etc", tmp_path / "here"
    machine.mkdir()
    here.mkdir()
    monkeypatch.setattr(shared_config, "FOLDER", machine)
    monkeypatch.chdir(here)
    monkeypatch.delenv(cli.CONFIG_VARIABLE, raising=False)
    monkeypatch.delenv(aggregator_cli.CONFIG_VARIABLE, raising=False)
    assert cli.main(["check-config"]) == os.EX_CONFIG
    assert f"agent.toml: 1 problem\n  - no such file, nor {machine / 'agent.toml'}" in capsys.readouterr().err
    (machine / "agent.toml").write_text(BASE.format(tmp_path))
    assert cli.main(["check-config"]) == 0
    assert capsys.readouterr().out.startswith(f"{machine / 'agent.toml'}: valid")
    (here / "agent.toml").write_text(BASE.format(tmp_path).replace('"n1"', '"n2"'))
    assert cli.main(["check-config"]) == 0
    assert "node n2" in capsys.readouterr().out
    assert aggregator_cli.main(["check-config"]) == os.EX_CONFIG
    assert str(machine / "aggregator.toml") in capsys.readouterr().err
    (machine / "aggregator.toml").write_text(f'rack = "r"\n[store]\npath = "{tmp_path}"\n')
    assert aggregator_cli.main(["check-config"]) == 0
    assert cli.main(["check-config", "--config", "other.toml"]) == os.EX_CONFIG
    assert "other.toml" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["check-config"], ["status"], ["run"]])
def test_help_says_where_the_configuration_is_looked_for(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*verb, "--help"])
    assert "/usr/local/etc/mlxrack/agent.toml" in "".join(capsys.readouterr().out.split("\n")).replace(" ", "")


def test_install_warns_of_a_secret_that_no_service_can_have(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RACK_X", SECRET)
    base = BASE.replace("state = ", f'logs = "{tmp_path}/log"\nstate = ')
    said = check(PEERS.format("http://127.0.0.1:1", "env:RACK_X"), "install", "--dry-run", base=base)
    assert (said.status, SECRET in said.out + said.err) == (0, False)
    assert "warning: env:RACK_X: launchd gives a service HOME and PATH alone; use file:" in said.err
    said = check(PEERS.format("http://127.0.0.1:1", secret_file(tmp_path)), "install", "--dry-run", base=base)
    assert (said.status, said.err) == (0, "")


def test_check_config_and_doctor_read_the_policy_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, policy = tmp_path / "agent.toml", tmp_path / "policy.toml"
    path.write_text(
        f'[node]\nid = "n1"\nrack = "r"\n[listen]\nport = 0\n[paths]\nstate = "{tmp_path / "s"}"\n'
        f'[policy]\npath = "{policy}"\n[[keys]]\nid = "web"\nsha256 = "{"0" * 64}"\n'
    )
    policy.write_text('version = ""\n[[keys]]\nid = "web"\nexpires = "soon"\n')
    assert cli.main(["check-config", "--config", str(path)]) == os.EX_CONFIG
    said = capsys.readouterr().err
    assert "policy.path: " in said
    assert "keys[0].expires: must be a day" in said
    assert "version: must be a name" in said
    policy.write_text('[[providers]]\nname = "p"\nkind = "openai"\nsecret = "file:/nowhere/key"\n')
    assert cli.main(["check-config", "--config", str(path)]) == os.EX_CONFIG
    assert "policy.providers[0].secret: file:/nowhere/key" in capsys.readouterr().err
    policy.write_text('version = "v1"\n[[keys]]\nid = "other"\n')
    assert cli.main(["check-config", "--config", str(path)]) == 0
    assert "agent.toml has no [[keys]] with the id 'other'" in capsys.readouterr().out.replace("\n  ", " ")


def test_peers_that_decide_by_another_policy_are_a_warning() -> None:
    def heard(policy: str) -> checks.PeerFact:
        return checks.PeerFact("n2", "http://n2", Heartbeat(node="n2", rack="r", policy=policy))

    assert list(checks.policies("aa", [heard("aa"), checks.PeerFact("n3", "http://n3", problem="down")])) == []
    (found,) = checks.policies("aa", [heard("bb")])
    assert (found.verdict, "n2 (bb)" in found.seen) == ("warning", True)
