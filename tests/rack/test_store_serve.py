"""`mlxrack-agent store serve`: a real agent and a real aggregator use exactly what it prints."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.operator.store_server import Options, Server
from scripts.seaweed import SeaweedFS, free_port
from shared.bucket import Store
from shared.errors import AccessDenied, RackError
from shared.store import ObjectStore
from shared.store_open import open_store
from shared.store_s3 import S3Store
from tests.rack.harness import SCRIPT, Agent, end, model, until, write_config
from tests.rack.tls_rack import Authority

AGGREGATOR = str(Path(sys.executable).with_name("mlxrack-aggregator"))


class Serve:
    """One `store serve`."""

    def __init__(self, folder: Path, port: int, *more: str) -> None:
        self.folder = folder
        command = [SCRIPT, "store", "serve", "--folder", str(folder), "--port", str(port), *more]
        self.process = subprocess.Popen(
            command, cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def table(self) -> str:
        """The [store] table that it prints once it serves."""
        assert self.process.stdout is not None
        text = ""
        while "back it up" not in text:
            line = self.process.stdout.readline()
            assert line, f"ended with {self.process.wait(60)}: {text}"
            text += line
        (found,) = re.findall(r"^\[store\]\n(?:\w+ = .*\n)+", text, re.MULTILINE)
        assert [line for line in text.replace(found, "").splitlines() if line and not line.startswith("#")] == []
        return str(found)

    def ended(self) -> tuple[int, str]:
        """Exit status and what it still says."""
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        return self.process.wait(120), said

    @property
    def weed(self) -> int:
        """Its SeaweedFS."""
        return int((self.folder / "weed.pid").read_text())


@contextlib.contextmanager
def serving(folder: Path, port: int, *more: str) -> Iterator[Serve]:
    """One that is ended with what it started."""
    one = Serve(folder, port, *more)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        assert one.process.stdout is not None
        one.process.stdout.close()
        with contextlib.suppress(OSError, ValueError):
            if alive(one.weed):
                os.kill(one.weed, signal.SIGKILL)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return "(weed) Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def store_of(table: str) -> ObjectStore:
    return open_store(msgspec.convert(tomllib.loads(table)["store"], Store), {}, attempts=1)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"null", b'{"master": "x"}', b'{"master": 70000}'])
def test_noted_ports_that_are_none_are_chosen_anew(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_bytes(raw)
    ports = Server(Options(folder=tmp_path, bucket="r-rack"), [])._internal()
    assert len(set(ports.values())) == len(ports) == 7
    assert json.loads((tmp_path / "ports.json").read_bytes()) == ports


def test_an_agent_and_an_aggregator_use_what_is_printed(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "store"
    with serving(folder, port, "--bucket", "office-rack") as first:
        table = first.table()
        for name in ("access.key", "secret.key", "s3.json", "weed.log"):
            assert (folder / name).stat().st_mode & 0o777 == 0o600, name
        assert folder.stat().st_mode & 0o777 == 0o700
        secrets = [(folder / name).read_text().strip() for name in ("access.key", "secret.key")]
        assert not [secret for secret in secrets if secret in table]
        agent = Agent(tmp_path, "n1", free_port())
        write_config(agent, [], [model()])
        text = agent.config.read_text()
        agent.config.write_text(re.sub(r"\[store\]\n(\w+ = .*\n)+", table, text))
        try:
            agent.start().ready()
            assert agent.chat().status == 200
            agent.admin("POST", "seal")
            until(lambda: store_of(table).list_after("raw/"), "a batch is in the bucket")
        finally:
            end([agent])
        (tmp_path / "aggregator.toml").write_text(f'rack = "r"\n{table}')
        run = subprocess.run(
            [AGGREGATOR, "rollup", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=True
        )
        assert json.loads(run.stdout)["batches"] >= 1
        store_of(table).put("kept", b"data")
        other = S3Store(
            endpoint=f"http://127.0.0.1:{port}",
            bucket="elsewhere",
            access_key=secrets[0],
            secret_key=secrets[1],
            attempts=1,
        )
        with pytest.raises(AccessDenied):
            other.put("x", b"x")

        # killed, it leaves SeaweedFS behind: that is said, with the remedy
        first.process.kill()
        first.process.wait()
        left = first.weed
        with serving(folder, port) as second:
            status, said = second.ended()
            assert status == os.EX_UNAVAILABLE
            assert f"process {left}; `kill {left}` ends it" in said
        until(lambda: not alive(left), "what was left behind has ended")

    # the same folder again: the same keys and data; when SeaweedFS dies the service ends, and says so
    with serving(folder, port, "--bucket", "office-rack") as third:
        assert third.table() == table
        assert store_of(table).get("kept", 10).body == b"data"
        os.kill(third.weed, signal.SIGKILL)
        status, said = third.ended()
        assert status == os.EX_UNAVAILABLE
        assert "was ended by signal 9 and the store is gone" in said
        assert "weed.log" in said


def test_data_can_be_read_as_soon_as_the_harness_has_restarted_it_also_in_a_relative_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SeaweedFS(Path("below") / "store") as server:
        store = server.store("bucket")
        store.create_bucket()
        store.put("kept", b"data")
        server.stop()
        assert server.start().store("bucket", attempts=1).get("kept", 10).body == b"data"
    assert (tmp_path / "below" / "store" / "data").is_dir()


def test_sigterm_ends_it_cleanly_and_tls_is_verified(tmp_path: Path) -> None:
    tls = Authority(tmp_path / "ca").issue("store")
    port, folder = free_port(), tmp_path / "store"
    files = ("--certificate", tls.certificate, "--key", tls.key, "--ca", tls.ca)
    with serving(folder, port, "--name", "localhost", *files) as server:
        table = server.table()
        assert f'endpoint = "https://localhost:{port}"' in table
        store = store_of(table)
        store.put("kept", b"data")
        assert store.get("kept", 10).body == b"data"
        without = "".join(line for line in table.splitlines(keepends=True) if not line.startswith("ca ="))
        with pytest.raises(RackError):
            store_of(without).get("kept", 10)
        weed = server.weed
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == (0, "")
        assert not alive(weed)
