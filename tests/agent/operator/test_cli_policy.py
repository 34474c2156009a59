"""mlxrack-agent policy: what a terminal sees, without an agent that runs."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import cli
from agent.operator.admin_client import AdminClient
from agent.policy.rules import KeyPolicy, Rules, digest
from tests.agent.policy.made import facts, permission
from tests.agent.policy.test_checking import example
from tests.agent.policy.test_replay import at_rack, overflowed

POLICY = """version = "v1"
[[keys]]
id = "batch"
task_class = "ROUTINE"
[[routes]]
task_class = "ROUTINE"
model = "small"
[[providers]]
name = "cloud"
kind = "openai"
secret = "env:K"
usd_per_day = "5"
[[allow]]
provider = "cloud"
use = "gpt-5"
keys = ["batch"]
classes = ["ROUTINE"]
models = ["*"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "agent.toml").write_text(
        f'[node]\nid = "n1"\nrack = "r"\n[paths]\nstate = "{tmp_path / "s"}"\n'
        f'[policy]\npath = "{tmp_path / "policy.toml"}"\n'
        f'[[keys]]\nid = "batch"\nsha256 = "{"0" * 64}"\n'
    )
    return tmp_path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> tuple[int, str]:
        status = cli.main(["policy", *words, "--config", str(home / "agent.toml")])
        seen = capsys.readouterr()
        return status, seen.out + seen.err

    return run


def test_check_says_that_a_file_is_valid_or_everything_that_is_wrong(run: Any, home: Path) -> None:
    status, said = run("check")
    assert status == 0
    assert "valid; version v1 (" in said
    assert "1 key, 1 route, 1 provider, 1 permission" in said
    bad = home / "bad.toml"
    bad.write_text('version = ""\n[[keys]]\nid = "a"\nexpires = "soon"\n')
    status, said = run("check", str(bad))
    assert status == os.EX_CONFIG
    assert "2 problems" in said
    assert "keys[0].expires: must be a day" in said
    assert run("check", str(home / "none.toml"))[0] == os.EX_CONFIG


def test_check_warns_of_what_is_probably_not_meant(run: Any, home: Path) -> None:
    (home / "policy.toml").write_text(POLICY.replace('["batch"]', '["bacth"]'))
    status, said = run("check")
    assert status == 0
    assert "warning: allow[0].keys: agent.toml has no [[keys]] with the id 'bacth'" in said
    found = json.loads(run("check", "--json")[1])
    assert set(found) == {"path", "version", "digest", "warnings"}
    assert len(found["warnings"]) == 1


def test_check_without_a_file_to_check_says_so(run: Any, home: Path) -> None:
    config = home / "agent.toml"
    config.write_text(config.read_text().replace("[policy]\npath", "[model_store]\npath"))
    status, said = run("check")
    assert status == 1
    assert "names no policy file" in said


def test_explain_says_where_a_request_would_go_and_why(run: Any, home: Path) -> None:
    status, said = run("explain", "--key", "batch", "--model", "auto")
    assert status == 0
    for part in (
        "version v1",
        "key         batch\n",
        "class       ROUTINE: the policy for the key names it",
        "decision    may leave, redacted",
        "1. the rack: small",
        "2. cloud (outside): gpt-5, when none before it takes the request",
        "allow[0]    cloud (gpt-5): permits it",
    ):
        assert part in said, part
    assert "the key is not in its keys" in run("explain", "--key", "web", "--model", "small", "--class", "routine")[1]
    (home / "policy.toml").write_text(POLICY.replace('task_class = "ROUTINE"\n[[routes]]', "[[routes]]"))
    assert "the class was guessed" in run("explain", "--key", "batch", "--model", "small", "--json")[1]


def test_explain_takes_header_body_and_options(run: Any, home: Path) -> None:
    body = home / "request.json"
    body.write_text(
        json.dumps(
            {
                "model": "small",
                "messages": [{"role": "user", "content": "x" * 4000}],
                "metadata": {"task_class": "SENSITIVE"},
                "logprobs": True,
            }
        )
    )
    found = json.loads(run("explain", "--key", "batch", "--file", str(body), "--json")[1])
    assert found["decision"] == "allow"
    assert found["sensitive"] == ["its caller says so"]
    assert "policy.toml: version v1 (" in found["policy"]
    header = ("--header", "X-Task-Class: reasoning")
    said = json.loads(run("explain", "--model", "small", *header, "--json")[1])
    assert (said["task_class"], said["class_from"]) == ("REASONING", "the header names it")
    assert run("explain", "--file", str(body), *header)[0] == 0
    said = run("explain", "--file", str(body), "--header", "X-Task-Class: fast")
    assert said[0] == 1
    assert "X-Task-Class: expected one of ROUTINE" in said[1]
    assert json.loads(run("explain", "--model", "small", "--sensitive", "--json")[1])["sensitive"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name a request"),
        (("--model", "m", "--header", "nothing"), "a header is given as"),
        (("--model", "m", "--class", "fast"), "--class: expected one of"),
        (("--model", "class:fast"), "model: expected"),
        (("--model", "m", "--policy", "none.toml"), "no such file"),
        (("--file", "none.json"), "No such file"),
    ],
)
def test_what_cannot_be_explained_is_said(run: Any, words: tuple[str, ...], said: str) -> None:
    status, text = run("explain", *words)
    assert status != 0
    assert said in text


def test_a_body_that_the_api_refuses_is_refused(run: Any, home: Path) -> None:
    body = home / "request.json"
    body.write_text('{"model": "m", "messages": [{"role": "king", "content": "my secret"}]}')
    status, said = run("explain", "--file", str(body))
    assert status == 1
    assert "my secret" not in said
    body.write_text('{"model": "m", "input": "text"}')
    assert "embeddings need a model by name" in run("explain", "--file", str(body), "--model", "auto")[1]
    body.write_text('{"model": "m", "prompt": "text"}')
    assert run("explain", "--file", str(body))[0] == 0


def test_show_and_explain_ask_the_running_agent(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = example()
    told = {
        "path": "/p.toml",
        "version": rules.version,
        "digest": digest(rules),
        "since_ms": 1795514400000,
        "problem": "",
        "rules": msgspec.to_builtins(rules),
        "warnings": ["the policy file is not in force: gone"],
    }
    monkeypatch.setattr(AdminClient, "policy", lambda _: json.loads(json.dumps(told)))
    status, said = run("show")
    assert status == 0
    for part in (
        f"version 2026-12-01 ({digest(rules)}), in force since 2026-11-24",
        "warning: the policy file",
        "/p.toml",
    ):
        assert part in said, part
    assert "50.00 USD a month; last day 2027-06-30" in said
    assert "https://studio.local:1234/v1" in said
    assert json.loads(run("--json")[1])["rules"]["allow"][0]["use"] == "gpt-5-mini"
    assert "in force: version 2026-12-01" in run("explain", "--model", "qwen3-8b")[1]
    assert "in force" not in run("explain", "--model", "qwen3-8b", "--policy", told["path"])[1]


def test_show_without_an_agent_says_how_to_start_it(run: Any) -> None:
    status, said = run("show")
    assert status == os.EX_UNAVAILABLE
    assert "has this agent been started" in said


# ---- replay ----


def recorded(path: Path, count: int = 3) -> None:
    lines = [
        {"t_ms": 4102444800000 + n, "facts": facts(key_id="batch"), "outcome": overflowed(n) if n else at_rack(n)}
        for n in range(count)
    ]
    path.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines) + b"\nnot json\n\n")


def test_replay_says_what_another_policy_changes(run: Any, home: Path) -> None:
    recorded(home / "decisions.jsonl")
    other = home / "next.toml"
    other.write_text('version = "next"\n')
    words = ("replay", "--policy", str(other), "--from", str(home / "decisions.jsonl"))
    status, said = run(*words)
    assert status == 0
    for part in (
        "3 requests since",
        "1 lines could not be read",
        "outside cloud -> rack",
        "req_1",
        "0.02",
        "may leave: 3 before, 0",
    ):
        assert part in said, part
    found = json.loads(run(*words, "--json")[1])
    assert (found["requests"], found["unread"], found["may_leave_after"]) == (3, 1, 0)
    assert found["moves"][0]["requests"] == 2
    assert found["old"] != found["new"]
    assert "nothing changes" in run("replay", "--from", str(home))[1], (
        "every *.jsonl of a folder, under the same policy"
    )


def test_replay_takes_what_was_recorded_since(run: Any, home: Path) -> None:
    recorded(home / "decisions.jsonl")
    for words in (("--since", "2101-01-01T00:00", "--from", str(home)), ("--from", str(home / "s")), ()):
        status, said = run("replay", *words)
        assert status != 0
        assert "no decisions recorded" in said or "No such file" in said


def test_the_documented_line_of_a_recorded_decision_is_read(run: Any, home: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/policy.md").read_text(encoding="utf-8")
    line = page.split("```json\n")[1].split("```")[0]
    (home / "one.jsonl").write_text(json.dumps(json.loads(line)))
    assert "1 requests" in run("replay", "--since", "2026-01-01T00:00", "--from", str(home / "one.jsonl"))[1]


def test_an_unknown_key_of_a_policy_in_force_elsewhere_is_no_reason_to_fail(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent of another version may know more than this program."""
    told = {"version": "v", "digest": "d", "since_ms": 0, "path": "", "warnings": [], "rules": {"newer": 1}}
    monkeypatch.setattr(AdminClient, "policy", lambda _: told)
    status, said = run("explain", "--model", "small")
    assert status == 1
    assert "of another version" in said


def test_limits_of_keys_are_shown(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(keys=(KeyPolicy(id="a", requests_per_minute=7, sensitive=True),), allow=())
    told = {
        "version": "v",
        "digest": "d",
        "since_ms": 0,
        "path": "",
        "warnings": [],
        "rules": msgspec.to_builtins(rules),
    }
    monkeypatch.setattr(AdminClient, "policy", lambda _: told)
    assert "7 requests a minute; all requests are SENSITIVE" in run("show")[1]
    assert permission().use not in run("show")[1]
