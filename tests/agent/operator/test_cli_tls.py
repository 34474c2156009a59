"""mlxrack-agent tls: what it writes, and what it refuses."""

import json
import os
import ssl
import subprocess
from pathlib import Path

import pytest

from agent import cli
from agent.mesh.tls import NodeTls
from shared.secrets import weakness
from shared.transport import Tls


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    state, bucket = json.dumps(str(tmp_path / "state")), json.dumps(str(tmp_path / "b"))
    path.write_text(f'[node]\nid = "n1"\nrack = "office"\n[paths]\nstate = {state}\n[store]\npath = {bucket}\n')
    return path


def run(config: Path, *verb: str) -> int:
    return cli.main([*verb, "--config", str(config)])


def test_a_rack_gets_a_ca_and_certificates_that_work(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, "tls", "init") == 0
    assert run(config, "tls", "issue", "n1", "--name", "mini-1.local", "--ip", "10.0.0.5", "--ip", "fd00::5") == 0
    folder = tmp_path / "state/tls"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "n1.pem": 0o644, "n1.key": 0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    printed = capsys.readouterr().out
    assert "PRIVATE KEY" not in printed
    table = printed[printed.index("[tls]") :]
    config.write_text(config.read_text() + table)
    assert run(config, "check-config") == 0, "the lines can be used as they are printed"
    NodeTls(
        Tls(certificate=str(folder / "n1.pem"), key=str(folder / "n1.key"), ca=str(folder / "ca.pem")),
        rack="office",
        node="n1",
    )
    capsys.readouterr()
    assert run(config, "tls", "show", "--json") == 0
    shown = {Path(one["file"]).name: one for one in json.loads(capsys.readouterr().out)}
    assert shown["n1.pem"]["names"] == ["mlxrack://office/n1", "mini-1.local", "10.0.0.5", "fd00::5"]
    assert (shown["n1.pem"]["days_left"], shown["ca.pem"]["days_left"]) == (397, 3649)
    assert run(config, "tls") == 0
    assert "mlxrack://office/n1" in capsys.readouterr().out


def test_openssl_agrees(config: Path, tmp_path: Path) -> None:
    """Another implementation verifies chain, purpose and names."""
    assert run(config, "tls", "init") == 0
    assert run(config, "tls", "issue", "n1", "--name", "mini-1.local") == 0
    folder = tmp_path / "state/tls"
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-verify_hostname", "mini-1.local"]
        done = subprocess.run(
            [*command, "-CAfile", str(folder / "ca.pem"), str(folder / "n1.pem")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_nothing_is_overwritten_unless_it_is_renewed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state/tls"
    assert run(config, "tls", "issue", "n1") == 1
    assert "`mlxrack-agent tls init` makes the CA" in capsys.readouterr().err
    assert run(config, "tls", "init") == run(config, "tls", "issue", "n1") == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for verb in (("init",), ("issue", "n1")):
        capsys.readouterr()
        assert run(config, "tls", *verb) == 1
        assert "exists and is not overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "n1.key").unlink()
    assert run(config, "tls", "issue", "n1") == 1, "half a pair is not overwritten, either"
    assert run(config, "tls", "issue", "n1", "--renew") == 0
    after = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path, body in before.items() if after[path] != body} == {"n1.pem", "n1.key"}
    ssl.create_default_context().load_cert_chain(folder / "n1.pem", folder / "n1.key")
    assert sorted(path.name for path in folder.iterdir()) == ["ca.key", "ca.pem", "n1.key", "n1.pem"]


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        (("issue", "../n1"), "node id '../n1'"),
        (("issue", "ca"), "name of the CA's files"),
        (("issue", "n1", "--name", "https://mini-1.local"), "expected a DNS name"),
        (("issue", "n1", "--name", "mini-1.local:8470"), "expected a DNS name"),
        (("issue", "n1", "--ip", "10.0.0"), "expected an address"),
        (("issue", "n1", "--days", "9000"), "the CA's own certificate ends on"),
        (("issue", "n1", "--rack", "a/b"), "rack 'a/b'"),
        (("show", "/nowhere.pem"), "tls show: /nowhere.pem: no such file"),
        (("show", __file__), "not a certificate in PEM"),
    ],
)
def test_what_cannot_be_issued_or_shown_is_said(
    config: Path, capsys: pytest.CaptureFixture[str], verb: tuple[str, ...], expected: str
) -> None:
    assert run(config, "tls", "init") == 0
    assert run(config, "tls", *verb) == 1
    assert expected in capsys.readouterr().err


def test_another_ca_s_key_or_noise_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "state/tls"
    assert run(config, "tls", "init") == 0
    assert run(config, "tls", "init", "--folder", str(tmp_path / "other")) == 0
    for key, expected in (
        ((tmp_path / "other/ca.key").read_bytes(), "does not belong to its certificate"),
        (b"noise", "not in PEM"),
        (b"", "not in PEM"),
    ):
        (folder / "ca.key").write_bytes(key)
        assert run(config, "tls", "issue", "n1") == 1
        assert expected in capsys.readouterr().err
    assert not (folder / "n1.pem").exists()


@pytest.mark.parametrize("how", ["missing", "mismatch"])
def test_files_that_cannot_be_used_are_found_by_check_config(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    assert run(config, "tls", "init") == run(config, "tls", "issue", "n1") == run(config, "tls", "issue", "n2") == 0
    folder = tmp_path / "state/tls"
    key = "nothing.key" if how == "missing" else "n2.key"
    files = {"certificate": "n1.pem", "key": key, "ca": "ca.pem"}
    lines = "".join(f"{name} = {json.dumps(str(folder / file))}\n" for name, file in files.items())
    config.write_text(config.read_text() + "[tls]\n" + lines)
    capsys.readouterr()
    assert run(config, "check-config") == os.EX_CONFIG
    expected = "No such file" if how == "missing" else "the key does not belong to the certificate"
    assert expected in capsys.readouterr().err


def test_new_secret_prints_a_strong_one_each_time(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "new-secret") == run(config, "new-secret") == 0
    first, second = capsys.readouterr().out.split()
    assert first != second
    assert weakness(first) == weakness(second) == ""
