"""What is taken of a model on the hub, what its name means, and where a version came from: pure decisions."""

import hashlib
import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.files import hub
from agent.files.hub_listing import (
    MAX_SMALL_BYTES,
    Asked,
    HubFile,
    Origin,
    is_blob,
    licence_of,
    local_name,
    matches,
    offline_because,
    parse_name,
    parse_origin,
    shown,
    taken,
)
from shared.catalog import is_loaded, is_model_file
from shared.errors import Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOB, SHA256 = "a" * 40, "b" * 64


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("mlx-community/Qwen3-8B-4bit", Asked("mlx-community/Qwen3-8B-4bit")),
        ("hf:org/m", Asked("org/m")),
        ("hf://org/m@v1.0", Asked("org/m", "v1.0")),
        ("https://huggingface.co/org/m", Asked("org/m")),
        ("https://huggingface.co/org/m/", Asked("org/m")),
        ("https://hf.co/org/m/tree/refs/pr/1", Asked("org/m", "refs/pr/1")),
        (" org/m.v2_x@abc1234 ", Asked("org/m.v2_x", "abc1234")),
    ],
)
def test_a_name_of_the_hub_is_recognised(text: str, asked: Asked) -> None:
    assert parse_name(text) == asked


@pytest.mark.parametrize(
    "text",
    ["", "gpt2", "./org/m", "~/models/m", "/org/m", "a/b/c", "org/m@", "../m", "org/ m", "bucket:m", "org/-m", "ö/m"],
)
def test_other_text_is_not_a_name_of_the_hub(text: str) -> None:
    assert parse_name(text) is None


@given(st.text(max_size=60))
def test_any_text_is_a_name_or_not(text: str) -> None:
    asked = parse_name(text)
    assert asked is None or (asked.repo.count("/") == 1 and ".." not in asked.repo.split("/"))


@pytest.mark.parametrize(
    ("repo", "revision", "expected"),
    [
        ("org/m", "", True),
        ("ORG/M", "", True),
        ("org/m", COMMIT, True),
        ("org/m", COMMIT[:7], True),
        ("org/m", COMMIT[:6], False),  # may be a branch
        ("org/m", "main", False),  # only the hub knows
        ("org/m", "beef" * 10, False),
        ("other/m", "", False),
    ],
)
def test_a_version_matches_by_repository_and_commit(repo: str, revision: str, expected: bool) -> None:
    assert matches(Origin(repo="org/m", revision=COMMIT), Asked(repo, revision)) is expected
    assert not matches(None, Asked(repo, revision))


def file(name: str, size: int = 10, blob: str = BLOB, sha256: str = "") -> HubFile:
    return HubFile(name=name, size=size, blob=blob, sha256=sha256)


NAMES = st.text("abM/._-", max_size=12).flatmap(
    lambda stem: st.sampled_from([".safetensors", ".json", ".jinja", ".py", ".bin", ".pt", ".txt", ".pkl", ""]).map(
        lambda suffix: stem + suffix
    )
)


@given(st.lists(NAMES, unique=True, max_size=20))
def test_only_what_a_served_model_needs_is_taken(names: list[str]) -> None:
    found = taken("org/m", [file("model.safetensors", sha256=SHA256), *map(file, names)])
    for one in found:
        assert is_model_file(one.name)
        assert not one.name.endswith((".py", ".bin", ".pt", ".pkl"))
        assert not one.name.endswith(".safetensors") or is_loaded(one.name)
        assert ".." not in one.name.split("/")
    assert [one.name for one in found] == sorted({one.name for one in found})


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ((), "only no files; choose an MLX conversion"),
        ((file("x.gguf"), file("config.json")), "only gguf, json"),
        ((file("consolidated.safetensors"),), "it has no model"),
        ((file("model.safetensors", size=-1),), "lists model.safetensors without size or hash"),
        ((file("model.safetensors", blob=""),), "without size or hash"),
        ((file("model.safetensors", sha256="x"),), "without size or hash"),
        ((file("model.safetensors", size=MAX_SMALL_BYTES + 1),), "268 MB of files without a SHA-256"),
    ],
)
def test_a_list_that_cannot_be_served_or_trusted_is_refused(files: tuple[HubFile, ...], why: str) -> None:
    with pytest.raises(Refused, match=why):
        taken("org/m", files)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "other", "license_name": "gemma"}, "gemma"),
        ({"license": "other"}, "other"),
        ({"license": ["mit", "cc-by-4.0"]}, "mit, cc-by-4.0"),
        ({"license_name": "own"}, "own"),
        ({}, ""),
        ({"license": "\x1b[31mred" + "x" * 100}, "[31mred" + "x" * 73),
    ],
)
def test_the_licence_is_read_from_the_card(card: dict[str, object], licence: str) -> None:
    assert licence_of(card) == licence


@given(st.text())
def test_a_text_of_the_hub_cannot_control_the_terminal(text: str) -> None:
    assert all(" " <= letter <= "~" for letter in shown(text))
    assert len(shown(text)) <= 80


@pytest.mark.parametrize(
    "raw",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"repo": "x"}',
        b'{"repo": "../x", "revision": "' + COMMIT.encode() + b'"}',
        b'{"repo": "o/m", "revision": "main"}',
    ],
)
def test_an_invalid_origin_is_none(raw: bytes | None) -> None:
    assert parse_origin(raw) is None


def test_an_origin_is_kept() -> None:
    origin = Origin(repo="org/m", revision=COMMIT, licence="mit")
    assert parse_origin(msgspec.json.encode(origin)) == origin


@given(st.binary(max_size=200))
def test_a_blob_id_is_git_s(content: bytes) -> None:
    assert is_blob(content, hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest())
    assert not is_blob(content + b"x", hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest())


def test_a_name_in_the_store_has_no_organisation() -> None:
    assert local_name("mlx-community/Qwen3-8B-4bit") == "Qwen3-8B-4bit"
    with pytest.raises(Refused, match="choose one with --name"):
        local_name("org/" + "x" * 64)


@pytest.mark.parametrize(
    ("environ", "asked", "why"),
    [
        ({}, False, ""),
        ({"HF_HUB_OFFLINE": "0"}, False, ""),
        ({"HF_HUB_OFFLINE": "1"}, False, "HF_HUB_OFFLINE is set"),
        ({"HF_HUB_OFFLINE": "True"}, False, "HF_HUB_OFFLINE is set"),
        ({"TRANSFORMERS_OFFLINE": "ON"}, False, "TRANSFORMERS_OFFLINE is set"),
        ({}, True, "--offline was given"),
    ],
)
def test_offline_has_a_reason(environ: dict[str, str], asked: bool, why: str) -> None:
    assert offline_because(environ, asked=asked) == why


@given(st.binary(min_size=1, max_size=300), st.data())
def test_each_byte_is_written_once_whatever_the_server_repeats(body: bytes, data: st.DataObject) -> None:
    """The client's view of a file, driven as its ``http_get`` drives one: ranges, rewinds, lost connections."""
    start = data.draw(st.integers(0, len(body)))
    out = io.BytesIO()
    target = hub._Target(out.write, start)
    at = start
    while at < len(body):
        if at and data.draw(st.booleans(), label="the server ignores the range"):
            target.seek(max(target.tell() - at, 0))
            target.truncate()
            at = 0
        piece = body[at : at + data.draw(st.integers(0, len(body) - at))]
        target.write(piece)
        at += len(piece)
        assert target.tell() == at
        if not piece:
            target.write(body[at:])
            break
    assert body[:start] + out.getvalue() == body
