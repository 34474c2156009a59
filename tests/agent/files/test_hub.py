"""The hub's answers as errors that say what to do, and a pull's progress. The client is real, the hub a stand-in."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.files.hub import Hub
from agent.files.hub_listing import Asked
from agent.files.model_pull import pull
from agent.files.modelstore import ModelStore
from agent.operator.obtain import Progress
from shared.catalog import ModelFile
from shared.errors import RackError, Refused, Retryable
from tests.rack.stand_in_hub import Repo, StandInHub

WEIGHTS = "model.safetensors"


@pytest.fixture
def server() -> Iterator[StandInHub]:
    with StandInHub().running() as server:
        server.repos["org/m"] = Repo({"config.json": b"{}", WEIGHTS: bytes(100_000), "tokenizer.json": b"t"})
        yield server


@pytest.fixture
def hub(server: StandInHub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")  # as it was, afterwards
    return Hub({"HF_ENDPOINT": server.endpoint}, token="hf_secret")


@pytest.mark.parametrize(
    ("status", "headers", "kind", "why"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, Refused, "rejected the token (401)"),
        (403, {}, Refused, "rejected the token (403)"),
        (403, {"X-Error-Code": "GatedRepo"}, Refused, "accept its licence at"),
        (404, {"X-Error-Code": "RepoNotFound"}, Refused, "the hub has no such model (404)"),
        (404, {"X-Error-Code": "EntryNotFound"}, Refused, "is not there"),
        (400, {}, Refused, "answered 400"),
        (451, {}, Refused, "answered 451"),
        (429, {}, Retryable, "answered 429"),
        (500, {}, Retryable, "answered 500"),
        (503, {"X-Error-Message": "maintenance"}, Retryable, "answered 503"),
    ],
)
def test_each_answer_of_the_hub_says_who_has_to_act(
    hub: Hub, server: StandInHub, status: int, headers: dict[str, str], kind: type[RackError], why: str
) -> None:
    server.answers["org/m"] = (status, headers)
    with pytest.raises(kind) as caught:
        hub.listing(Asked("org/m"))
    assert why in caught.value.message
    assert "hf_secret" not in caught.value.message


@pytest.mark.parametrize("name", ["org/a--b", "org/m.git", "org/a..b"])
def test_a_name_that_the_client_refuses_is_refused(hub: Hub, name: str) -> None:
    with pytest.raises(Refused, match=f"pull {name}: "):
        hub.listing(Asked(name))


def test_a_file_that_is_longer_than_listed_is_cut_off(hub: Hub, server: StandInHub, tmp_path: Path) -> None:
    listing = hub.listing(Asked("org/m"))
    server.repos["org/m"].files[WEIGHTS] = bytes(5_000_000)
    store = ModelStore(tmp_path / "memo", tmp_path / "store")
    with pytest.raises(Refused, match="has more than 100000 bytes") as caught:
        pull(hub.source(listing), store, "m")
    assert caught.value.code == "bad_hash"
    assert sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file()) < 100_000


def test_a_file_that_is_shorter_than_listed_can_be_tried_again(hub: Hub, server: StandInHub, tmp_path: Path) -> None:
    listing = hub.listing(Asked("org/m"))
    server.repos["org/m"].files[WEIGHTS] = bytes(60_000)
    with pytest.raises(Retryable, match="sent less than it lists"):
        pull(hub.source(listing), ModelStore(tmp_path / "memo", tmp_path / "store"), "m")


def test_what_is_here_in_another_revision_is_not_fetched_again(hub: Hub, server: StandInHub, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "memo", tmp_path / "store")
    first = pull(hub.source(hub.listing(Asked("org/m"))), store, "m")
    repo = server.repos["org/m"]
    repo.files["config.json"], repo.commit = b"{ }", "beef" * 10
    server.sent.clear()
    second = pull(hub.source(hub.listing(Asked("org/m")), store.fragments("m")), store, "m")
    assert second.version != first.version
    assert {one.name for one in server.sent} == {"config.json", WEIGHTS}, "its tokenizer is the same"


def test_a_verified_pull_is_not_hashed_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path / "memo", tmp_path / "store")
    installed = pull(hub.source(hub.listing(Asked("org/m"))), store, "m")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
    again = ModelStore(tmp_path / "memo", tmp_path / "store")
    assert again.manifest("m", again.place("m", installed.version)).files


def test_progress_shows_the_file_and_the_total_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ModelFile(name=WEIGHTS, size=2_000_000, sha256="")
    for live, silent in ((False, False), (True, True), (True, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda live=live: live)
        progress = Progress("pull m", silent)
        progress(2_000_000, 4_000_000)
        progress.begins(file)
        progress(3_000_000, 4_000_000)
        said = capsys.readouterr().err
        assert bool(said) is (live and not silent)
    assert "pull m: 75 %, 3 MB of 4 MB" in said
    assert f"({WEIGHTS}: 50 %)" in said
