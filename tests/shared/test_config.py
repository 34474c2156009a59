"""Configuration: every problem in one message, with the path of its key."""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config_checks
from agent.config import AgentConfig
from aggregator import config as aggregator_config
from aggregator.config import AggregatorConfig
from scripts.document_config import _condition, _is_list, _struct_of
from shared import config
from shared.config import ConfigError

GOOD = '[node]\nid = "n1"\nrack = "r"\n[store]\nkind = "directory"\npath = "/tmp/x"\n'


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, AgentConfig, config_checks.check, source="agent.toml")
    return caught.value.problems


def test_a_good_file_is_read() -> None:
    read = config.parse(GOOD, AgentConfig, config_checks.check, source="agent.toml")
    assert (read.node.id, read.listen.port, read.listen.host) == ("n1", 8470, "127.0.0.1")


def test_every_problem_is_in_one_message() -> None:
    text = (
        '[node]\nid = 5\n[listen]\nport = 99999\nhots = "x"\n[[models]]\npath = "p"\nrows = 0\n'
        '[[peers.nodes]]\nid = "a"\n[telemetry]\nsample_s = "often"\n'
    )
    found = "\n".join(problems(text))
    for expected in (
        "node.id: expected str",
        "node.rack: is required",
        "listen.port: expected int <= 65535",
        "listen.hots: unknown key; did you mean 'host'?",
        "models[0].name: is required",
        "models[0].rows: expected int >= 1",
        "peers.nodes[0].url: is required",
        "telemetry.sample_s: expected float",
    ):
        assert expected in found


def test_wrong_types_unknown_keys_and_wrong_values_are_reported_together() -> None:
    text = (
        'log_level = "loud"\n[node]\nid = 5\nrack = "not a name!"\n[store]\nkind = "s4"\n'
        '[listen]\nhost = "0.0.0.0"\nport = "http"\nhots = 1\n[limits]\nbody_s = "long"\nrequest_s = true\n'
        '[peers]\nsecret = "hunter2"\n[[peers.nodes]]\nid = "n1"\nurl = 7\n'
        '[[peers.nodes]]\nid = "n1"\nurl = "ftp://x"\n'
        '[[models]]\nname = "m"\nrows = "many"\n[[models]]\nname = "m"\nengine = "mxl"\n[[models]]\nphat = "x"\n'
        '[[meters]]\nname = "a"\nkind = "shelly"\nat = "10.0.0.9"\nnodes = [1, "n1", 2]\n'
    )
    expected = {
        "log_level: invalid enum value": "a type of the file",
        "node.id: expected str": "a required key",
        "node.rack 'not a name!'": "a value beside it",
        "store.kind: invalid enum value": "what the other keys depend on",
        "listen.host: 0.0.0.0 is reachable from other machines, and no [[keys]]": "a value of the same table",
        "listen.host: 0.0.0.0 is reachable from other machines, and API keys": "another rule about it",
        "listen.port: expected int": "",
        "listen.hots: unknown key; did you mean 'host'?": "",
        "limits.body_s: expected float": "several in one table",
        "limits.request_s: expected float": "",
        "peers.nodes[0].url: expected str": "",
        "peers.nodes: duplicate id 'n1'": "a rule over a list with a wrong item",
        "peers.nodes[1].url: must begin with": "",
        "peers.secret: is a literal value": "",
        "models[0].rows: expected int": "",
        "models[0].path: is required": "a value of a table with a wrong key",
        "models[1].engine: invalid enum value": "whether a path is required depends on it",
        "models: duplicate name 'm'": "",
        "models[2].name: is required": "",
        "models[2].phat: unknown key; did you mean 'path'?": "",
        "models[2].path: is required": "",
        "meters[0].nodes[0]: expected str": "each item of a list",
        "meters[0].nodes[2]: expected str": "",
        "meters[0].at: must begin with http": "",
    }
    found = problems(text)
    missing = [start for start in expected if not any(problem.startswith(start) for problem in found)]
    assert (missing, len(found)) == ([], len(expected)), found
    assert "hunter2" not in "\n".join(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node = 5\n", {"node: expected a table"}),
        (
            GOOD + "models = 5\n",
            {"store.models: unknown key; known keys: access_key, bucket, ca, endpoint, kind, path"},
        ),
        ("models = 5\n" + GOOD, {"models: expected array, got int"}),
        ("models = [5]\n" + GOOD, {"models[0]: expected a table"}),
        ("nod = 1\n" + GOOD, {"nod: unknown key; did you mean 'node'?"}),
    ],
)
def test_what_cannot_be_read_causes_no_second_report(text: str, expected: set[str]) -> None:
    found = problems(text)
    assert {next((e for e in expected if one.startswith(e)), one) for one in found} == expected
    assert len(found) == len(expected)


FULL = (
    'log_level = "info"',
    *("[node]", 'id = "n1"', 'rack = "r"', "[store]", 'kind = "directory"', 'path = "/tmp/x"'),
    *("[listen]", 'host = "127.0.0.1"', "port = 8470", "[limits]", "body_s = 60.0", "stuck_s = 60.0"),
    *("[[keys]]", 'id = "k"', f'sha256 = "{"0" * 64}"', "[[models]]", 'name = "m"', 'engine = "fake"', "rows = 8"),
    *("[[meters]]", 'name = "w"', 'kind = "apc_outlet"', 'at = "10.0.0.9"', 'nodes = ["n1"]', "numbers = [1]"),
)


@given(st.dictionaries(st.integers(0, len(FULL) - 1), st.sampled_from(["", "7.5", '"?"', "[[1]]", "{ a = 1 }"])))
def test_whatever_is_wrong_in_a_file_is_named_by_its_key(wrong: dict[int, str]) -> None:
    lines = [
        f"{line.split(' = ')[0]} = {wrong[n]}" if wrong.get(n) and " = " in line else line
        for n, line in enumerate(FULL)
        if wrong.get(n) != "" or line.startswith("[")
    ]
    found = problems("\n".join([*lines, "last = 1"]))
    keys = {re.split(r"[: ]", problem)[0].split(".")[-1].split("[")[0] for problem in found}
    assert keys <= {line.split(" = ")[0] for line in [*FULL, "last"]}, found
    assert len(set(found)) == len(found)


def test_cross_field_rules_are_checked() -> None:
    text = GOOD.replace('path = "/tmp/x"', "") + (
        '[listen]\nhost = "0.0.0.0"\n[peers]\nsecret = "hunter2"\n'
        '[[peers.nodes]]\nid = "n1"\nurl = "ftp://x"\n[[models]]\nname = "m"\n[[models]]\nname = "m"\npath = "p"\n'
    )
    found = "\n".join(problems(text))
    for expected in (
        "listen.host: 0.0.0.0 is reachable from other machines",
        "peers.nodes: lists this node itself",
        "peers.nodes[0].url: must begin with http",
        "peers.secret: is a literal value",
        "models: duplicate name 'm'",
        "models[0].path: is required",
        "store.path: is required",
    ):
        assert expected in found
    assert "hunter2" not in found


def test_s3_secrets_must_be_references() -> None:
    text = GOOD.split("[store]")[0] + (
        '[store]\nkind = "s3"\nendpoint = "r2"\nbucket = "b"\naccess_key = "AKIA1234"\nsecret_key = "env:S"\n'
    )
    found = "\n".join(problems(text))
    assert "store.endpoint: invalid value 'r2': expected an http(s) URL" in found
    assert "store.access_key: is a literal value" in found
    assert "AKIA1234" not in found


@pytest.mark.parametrize(
    ("content", "why"), [(b"a = [", "invalid TOML"), (b"\xff\xfe", "cannot be read"), (None, "no such file")]
)
def test_an_unreadable_file_is_reported_with_its_reason(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "agent.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        config.load(path, AgentConfig, config_checks.check)


def test_the_aggregator_configuration_is_checked_too() -> None:
    text = (
        'rack = "r"\ntimezone = "Mars/Base"\n[store]\nkind = "directory"\npath = "p"\n[discord]\nalerts = "https://x"\n'
        '[[nodes]]\nid = "a"\n[[nodes]]\nid = "a"\nprice = -1\n'
    )
    with pytest.raises(ConfigError, match=r"nodes\[1\].price") as caught:
        config.parse(text, AggregatorConfig, aggregator_config.check, source="x")
    assert len(caught.value.problems) == 4


# ---- a file that is being written while it is read again ----


def settled(path: Path) -> AgentConfig:
    return config.load_settled(path, AgentConfig, config_checks.check)


def meanwhile(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """What somebody else does, one step each time that the reader waits."""
    todo = list(steps)

    def sleep(seconds: float) -> None:
        if todo:
            todo.pop(0)()

    monkeypatch.setattr("shared.config.time.sleep", sleep)


def test_half_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its beginnings is a valid one."""
    path, models = tmp_path / "agent.toml", [f'[[models]]\nname = "m{n}"\npath = "/m"\n' for n in range(9)]
    path.write_text(GOOD)

    def append(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    meanwhile(monkeypatch, *(partial(append, one) for one in models))
    assert len(settled(path).models) == 9


def test_a_file_that_is_moved_into_place_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when size and time are those of the one before."""
    path, new = tmp_path / "agent.toml", tmp_path / "new"
    path.write_text(GOOD)
    seen = path.stat()

    def replace() -> None:
        new.write_text(GOOD.replace("n1", "n7"))
        os.utime(new, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        new.replace(path)

    meanwhile(monkeypatch, replace)
    assert settled(path).node.id == "n7"


def test_a_file_that_is_gone_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.toml"
    meanwhile(monkeypatch, lambda: None, lambda: path.write_text(GOOD))
    assert settled(path).node.id == "n1"


def test_what_is_no_file_or_never_settles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SETTLE_TRIES", 2)
    with pytest.raises(ConfigError, match="is being written, or gone"):
        settled(tmp_path / "none.toml")
    fifo, folder, large, binary = (tmp_path / name for name in ("fifo", "folder", "large", "binary"))
    os.mkfifo(fifo)
    folder.mkdir()
    large.write_bytes(b"#" * ((4 << 20) + 1))
    binary.write_bytes(b"\xff\xfe")
    for path, words in ((fifo, "regular"), (folder, "directory|regular"), (large, "more than"), (binary, "utf-8")):
        with pytest.raises(ConfigError, match=words) as caught:
            settled(path)
        assert "Errno None" not in str(caught.value)


COMPLETE = """
[node]
id = "n1"
rack = "r"
[tls]
certificate = "/c"
key = "/k"
ca = "/a"
node_certificate = "/n"
node_key = "/m"
[peers]
secret = "env:A"
nodes = [{ id = "n2", url = "https://mini-2:8470" }]
[oidc]
issuer = "https://id.example.com"
ids = "team-[a-z]+"
audience = ["a"]
[disk_cache]
secret = "env:B"
[store]
kind = "s3"
endpoint = "https://s3.example.com"
bucket = "rack"
access_key = "env:C"
secret_key = "env:D"
[[models]]
name = "m"
path = "/m"
disk_cache_bytes = 1
[[meters]]
name = "p"
kind = "apc_outlet"
at = "10.0.0.9"
nodes = ["n1"]
numbers = [1]
"""
FOLDER = GOOD


def conditional(kind: Any, path: str = "") -> Iterator[str]:
    """Keys that the reference documents as required under a condition."""
    for field in msgspec.structs.fields(kind):
        at = f"{path}.{field.name}" if path else field.name
        inner = _struct_of(field.type)
        if inner is not None:
            yield from conditional(inner, f"{at}[0]" if _is_list(field.type) else at)
        elif _condition(field.type):
            yield at


@pytest.mark.parametrize("key", sorted(conditional(AgentConfig)))
def test_what_is_required_under_a_condition_is_so_and_is_documented(key: str) -> None:
    """The description says it, and the file without the key is refused with that key's name."""
    text = FOLDER if key == "store.path" else COMPLETE
    config.parse(text, AgentConfig, config_checks.check, source="x")
    name = key.rpartition(".")[2]
    table = key.rpartition(".")[0].replace("[0]", "")
    head, mark, rest = text.partition(f"[[{table}]]" if f"[[{table}]]" in text else f"[{table}]")
    without = head + mark + re.sub(rf"(?m)^{name} = .*\n", "", rest, count=1)
    assert without != text
    if key == "store.path":
        without += 'prefix = "x"\n'
    assert any(problem.startswith(f"{key}: ") for problem in problems(without)), problems(without)


@pytest.mark.parametrize(
    "url",
    ["http://mini-2:8470", "https://mini-2.local:8470/", "http://10.0.0.7:80", "http://[fd00::7]:8470", "http://a/b"],
)
def test_urls_of_nodes_are_accepted(url: str) -> None:
    assert config_checks._peer_url(url) == ""


@pytest.mark.parametrize(
    "url",
    [
        *("", "mini-2:8470", "ftp://x", "http://", "http://x:8470/v1", "https://x/v1/", "http://u:p@x:1"),
        *("http://x:8470?a=b", "http://x:8470#a", "http://x y:8470", "http://x:0", "HTTP://x", "http://a%2fb"),
        "http://x:99999",
    ],
)
def test_urls_at_which_no_node_can_be_called_are_refused(url: str) -> None:
    assert config_checks._peer_url(url)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ('kind = "s3"\nendpoint = "https://s3.example.com/rack"\nbucket = "rack"\n', "store.endpoint"),
        ('kind = "s3"\nendpoint = "https://"\nbucket = "rack"\n', "store.endpoint"),
        ('kind = "s3"\nendpoint = "s3.example.com"\nbucket = "rack"\n', "store.endpoint"),
        ('kind = "s3"\nendpoint = "https://s3.example.com"\nbucket = "a/b"\n', "store.bucket"),
        ('kind = "s3"\nendpoint = "https://s3.example.com"\nbucket = "ab"\n', "store.bucket"),
        ('bucket = "rack"\n', "store.kind"),
        ('access_key = "env:A"\n', "store.kind"),
        ('prefix = "a"\n', "store.path"),
        ('kind = "s3"\n', "store.bucket"),
    ],
)
def test_half_a_store_says_what_is_missing(table: str, key: str) -> None:
    found = problems(f'[node]\nid = "n1"\nrack = "r"\n[store]\n{table}')
    assert [one for one in found if one.startswith(f"{key}: ")], found
