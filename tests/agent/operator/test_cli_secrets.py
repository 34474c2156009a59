"""mlxrack-agent secrets: which edits of agent.toml it makes, and when it refuses to make one."""

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import cli
from agent.config import AgentConfig
from agent.config_checks import check
from agent.operator.cli_secrets import needed_by, with_both, without_old
from agent.policy.classes import CLASSES, TaskClass
from agent.policy.rules import KeyPolicy, Money, Rules
from shared.config import parse
from shared.errors import Refused

HEAD = '[node]\nid = "n1"\nrack = "r"\n'
OLD, NEW = "file:/etc/mlx rack/rack.secret", "file:/etc/mlx rack/rack.secret-2"
FORMS = [
    f'[peers]\nsecret = "{OLD}"\n',
    f'[peers]\nsecret="{OLD}" # the rack\n',
    f"[store]\npath = '/b'\n[peers]\n  secret   =   '{OLD}'\n  beat_s = 2\n[[peers.nodes]]\nid = 'n2'\nurl = 'http://[::1]:1'\n",
    f'peers.secret = "{OLD}"\npeers.beat_s = 2.0\n{HEAD}',
    f'peers = {{ secret = "{OLD}", beat_s = 2.0 }}\n{HEAD}',
    f'[peers]\nbeat_s = 2\n\n# secret = "{OLD}"\nsecret = "{OLD}"'.replace("# secret", "# the secret"),
    f'[peers]\r\nsecret = "{OLD}"\r\nbeat_s = 1.5\r\n',
    f'[disk_cache]\nsecret = "file:/another"\n[peers]\nsecret = "{OLD}"\n',
    f'[disk_cache]\nsecret = "{OLD}"\n[peers]\nsecret = "{OLD}"\n',
    f'# secret = "{OLD}"\n[peers]\nsecret = "{OLD}"\n',
]
"""Ways to write it."""
HARD = [f'[peers]\nsecret = """{OLD}"""\n', f'[peers]\n"secret" = "{OLD}"\n']
"""Ways that a program does not see through."""


def whole(text: str) -> str:
    return text if HEAD in text else HEAD + text


def read(text: str) -> AgentConfig:
    return parse(text, AgentConfig, check, source="agent.toml")


@pytest.mark.parametrize("form", FORMS)
def test_the_edit_changes_the_secrets_and_nothing_else(form: str) -> None:
    text = whole(form)
    both = with_both(text, OLD, NEW)
    assert (read(both).peers.secret, read(both).peers.old_secret) == (NEW, OLD)
    after, (begin, end) = without_old(both, OLD), text.rsplit(OLD, 1)
    expected = begin + NEW + end  # the rack's is the last, wherever else it is
    assert read(after) == read(expected)
    assert "old_secret" not in after
    kept = [line for line in text.splitlines() if line.startswith("#")]
    assert all(line in after for line in kept), "comments stay"


@pytest.mark.parametrize("form", HARD)
def test_where_it_is_not_sure_it_says_what_to_write_and_changes_nothing(form: str) -> None:
    with pytest.raises(Refused, match=r"edit agent\.toml yourself") as caught:
        with_both(whole(form), OLD, NEW)
    assert f'secret = "{NEW}"\nold_secret = "{OLD}"' in caught.value.message


def peer(node: str, state: str = "up", needs: bool | None = False) -> dict[str, Any]:
    return {"node": node, "state": state, "needs_old_secret": needs}


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        ([], ""),
        ([peer("a"), peer("b")], ""),
        ([peer("a"), peer("b", needs=True)], "b needs the old secret"),
        ([peer("a", needs=None), peer("b", needs=True)], "b needs the old secret"),
        ([peer("a", needs=None)], "a does not say now which secrets it has"),
        ([peer("a", state="down")], "a does not say now which secrets it has"),
        ([peer("a", state="suspect")], "a does not say now which secrets it has"),
    ],
)
def test_when_the_old_secret_may_be_forgotten(peers: list[dict[str, Any]], words: str) -> None:
    assert needed_by(peers, NEW).startswith(words)
    assert bool(needed_by(peers, NEW)) == bool(words)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    secret = tmp_path / "rack.secret"
    secret.write_text("a secret of the rack, 09f2c7d815\n")
    secret.chmod(0o600)
    path = tmp_path / "agent.toml"
    state = json.dumps(str(tmp_path / "state"))
    path.write_text(f'{HEAD}[paths]\nstate = {state}\n[peers]\nsecret = "file:{secret}"\n')
    path.chmod(0o640)
    return path


def run(config: Path, *verb: str) -> int:
    return cli.main([*verb, "--config", str(config)])


def test_on_a_node_that_does_not_run_it_edits_the_file_alone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = config.read_text()
    assert run(config, "secrets", "rotate", "--finish") == 1, "none was begun"
    assert run(config, "secrets", "rotate", "--dry-run") == 0
    assert "+old_secret" in capsys.readouterr().out
    assert config.read_text() == before
    assert [one.name for one in tmp_path.glob("rack*")] == ["rack.secret"]
    assert run(config, "secrets", "rotate") == 0
    out = capsys.readouterr().out
    assert "the agent is not running; it reads this when it starts" in out
    peers = read(config.read_text()).peers
    assert peers.secret == f"file:{tmp_path / 'rack.secret-2'}"
    assert peers.old_secret == f"file:{tmp_path / 'rack.secret'}"
    assert config.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "rack.secret-2").stat().st_mode & 0o777 == 0o600
    assert run(config, "check-config") == 0
    assert run(config, "secrets", "rotate", "--finish") == 69, "only a running agent knows who needs the old one"
    assert run(config, "secrets", "rotate") == 1
    assert "a rotation is under way" in capsys.readouterr().err
    assert read(config.read_text()).peers == peers


@pytest.mark.parametrize("given", ["none", "short", "loose"])
def test_a_new_secret_that_cannot_be_used_is_refused_before_anything_is_edited(
    config: Path, tmp_path: Path, given: str
) -> None:
    path, before = tmp_path / "given", config.read_text()
    if given != "none":
        path.write_text("short\n" if given == "short" else "a new secret of the rack, 4471aa0c8\n")
        path.chmod(0o644 if given == "loose" else 0o600)
    assert run(config, "secrets", "rotate", "--with", str(path)) == 78
    assert config.read_text() == before


@pytest.mark.parametrize("reference", ["env:RACK", "keychain:rack", "op://a/b/c"])
def test_what_is_in_no_file_is_explained(config: Path, reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    config.write_text(text[: text.index("secret")] + f'secret = "{reference}"\n')
    before = config.read_text()
    assert run(config, "secrets", "rotate") == 1
    said = capsys.readouterr().err
    assert "on every node set peers.secret to it and peers.old_secret to this one" in said
    assert ("cannot see a new env: variable" in said) == reference.startswith("env:")
    assert config.read_text() == before


def test_a_new_key_says_how_to_replace_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new-key", "office"]) == 0
    out = capsys.readouterr().out
    assert "mlxrack-agent reload" in out
    assert "to replace a key of office" in out
    config.write_text(config.read_text() + out[out.index("[[keys]]") :] * 2)
    assert run(config, "check-config") == 0, "two tables of one id"


# ---- what a new key may do ----

COUNTS = st.integers(0, 10**9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(CLASSES), max_size=3, unique=True),
    st.lists(st.sampled_from(("chat", "qwen3-8b", "a.b_c")), max_size=3, unique=True),
    st.sampled_from(("", "2027-01-31", "2028-02-29")),
    st.tuples(COUNTS, COUNTS),
    st.tuples(st.sampled_from(("", "0.01", "2.50")), st.sampled_from(("", "100"))),
    st.tuples(st.booleans(), st.booleans()),
)
def test_the_lines_for_the_policy_say_what_was_asked_for(
    capsys: pytest.CaptureFixture[str],
    classes: list[TaskClass],
    models: list[str],
    expires: str,
    limits: tuple[int, int],
    usd: tuple[str, str],
    flags: tuple[bool, bool],
) -> None:
    words = [word for name in classes for word in ("--class", name)]
    words += [word for name in models for word in ("--model", name)]
    words += ["--expires", expires, "--requests-per-minute", str(limits[0]), "--tokens-per-minute", str(limits[1])]
    words += ["--usd-per-day", usd[0], "--usd-per-month", usd[1]]
    words += [word for word, given_ in zip(("--sensitive", "--inside"), flags, strict=True) if given_]
    assert cli.main(["new-key", "web-shop", *words]) == 0
    _, _, said = capsys.readouterr().out.partition("# policy.toml")
    policy = KeyPolicy(
        id="web-shop",
        models=tuple(models or ("*",)),
        classes=tuple(classes or CLASSES),
        expires=expires,
        requests_per_minute=limits[0],
        tokens_per_minute=limits[1],
        day=Money(usd=usd[0]),
        month=Money(usd=usd[1]),
        sensitive=flags[0],
        outside=not flags[1],
    )
    found = msgspec.convert(tomllib.loads(f"# {said}"), Rules)
    assert found == Rules(keys=(policy,) if policy != KeyPolicy(id="web-shop") else ())


@pytest.mark.parametrize(
    "words",
    [
        ("--expires", "tomorrow"),
        ("--requests-per-minute", "-1"),
        ("--usd-per-day", "-3"),
        ("--usd-per-month", "NaN"),
        ("--model", "../x"),
    ],
)
def test_a_key_that_no_policy_would_take_is_not_made(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert cli.main(["new-key", "web-shop", *words]) != 0
    assert "mlxr-" not in capsys.readouterr().out
