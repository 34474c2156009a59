"""Configuration: every problem in one message, with the path of its key."""

from pathlib import Path

import pytest

from agent import config as agent_config
from agent.config import AgentConfig
from aggregator import config as aggregator_config
from aggregator.config import AggregatorConfig
from shared import config
from shared.config import ConfigError

GOOD = '[node]\nid = "n1"\nrack = "r"\n[store]\nkind = "directory"\npath = "/tmp/x"\n'


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, AgentConfig, agent_config.check, source="agent.toml")
    return caught.value.problems


def test_a_good_file_is_read() -> None:
    read = config.parse(GOOD, AgentConfig, agent_config.check, source="agent.toml")
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
        config.load(path, AgentConfig, agent_config.check)


def test_the_aggregator_configuration_is_checked_too() -> None:
    text = (
        'rack = "r"\ntimezone = "Mars/Base"\n[store]\nkind = "directory"\npath = "p"\n[discord]\nalerts = "https://x"\n'
        '[[nodes]]\nid = "a"\n[[nodes]]\nid = "a"\nprice = -1\n'
    )
    with pytest.raises(ConfigError, match=r"nodes\[1\].price"):
        config.parse(text, AggregatorConfig, aggregator_config.check, source="x")
    with pytest.raises(ConfigError) as caught:
        config.parse(text.replace("price = -1", ""), AggregatorConfig, aggregator_config.check, source="x")
    assert len(caught.value.problems) == 3
