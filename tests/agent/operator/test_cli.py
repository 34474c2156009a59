"""The command line, the log viewer and the service files."""

import json
import os
import plistlib
import re
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from agent import cli
from agent.config import AgentConfig, hash_key
from agent.operator import checks, install, logview
from agent.operator.admin_client import AdminClient
from shared.errors import Refused

CONFIG = """[node]
id = "n1"
rack = "r"
[store]
kind = "directory"
path = "{0}/b"
[paths]
state = "{0}/s p"
logs = "{0}/logs"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for verb in (
        "run",
        "serve",
        "completion",
        "status",
        "models",
        "load",
        "unload",
        "swap",
        "pin",
        "unpin",
        "probes",
        "logs",
        "doctor",
        "sample",
        "install",
        "new-key",
    ):
        assert re.search(rf"^\s+{verb}\s", text, re.MULTILINE), verb


@pytest.mark.parametrize("words", [["frobnicate"], [], ["swap", "only-one"], ["logs", "--level", "loud"]])
def test_wrong_usage_exits_64(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == os.EX_USAGE
    assert "see --help" in capsys.readouterr().err


def test_a_bad_configuration_exits_78_with_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('[node]\nid = "n 1"\n[listen]\nport = "x"\n')
    assert cli.main(["run", "--config", str(bad)]) == os.EX_CONFIG
    err = capsys.readouterr().err
    assert "node.rack: is required" in err
    assert "listen.port: expected int" in err
    assert "Traceback" not in err


def test_status_without_an_agent_tells_how_to_start_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--config", str(config)]) == os.EX_UNAVAILABLE
    assert "has this agent been started" in capsys.readouterr().err


def test_check_config_prints_paths(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "agent.jsonl" in out
    assert "shared" not in out


def test_check_config_tells_which_keys_share_a_prompt_cache(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = '[[keys]]\nid = "{}"\nsha256 = "' + "0" * 64 + '"\ncache_group = "{}"\n'
    before = config.read_text()
    config.write_text(before + key.format("web", "team") + key.format("bot", "team") + key.format("alone", ""))
    assert cli.main(["check-config", "--config", str(config)]) == 0
    assert "prompt cache team is shared by the keys web, bot\n" in capsys.readouterr().out
    config.write_text(before + key.format("web", "te am") + key.format("bot", "team") + key.format("bot", ""))
    assert cli.main(["check-config", "--config", str(config)]) == os.EX_CONFIG
    said = capsys.readouterr().err
    assert "keys[0].cache_group 'te am': use 1 to 63 letters" in said
    assert "keys[2].cache_group: must be that of the other keys with the id 'bot'" in said


def test_one_node_needs_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'[node]\nid = "n1"\nrack = "r"\n[paths]\nstate = "{tmp_path / "s"}"\n')
    assert cli.main(["check-config", "--config", str(path)]) == 0
    args = cli._parser().parse_args(["status", "--config", str(path)])
    config, state = cli._config_and_state(args)
    assert config.store.path == str(state / "bucket"), "never the working directory"
    assert cli.main(["models", "push", str(tmp_path), "m", "--config", str(path)]) == 1
    assert "no [store] is configured" in capsys.readouterr().err
    with path.open("a") as file:
        file.write('[peers]\nsecret = "env:X"\nnodes = [{ id = "n2", url = "http://127.0.0.1:1" }]\n')
    assert cli.main(["check-config", "--config", str(path)]) == os.EX_CONFIG
    assert "store.path: is required with peers" in capsys.readouterr().err


def test_a_machine_without_a_configuration_is_a_node_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.CONFIG_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert cli.main(["models", "list"]) == 0
    assert "the model store is empty" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "looking writes nothing"
    assert cli.main(["run"]) == os.EX_CONFIG, "a daemon is configured"
    for verb in (["claim"], ["claim", "take"], ["secrets", "rotate"], ["check-config"], ["install", "--dry-run"]):
        assert cli.main(verb) == os.EX_CONFIG, "what is done under a node's name needs one"
    (tmp_path / "agent.toml").write_text("[node]\n")
    assert cli.main(["models", "list"]) == os.EX_CONFIG, "a configuration that is there counts"


def test_sample_prints_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["memory_total_bytes"] > 0


def test_a_new_key_matches_its_hash(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new-key", "web-shop", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    key, stored = re.search(r"mlxr-\S+", out), re.search(r'sha256 = "(\w+)"', out)
    assert key is not None
    assert stored is not None
    assert hash_key(key[0]) == stored[1]
    assert "cache_group" not in out
    assert cli.main(["new-key", "web-shop", "--cache-group", "shops", "--config", str(config)]) == 0
    assert 'cache_group = "shops"' in capsys.readouterr().out


def test_install_dry_run_prints_valid_files(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install", "--dry-run", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    plist = plistlib.loads(out[out.index("<?xml") : out.index("</plist>") + 8].encode())
    assert plist["Label"] == "dev.mlxrack.agent"
    assert plist["ProcessType"] == "Interactive"
    assert (plist["KeepAlive"], plist["RunAtLoad"]) == (True, True)
    assert plist["ExitTimeOut"] > 60, "launchd waits longer than the drain takes"
    program, run, flag, path = plist["ProgramArguments"]
    assert Path(program).is_absolute()
    assert Path(path).is_absolute()
    assert (run, flag, plist["UserName"]) == ("run", "--config", "_mlxrack")
    assert "/usr/bin/dscl . -create /Users/_mlxrack" in out, "a Mac without the user gets it"
    assert "newsyslog" not in out


def test_a_service_needs_its_own_folders(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().split("logs =")[0])
    assert cli.main(["install", "--dry-run", "--config", str(config)]) == 1
    assert "paths.state and paths.logs" in capsys.readouterr().err


def test_an_uncreatable_folder_is_a_one_line_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "s p").write_text("a file where the state folder should be")
    assert cli.main(["run", "--config", str(config)]) == os.EX_IOERR
    err = capsys.readouterr().err
    assert "s p" in err
    assert "Traceback" not in err


def test_an_unusual_path_is_quoted_as_one_string(tmp_path: Path) -> None:
    config = msgspec.convert({"node": {"id": "n", "rack": "r"}, "store": {"path": "x"}}, AgentConfig)
    odd = tmp_path / "a <b> & 'c'.toml"
    text = install.render_plist(
        config, program=Path("/opt/x y/run"), config_path=odd, user="u", home=Path("/h"), logs=Path("/l")
    )
    assert str(odd) == plistlib.loads(text.encode())["ProgramArguments"][3]


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="would install")
def test_install_outside_macos_prints_instructions(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install", "--config", str(config)]) == os.EX_UNAVAILABLE
    assert "--dry-run shows" in capsys.readouterr().err


NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def entry(minute: int, level: str = "info", **more: object) -> str:
    return json.dumps({"timestamp": f"2026-11-21T11:{minute:02d}:00Z", "level": level, "event": f"e{minute}", **more})


def shown(path: Path, which: logview.Filter) -> list[str]:
    return [re.sub(r"^\S+ \S+ \S+\s+(\S+).*", r"\1", line) for line in logview.lines(path, which, follow=False)]


def test_logs_are_filtered(tmp_path: Path) -> None:
    log = tmp_path / "agent.jsonl"
    (tmp_path / "agent.jsonl.1").write_text(entry(1) + "\n" + entry(2, "error") + "\n")
    log.write_text(entry(30, request="req_1") + "\n" + "not json\n" + entry(50, "warning") + "\n" + '{"half')
    assert shown(log, logview.Filter()) == ["e1", "e2", "e30", "e50"]
    assert shown(log, logview.Filter(level="warning")) == ["e2", "e50"]
    assert shown(log, logview.Filter(request="req_1")) == ["e30"]
    assert shown(log, logview.Filter(since=logview.parse_since("15m", NOW))) == ["e50"]


@pytest.mark.parametrize(
    ("skew_ms", "said"),
    [(None, []), (1_900, ["ok"]), (-600_000, ["warning: 600 s behind"]), (3_000, ["warning: 3 s ahead of"])],
)
def test_doctor_checks_the_clock(skew_ms: int | None, said: list[str]) -> None:
    found = [one for one in checks.store("s3", checks.StoreFact(skew_ms=skew_ms)) if one.what == "clock"]
    assert [one.verdict for one in found] == [text.partition(":")[0] for text in said]
    assert all(text.partition(": ")[2] in one.seen for one, text in zip(found, said, strict=True))


def test_logs_are_followed_across_rotation(tmp_path: Path) -> None:
    log = tmp_path / "agent.jsonl"
    log.write_text(entry(1) + "\n")
    rounds = iter(range(3))

    def until() -> bool:
        turn = next(rounds)
        if turn == 0:
            with log.open("a") as file:
                file.write(entry(2) + "\n")  # not polled since
            log.rename(tmp_path / "agent.jsonl.1")
            log.write_text(entry(3) + "\n")
        return turn == 2

    events = [line.split()[3] for line in logview.lines(log, logview.Filter(), follow=True, until=until)]
    assert events == ["e1", "e2", "e3"]


@pytest.mark.parametrize("text", ["soon", "5", "5y", ""])
def test_an_invalid_span_is_rejected(text: str) -> None:
    with pytest.raises(Refused, match="--since"):
        logview.parse_since(text, NOW)


def test_spans_and_times_are_parsed() -> None:
    assert datetime(2026, 11, 21, 11, 58, 30, tzinfo=UTC) == logview.parse_since("90s", NOW)
    assert datetime(2026, 11, 19, 12, 0, tzinfo=UTC) == logview.parse_since("2d", NOW)
    assert datetime(2026, 11, 20, 8, 0, tzinfo=UTC) == logview.parse_since("2026-11-20T08:00:00+00:00", NOW)


def test_models_are_pulled_listed_and_removed(
    config: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = ["--config", str(config)]
    assert cli.main(["models", "pull", str(tiny_model), "--name", "tiny", *option]) == 0
    said = capsys.readouterr()
    assert 'to serve it: path = "store:tiny@' in said.out
    assert "%" not in said.err, "progress is for a terminal"
    assert cli.main(["models", "list", "--json", *option]) == 0
    (stored,) = json.loads(capsys.readouterr().out)["stored"]
    assert stored["name"] == "tiny"
    assert cli.main(["models", "push", str(tiny_model), "shared", *option]) == 0
    assert cli.main(["models", "pull", "bucket:shared", "--json", *option]) == 0
    pulled = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert pulled["version"] == stored["version"]
    assert cli.main(["models", *option]) == 0
    out = capsys.readouterr().out
    assert f"store:shared@{stored['version']}" in out
    assert cli.main(["models", "remove", "tiny", *option]) == 0
    assert cli.main(["models", "remove", f"shared@{stored['version']}", *option]) == 0
    assert cli.main(["models", *option]) == 0
    assert "the model store is empty" in capsys.readouterr().out


def test_files_that_a_model_was_swapped_to_are_not_removed(
    config: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    option = ["--config", str(config)]
    assert cli.main(["models", "pull", str(tiny_model), "--name", "tiny", *option]) == 0
    orders = {"swap": {"table": {"path": "store:tiny"}}, "resident": None, "pinned": None}
    monkeypatch.setattr(AdminClient, "status", lambda _: {"models": []})
    monkeypatch.setattr(AdminClient, "orders", lambda _: {"orders": [{"model": "m", "orders": orders}]})
    assert cli.main(["models", "remove", "tiny", *option]) == 1
    assert "m was swapped to it; end that with `mlxrack-agent orders clear m`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["models", "pull", "/no/such/folder"], "no such folder"),
        (["models", "pull", "bucket:nothing"], "holds none of that name, it holds no model at all; upload it"),
        (["models", "pull", "bucket:not a name"], "use 1 to 63 letters"),
        (["models", "pull", "bucket:x@0123456789abcdef"], "upload it with `mlxrack-agent models push"),
        (["models", "remove", "nothing"], "it is not in the store"),
        (["models", "remove", "nothing@v1"], "it is not in the store"),
        (["models", "push", "/no/such/folder", "x"], "no such folder"),
        (["models", "push", ".", "no model"], "use 1 to 63 letters"),
    ],
)
def test_failed_pulls_and_removals_report_the_reason(
    config: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--config", str(config)]) == 1
    err = capsys.readouterr().err
    assert why in err
    assert "Traceback" not in err
