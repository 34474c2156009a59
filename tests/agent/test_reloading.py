"""What reading agent.toml again changes: every key is classified, and a change of any is told or refused."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig, Key, Model, Node, Peer, hash_key
from agent.reloading import (
    LIVE,
    MODEL_KEPT,
    RESTART,
    SECRETS,
    SWITCHES,
    compare,
    needs_loader,
    paths,
    refusal,
    value_at,
)
from shared.config import parse

PLAIN = AgentConfig(node=Node(id="n1", rack="r"))
SECRET = "file:/secrets/very-private-place"


def with_value(config: AgentConfig, path: str, value: Any) -> AgentConfig:
    """The configuration with another value of one key."""
    *tables, name = path.split(".")
    if not tables:
        return msgspec.structs.replace(config, **{name: value})
    (table,) = tables
    return msgspec.structs.replace(config, **{table: msgspec.structs.replace(getattr(config, table), **{name: value})})


def other(path: str, value: Any) -> Any:
    """Another value of the same type."""
    if path == "log_level":
        return "debug" if value == "info" else "info"
    if path in SECRETS:
        return SECRET if value != SECRET else ""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
    raise AssertionError(path)


def read(text: str) -> AgentConfig:
    return parse(f'[node]\nid = "n1"\nrack = "r"\n{text}', AgentConfig, lambda _: (), source="agent.toml")


def test_every_key_of_the_schema_is_live_or_needs_a_restart() -> None:
    """One that is new has to be put into a list, and to do there what the list says."""
    assert sorted((*LIVE, *RESTART)) == sorted(paths())


SINGLE = [path for path in paths() if not isinstance(value_at(PLAIN, path), tuple)]
"""Keys with one value."""


@pytest.mark.parametrize("path", SINGLE)
def test_a_change_of_any_key_is_told_or_refused(path: str) -> None:
    before = value_at(PLAIN, path)
    found = compare(PLAIN, with_value(PLAIN, path, other(path, before)))
    switched = path in ("tls.certificate", "tls.ca")  # from none to some
    if path in RESTART or switched:
        assert found.restarts == (path,)
        assert refusal(found.restarts) == f"{path} needs a restart"
        assert not found.changes
    else:
        assert not found.restarts
        assert [words.split(":")[0].split(" ")[0] for words in found.changes] == [path]
    assert "private" not in str(found)


@given(st.lists(st.sampled_from(SINGLE), unique=True, max_size=8))
def test_all_that_differs_is_named_and_nothing_else(changed: list[str]) -> None:
    new = PLAIN
    for path in changed:
        new = with_value(new, path, other(path, value_at(PLAIN, path)))
    found = compare(PLAIN, new)
    told = {words.split(":")[0].split(" ")[0] for words in found.changes}
    assert told | set(found.restarts) == set(changed)
    assert compare(new, new) == compare(PLAIN, PLAIN) == ((), (), ())
    assert all(path in refusal(found.restarts) for path in found.restarts)


MODELS = '[[models]]\nname = "a"\npath = "/a"\n[[models]]\nname = "b"\npath = "/b"\n'
ONE, TWO = hash_key("one"), hash_key("two")


@pytest.mark.parametrize(
    ("before", "after", "changes", "models"),
    [
        ("", MODELS, ("models: + a, + b",), ("a", "b")),
        (MODELS, MODELS.replace('"b"', '"c"'), ("models: + c, - b",), ("b", "c")),
        (MODELS, MODELS.replace('"/b"', '"/x"\nrows = 2'), ("models: b path, rows",), ("b",)),
        (MODELS, MODELS.split("[[models]]\n")[2].join(["[[models]]\n", ""]), ("models: - a",), ("a",)),
        (
            f'[[keys]]\nid = "k"\nsha256 = "{ONE}"\n',
            f'[[keys]]\nid = "k"\nsha256 = "{ONE}"\n[[keys]]\nid = "k"\nsha256 = "{TWO}"\n',
            ("keys: k has 2 keys",),
            (),
        ),
        (
            f'[[keys]]\nid = "k"\nsha256 = "{ONE}"\n',
            f'[[keys]]\nid = "k"\nsha256 = "{TWO}"\n',
            ("keys: k has another key",),
            (),
        ),
        (f'[[keys]]\nid = "k"\nsha256 = "{ONE}"\n', f'[[keys]]\nid = "l"\nsha256 = "{ONE}"\n', ("keys: + l, - k",), ()),
        (
            f'[[keys]]\nid = "k"\nsha256 = "{ONE}"\n',
            f'[[keys]]\nid = "k"\nsha256 = "{ONE}"\ncache_group = "g"\n',
            ("keys: k cache_group",),
            (),
        ),
        (
            '[peers]\nsecret = "env:A"\n[[peers.nodes]]\nid = "n2"\nurl = "http://a"\n',
            '[peers]\nsecret = "env:A"\n[[peers.nodes]]\nid = "n2"\nurl = "http://b"\n',
            ("peers.nodes: n2 url",),
            (),
        ),
        (
            '[peers]\nsecret = "env:A"\n',
            '[peers]\nsecret = "file:/new"\nold_secret = "env:A"\n',
            ("peers.secret: another reference", "peers.old_secret: set"),
            (),
        ),
        (
            '[api]\ncors_origins = ["https://a"]\n',
            '[api]\ncors_origins = ["https://b"]\nkeepalive_s = 2\n',
            ("api.keepalive_s 15 -> 2", "api.cors_origins: + https://b, - https://a"),
            (),
        ),
        (MODELS, "".join(f"[[models]]\n{one}" for one in reversed(MODELS.split("[[models]]\n")[1:])), (), ()),
    ],
)
def test_lists_are_told_by_name(before: str, after: str, changes: tuple[str, ...], models: tuple[str, ...]) -> None:
    found = compare(read(before), read(after))
    assert found.changes == changes
    assert found.models == models
    assert not found.restarts


def test_hashes_of_keys_are_not_shown() -> None:
    some = tuple(Key(id="k", sha256=one) for one in (ONE, TWO))
    found = compare(PLAIN, msgspec.structs.replace(PLAIN, keys=some))
    assert ONE not in str(found)
    assert TWO not in str(found)


def test_certificates_may_move_but_not_appear() -> None:
    some = with_value(with_value(PLAIN, "tls.certificate", "/a"), "tls.ca", "/ca")
    moved = with_value(with_value(some, "tls.certificate", "/b"), "tls.ca", "/bundle")
    assert compare(some, moved).changes == ("tls.certificate /a -> /b", "tls.ca /ca -> /bundle")
    assert not compare(some, moved).restarts
    assert compare(some, PLAIN).restarts == ("tls.certificate", "tls.ca")


@pytest.mark.parametrize("name", Model.__struct_fields__)
def test_every_setting_of_a_model_needs_another_loader_or_is_kept_by_the_agent(name: str) -> None:
    model = Model(name="m", path="/m")
    value = "fake" if name == "engine" else other(name, getattr(model, name))
    assert needs_loader(model, msgspec.structs.replace(model, **{name: value})) == (name not in MODEL_KEPT)


def test_refusals_read_as_sentences() -> None:
    assert refusal(()) == ""
    assert refusal(("a", "b", "c")) == "a, b and c need a restart"


def test_a_peer_that_is_new_is_told() -> None:
    peers = msgspec.structs.replace(PLAIN.peers, nodes=(Peer(id="n2", url="http://x"),))
    assert compare(PLAIN, msgspec.structs.replace(PLAIN, peers=peers)).changes == ("peers.nodes: + n2",)


def test_the_documentation_names_every_key_that_needs_a_restart() -> None:
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    section = page.split("## What a reload changes")[1].split("## ")[0]
    whole = {path.split(".")[0] for path in RESTART} - {path.split(".")[0] for path in LIVE}
    for path in RESTART:
        assert f"`{path}`" in section or (path.split(".")[0] in whole and f"`{path.split('.')[0]}`" in section), path
    assert not [path for path in LIVE if f"`{path}`" in section and path not in SWITCHES]


def test_no_page_tells_to_reload_what_needs_a_restart() -> None:
    """A sentence that says to reload names no key, and no table, that a reload refuses."""
    whole = {path.partition(".")[0] for path in RESTART} - {path.partition(".")[0] for path in LIVE}
    refused = [*(f"`{path}`" for path in RESTART if "." in path), *(f"`[{table}]`" for table in whole)]
    pages = [Path("README.md"), *Path("docs").glob("*.md")]
    sentences = [one for page in pages for one in re.split(r"[.:]\s|\n\n", page.read_text(encoding="utf-8"))]
    told = [one for one in sentences if re.search(r"\b(and|then) (`mlxrack-agent )?reload\b", " ".join(one.split()))]
    assert len(told) > 5, "the pages do tell to reload"
    assert [one for one in told if any(key in one for key in refused)] == []
