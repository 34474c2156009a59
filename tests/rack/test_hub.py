"""Models by name: the hub's real client against a stand-in on loopback, through the command line in real processes."""

import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.seaweed import free_port
from tests.rack.harness import SCRIPT, Agent, until
from tests.rack.stand_in_hub import Repo, StandInHub
from tests.tiny_model import write_tiny_model

WEIGHTS = "model.safetensors"
NAME = "org/made-4bit"


def made(size: int = 3_000_000) -> Repo:
    """A model of random bytes, with files that no node takes."""
    weights = random.Random(size).randbytes(size)
    files = {"config.json": b"{}", WEIGHTS: weights, "tokenizer.json": b"t" * 100, "chat_template.jinja": b"{{ x }}"}
    other = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "consolidated.safetensors": weights}
    return Repo({**files, **other, "README.md": b"# card", ".gitattributes": b"*"}, license="apache-2.0")


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub().running() as server:
        server.repos[NAME] = made()
        yield server


class Node:
    """The command line in a folder of its own, on a machine without a configuration."""

    def __init__(self, folder: Path, hub: StandInHub) -> None:
        self.folder, self.hub = folder, hub
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        homes = {"XDG_STATE_HOME": str(folder / "state"), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint}
        self.environ = {**kept, **homes}

    def start(self, *words: str, environ: Mapping[str, str] | None = None, **more: Any) -> "subprocess.Popen[str]":
        """Start a verb."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        whole = {**self.environ, **(environ or {})}
        return subprocess.Popen([SCRIPT, *words], cwd=self.folder, env=whole, text=True, **pipes, **more)

    def run(self, *words: str, **more: Any) -> tuple[int, str, str]:
        """Run a verb to its end: status, output, errors."""
        with self.start(*words, **more) as process:
            out, err = process.communicate(timeout=240)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def json(self, *words: str) -> Any:
        """The JSON that a verb prints."""
        status, out, err = self.run(*words, "--json")
        assert status == 0, err
        assert err == "", "quiet"
        return json.loads(out)

    @property
    def store(self) -> Path:
        """The model store."""
        return self.folder / "state/mlxrack/local/models"


@pytest.fixture
def node(tmp_path: Path, hub: StandInHub) -> Node:
    return Node(tmp_path, hub)


def test_a_model_is_pulled_whole_and_pinned_to_its_commit(node: Node, hub: StandInHub) -> None:
    status, out, err = node.run("models", "pull", NAME)
    assert status == 0, err
    assert "licence apache-2.0" in err
    assert "%" not in err, "no progress line without a terminal"
    assert 'path = "store:made-4bit@' in out
    (stored,) = node.json("models", "list")["stored"]
    assert stored["origin"] == {"repo": NAME, "revision": hub.repos[NAME].commit, "licence": "apache-2.0"}
    place = node.store / "made-4bit" / stored["version"]
    names = {path.name for path in place.iterdir() if not path.name.startswith("mlxrack-")}
    assert names == {"config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja"}
    assert all((place / name).read_bytes() == hub.repos[NAME].files[name] for name in names)
    assert hub.tokens_at_storage == [], "the token stays with the hub"
    asked = len(hub.asked)
    assert node.json("models", "pull", NAME)["version"] == stored["version"]
    assert len(hub.asked) == asked, "what is here is not asked for again"
    assert f"{NAME}@c0ffee" in node.run("models", "list")[1]
    gone = node.json("models", "rm", "made-4bit")
    assert gone["freed_bytes"] > 3_000_000
    assert not place.exists()


def test_a_killed_pull_resumes_in_the_middle_of_a_file(node: Node, hub: StandInHub) -> None:
    hub.hold[WEIGHTS] = 2_000_000
    with node.start("models", "pull", NAME) as process:
        assert hub.held.wait(120)
        until(lambda: on_disk(node) >= 1_500_000, "what was sent is on disk")
        process.send_signal(signal.SIGKILL)
    there, before = on_disk(node), len(hub.sent)
    assert there < len(hub.repos[NAME].files[WEIGHTS])
    hub.hold.clear()
    hub.release.set()
    status, _, err = node.run("models", "pull", NAME)
    assert status == 0, err
    assert [(one.name, one.start) for one in hub.sent[before:]] == [(WEIGHTS, there)], "nothing else, from there on"
    (weights,) = node.store.glob(f"made-4bit/*/{WEIGHTS}")
    assert weights.read_bytes() == hub.repos[NAME].files[WEIGHTS]


def on_disk(node: Node) -> int:
    return sum(path.stat().st_size for path in node.store.glob(f".partial/*/{WEIGHTS}"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_is_resumed_within_the_pull(node: Node, hub: StandInHub, ranges: bool) -> None:
    hub.cut[WEIGHTS], hub.ranges = 1_000_000, ranges
    status, _, err = node.run("models", "pull", NAME)
    assert status == 0, err
    first, second = (one for one in hub.sent if one.name == WEIGHTS)
    assert (first.start, second.start > 0) == (0, ranges)
    (weights,) = node.store.glob(f"made-4bit/*/{WEIGHTS}")
    assert weights.read_bytes() == hub.repos[NAME].files[WEIGHTS], "also where the server ignores ranges"


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_wrong_hash_is_fetched_once_more_and_then_reported(node: Node, hub: StandInHub, name: str) -> None:
    hub.corrupt[name] = 2
    status, _, err = node.run("models", "pull", NAME)
    assert status == 1
    assert name in err
    assert "nothing was installed" in err
    assert len([one for one in hub.sent if one.name == name]) == 2
    assert not list(node.store.glob(f".partial/*/{name}")), "the file was deleted"
    assert node.json("models", "list")["stored"] == []
    hub.corrupt[name] = 1
    assert node.run("models", "pull", NAME)[0] == 0, "one wrong answer is repaired by itself"


def test_too_little_disk_is_reported_before_and_during_a_download(node: Node, hub: StandInHub) -> None:
    config = node.folder / "small.toml"
    config.write_text('node = {id = "small", rack = "r"}\nmodel_store = {disk_bytes = 2000000}\n')
    status, _, err = node.run("models", "pull", NAME, "--config", str(config))
    assert status == 1
    assert "3 MB do not fit" in err
    assert hub.bytes_of(WEIGHTS) == 0, "before the weights are asked for"

    def little_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    status, _, err = node.run("models", "pull", NAME, preexec_fn=little_disk)
    assert status == 1
    assert "the disk is full; what was fetched is kept, nothing was installed" in err
    before = len(hub.sent)
    assert node.run("models", "pull", NAME)[0] == 0
    assert hub.sent[before].start > 0, "resumed once there is room"


def test_a_gated_model_says_what_to_do_and_the_token_is_never_kept(node: Node, hub: StandInHub) -> None:
    hub.repos[NAME].gated = True
    status, _, err = node.run("models", "pull", NAME)
    assert status == 1
    assert f"accept its licence at {hub.endpoint}/{NAME}" in err
    assert "HF_TOKEN" in err
    status, _, err = node.run("models", "pull", NAME, environ={"HF_TOKEN": "hf_of_somebody_else"})
    assert (status, "granted access" in err, "hf_of_somebody_else" in err) == (1, True, False)
    status, _, err = node.run("models", "pull", NAME, "--token", "hf_literal_token")
    assert (status, "use a reference" in err, "hf_literal_token" in err) == (1, True, False)
    status, out, err = node.run("models", "pull", NAME, "--token", "env:MINE", environ={"MINE": hub.token})
    assert status == 0, err
    assert hub.token not in out + err
    assert hub.tokens_at_storage == []
    kept = [path for path in node.folder.rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()]
    assert kept == []


@pytest.mark.parametrize(
    ("words", "environ", "why"),
    [
        ((), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ((), {"TRANSFORMERS_OFFLINE": "yes"}, "TRANSFORMERS_OFFLINE is set"),
        (("--offline",), {}, "--offline was given"),
    ],
)
def test_offline_stays_offline(
    node: Node, hub: StandInHub, words: tuple[str, ...], environ: dict[str, str], why: str
) -> None:
    for verb in (("models", "pull"), ("serve",)):
        status, _, err = node.run(*verb, NAME, *words, environ=environ)
        assert (status, why in err) == (1, True), err
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("org/unknown", "the hub has no such model (401); check its name at"),
        (f"{NAME}@nope", "the hub has no revision 'nope'"),
        ("org/gguf", "it has no model*.safetensors, only gguf, md"),
        ("org/shards", "the hub lacks its weights file model-2.safetensors"),
        ("org/" + "x" * 80, "choose one with --name"),
    ],
)
def test_what_cannot_be_pulled_says_why(node: Node, hub: StandInHub, name: str, why: str) -> None:
    hub.repos["org/gguf"] = Repo({"x.gguf": b"x", "README.md": b"#"})
    index = json.dumps({"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors"}}).encode()
    hub.repos["org/shards"] = Repo({WEIGHTS: b"x", "model.safetensors.index.json": index})
    hub.repos["org/" + "x" * 80] = made()
    status, _, err = node.run("models", "pull", name)
    assert (status, why in err) == (1, True), err


def test_an_unreachable_hub_can_be_tried_again(node: Node) -> None:
    status, _, err = node.run("models", "pull", NAME, environ={"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"})
    assert (status, "cannot be reached: nothing listens on 127.0.0.1:" in err) == (os.EX_TEMPFAIL, True), err


def test_one_node_publishes_and_the_others_take_it_from_the_bucket(node: Node, hub: StandInHub, tmp_path: Path) -> None:
    for name in ("n1", "n2"):
        store = f'[store]\nkind = "directory"\npath = "{tmp_path / "bucket"}"\n'
        (tmp_path / f"{name}.toml").write_text(f'[node]\nid = "{name}"\nrack = "r"\n{store}')
    first = node.json("models", "pull", NAME, "--publish", "--config", str(tmp_path / "n1.toml"))
    asked = len(hub.asked)
    status, _, err = node.run("models", "pull", f"{NAME}@c0ffee0", "--config", str(tmp_path / "n2.toml"))
    assert (status, "from the bucket" in err) == (0, True), err
    assert len(hub.asked) == asked
    status, _, err = node.run("models", "pull", "bucket:made-4bit", "--config", str(tmp_path / "n2.toml"))
    assert (status, "--publish" in err) == (0, False), "what was published need not be"
    listed = node.json("models", "list", "--config", str(tmp_path / "n2.toml"))
    assert [one["version"] for one in (*listed["stored"], *listed["bucket"])] == [first["version"]] * 2
    assert listed["bucket"][0]["origin"]["licence"] == "apache-2.0"
    with (tmp_path / "n2.toml").open("a") as config:
        config.write('[[models]]\nname = "chat"\npath = "store:made-4bit"\n')
    status, _, err = node.run("models", "rm", "made-4bit", "--config", str(tmp_path / "n2.toml"))
    assert (status != 0, "[[models]] chat is configured with it" in err) == (True, True), err
    # another revision is another model: the hub is asked for it
    hub.repos[NAME].files["config.json"], hub.repos[NAME].commit = b"{ }", "beef" * 10
    second = node.json("models", "pull", NAME, "--revision", "main", "--config", str(tmp_path / "n2.toml"))
    assert second["origin"]["revision"] == "beef" * 10
    assert second["version"] != first["version"]


# ---- serve ----


def test_serve_goes_from_an_empty_folder_to_a_token_in_one_command(node: Node, hub: StandInHub, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "made", seed=3)
    hub.repos["org/tiny"] = Repo.of_folder(tmp_path / "made")
    agent, began = Agent(tmp_path, "local", free_port()), time.monotonic()
    with node.start("serve", "org/tiny", "--port", str(agent.port)) as process:
        try:
            assert process.stdout is not None
            curl = next((line for line in process.stdout if line.startswith("curl ")), "")
            url, body = re.search(r"http://\S+", curl), re.search(r"-d '(.+)'", curl)
            assert url is not None, process.communicate(timeout=60)
            assert body is not None, curl
            path = url[0].partition(f":{agent.port}")[2]
            answer = agent.request("POST", path, body[1].encode(), {"Content-Type": "application/json"})
            print(f"serve: {time.monotonic() - began:.1f} s from an empty folder to the first answer")
            assert answer.status == 200, answer.body
            assert answer.json["usage"]["completion_tokens"] >= 1
            (stored,) = node.json("models", "list")["stored"]
            assert (stored["name"], stored["loaded"]) == ("tiny", True)
            status, _, err = node.run("models", "rm", "tiny")
            assert (status, "it serves tiny; unload that model first" in err) == (1, True), err
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()
    written = {path.name for path in (tmp_path / "state/mlxrack").iterdir()}
    assert written == {"local"}, "nothing outside the state folder"
    assert not (tmp_path / "agent.toml").exists()


def test_serve_takes_a_folder_without_a_chat_template(node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "plain model"
    write_tiny_model(folder, seed=4)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    agent = Agent(tmp_path, "local", free_port())
    with node.start("serve", str(folder), "--port", str(agent.port)) as process:
        try:
            assert process.stdout is not None
            lines = [line for line in iter(process.stdout.readline, "Ctrl-C stops it\n") if line]
            assert any("it has no chat template" in line for line in lines)
            assert "/v1/completions" in lines[-1]
            body = {"model": "plain-model", "prompt": "a", "max_tokens": 3}
            assert agent.request("POST", "/v1/completions", json.dumps(body).encode()).status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()


def test_serve_refuses_before_it_downloads(node: Node, hub: StandInHub, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "made", seed=3)
    hub.repos["org/tiny"] = Repo.of_folder(tmp_path / "made")
    config = tmp_path / "small.toml"
    config.write_text('node = {id = "small", rack = "r"}\nmemory = {budget_bytes = 1000000}\n')
    status, _, err = node.run("serve", "org/tiny", "--port", "0", "--config", str(config))
    assert status == 1
    assert "this machine has 1 MB for models" in err
    assert hub.bytes_of(WEIGHTS) == 0
    status, _, err = node.run("serve", "tiny", "--port", "0")
    assert (status, "no such model: no folder of that name, and the store holds nothing" in err) == (1, True), err
    status, _, err = node.run("serve", "org/tiny", "--port", str(hub.port))
    assert (status, "choose another with --port" in err) == (os.EX_UNAVAILABLE, True), err
    assert hub.bytes_of(WEIGHTS) == 0


def test_serve_says_why_a_model_cannot_be_loaded(node: Node, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "broken", seed=5)
    (tmp_path / "broken/tokenizer.json").unlink()
    status, out, err = node.run("serve", "broken", "--port", "0")
    assert status == 1, out
    assert "mlxrack-agent: serve broken: " in err
    assert "curl" not in out


def test_the_stand_in_lists_what_the_hub_lists(hub: StandInHub) -> None:
    from huggingface_hub import HfApi

    info = HfApi(hub.endpoint).model_info(NAME, files_metadata=True)
    listed = {file.rfilename: file for file in info.siblings or ()}
    lfs = listed[WEIGHTS].lfs
    assert lfs is not None
    assert lfs.sha256 == hashlib.sha256(hub.repos[NAME].files[WEIGHTS]).hexdigest()
    assert listed["config.json"].lfs is None
