"""mlxrack-agent audit: what it says of a log, its exit status, and what a SIEM gets."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli
from agent.audit import cef, disk
from agent.audit.entry import Answered, Entry
from agent.config import AgentConfig
from agent.config import Audit as Settings
from agent.operator import doctor
from agent.policy.facts import Facts
from shared.config import parse
from shared.store_dir import DirectoryStore
from tests.agent.audit.test_shipping import shipper, written


@pytest.fixture
def node(tmp_path: Path) -> list[str]:
    """A node whose log has two closed files, both shipped, and the options that name it."""
    state = tmp_path / "state"
    asyncio.run(written(state / "audit", 3, 2).close())
    shipper(state / "audit", DirectoryStore(tmp_path / "bucket")).drain(disk.segments(state / "audit"))
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[node]\nid = "n1"\nrack = "r"\n[paths]\nstate = {json.dumps(str(state))}\n[listen]\nport = 1\n'
        f'[store]\nkind = "directory"\npath = {json.dumps(str(tmp_path / "bucket"))}\n'
    )
    return ["--config", str(config)]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    status = cli.main(list(args))
    return status, capsys.readouterr().out


def edit(tmp_path: Path, number: int, before: bytes, after: bytes) -> str:
    path = disk.segments(tmp_path / "state/audit")[number].path
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))
    return path.name


def test_the_summary_without_an_agent(node: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "audit", *node)
    assert status == 0
    assert "5 entries in 3 files" in out
    assert "up to line 7" in out
    assert "the agent is not running" in out
    status, out = run(capsys, "audit", *node, "--json")
    said = json.loads(out)
    assert (said["entries"], said["shipped"]["seq"], said["first_ms"]) == (5, 7, 1_793_000_000_001)


def test_a_whole_log(node: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "audit", "verify", *node) == (0, "whole: lines 1 to 8 in 3 files\n")
    assert run(capsys, "audit", "verify", "--bucket", *node)[0] == 0
    status, out = run(capsys, "audit", "verify", "--json", *node)
    said = json.loads(out)
    assert (status, said["ok"], said["lines"], said["fault"]) == (0, True, 8, None)


def test_a_changed_line_is_named_and_the_exit_status_says_so(
    node: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = edit(tmp_path, 1, b'"cost_micro":4', b'"cost_micro":3')
    assert run(capsys, "audit", "verify", *node) == (1, f"{name}, line 2: was changed\n")
    status, out = run(capsys, "audit", "verify", "--json", *node)
    assert (status, json.loads(out)["fault"]) == (1, {"file": name, "line": 2, "what": "was changed"})


def test_a_copied_folder_is_checked_without_a_node_of_that_name(
    node: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (tmp_path / "state/audit").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert run(capsys, "audit", "verify", str(copy), *node)[0] == 0
    (copy / "extra.txt").write_text("hello")
    assert run(capsys, "audit", "verify", str(copy), *node) == (1, "extra.txt: is not a file of this log\n")
    (copy / "extra.txt").unlink()
    (copy / ".DS_Store").write_text("of the Finder")
    assert run(capsys, "audit", "verify", str(copy), *node)[0] == 0
    (copy / disk.TIP).unlink()
    assert run(capsys, "audit", "verify", str(copy), *node)[0] == 1


def test_what_only_the_bucket_knows(node: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The node's files were replaced by a log that is whole in itself: by one that began anew, and by one with the same
    id, computed anew."""
    forged = tmp_path / "forged"
    log = written(forged, 3, 2)
    asyncio.run(log.close())
    chain = log.status()["chain"]
    for path in (tmp_path / "state/audit").iterdir():
        path.unlink()
    for path in forged.iterdir():
        (tmp_path / "state/audit" / path.name).write_bytes(path.read_bytes())
    assert run(capsys, "audit", "verify", *node)[0] == 0, "nothing on the disk can tell"
    status, out = run(capsys, "audit", "verify", "--bucket", *node)
    assert (status, "another log of this node" in out, chain in out) == (0, True, False)
    (there,) = (tmp_path / "bucket/audit/v1/node=n1").iterdir()
    there.rename(there.with_name(f"c{chain}"))
    first = disk.segments(tmp_path / "state/audit")[0].path.name
    status, out = run(capsys, "audit", "verify", "--bucket", *node)
    assert (status, out) == (1, f"{first}, line 1: differs from what was shipped to the bucket\n")


def test_export_and_show(node: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "audit", "export", "--since", "2026-01-01T00:00", *node)
    entries = [json.loads(line) for line in out.splitlines()]
    assert [one["cost_micro"] for one in entries] == [1, 2, 3, 4, 5]
    assert {one["line"] for one in entries} == {"entry"}
    _, out = run(capsys, "audit", "export", "--since", "2026-01-01T00:00", "--format", "cef", *node)
    assert all(line.startswith("CEF:0|mlxrack|agent|") for line in out.splitlines())
    _, out = run(capsys, "audit", "show", entries[2]["request"], "--json", *node)
    assert json.loads(out) == entries[2]
    assert run(capsys, "audit", "show", "req_unknown", *node)[0] == 1
    assert run(capsys, "audit", "export", "--since", "2999-01-01T00:00", *node) == (0, "")


def test_export_follows(node: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent", "audit", "export", "--follow", "--since", "2026-01-01T00:00", *node]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ending = threading.Timer(60, process.kill)
    ending.start()
    try:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline())["cost_micro"] for _ in range(5)] == [1, 2, 3, 4, 5]
        path = disk.segments(tmp_path / "state/audit")[-1].path
        line = disk.segments(tmp_path / "state/audit")[0].path.read_bytes().splitlines(keepends=True)[1]
        with path.open("ab") as file:
            file.write(line[:50])
            file.flush()
            file.write(line[50:])
        assert json.loads(process.stdout.readline())["cost_micro"] == 1
    finally:
        ending.cancel()
        process.kill()
        process.wait(timeout=60)
        process.stdout.close() if process.stdout else None


def test_without_a_log_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'[node]\nid = "n1"\nrack = "r"\n[paths]\nstate = {json.dumps(str(tmp_path / "s"))}\n')
    assert cli.main(["audit", "--config", str(config)]) == 1
    assert "has this agent been started" in capsys.readouterr().err


def test_doctor_looks_at_the_end_of_the_log(node: list[str], tmp_path: Path) -> None:
    config = parse(Path(node[1]).read_text(), AgentConfig, lambda _: (), source="agent.toml")
    folder = tmp_path / "state/audit"
    assert doctor._audit(config, folder)[1:3] == (
        "ok",
        "whole at its end, line 8; `mlxrack-agent audit verify` checks all",
    )
    edit(tmp_path, 1, b'"cost_micro":4', b'"cost_micro":3')
    assert doctor._audit(config, folder).verdict == "problem"
    assert doctor._audit(config, tmp_path / "none").verdict == "ok"
    off = msgspec.structs.replace(config, audit=Settings(enabled=False))
    assert doctor._audit(off, folder)[1::2] == ("warning", "audit.enabled")


# ---- CEF ----

FULL = Entry(
    kind="ended",
    t_ms=1_793_000_000_123,
    request=f"req_{'ab' * 12}",
    node="n1",
    facts=Facts(key_id="team", model="chat", task_class="REASONING", sensitive=("label", "taint")),
    sensitive=True,
    policy="2026-12-01",
    policy_digest="ab" * 6,
    decision="redact",
    answered=Answered(category="outside", provider="openai", model="gpt-x"),
    fallback="full",
    redacted={"email": 2, "card": 1},
    outcome="ok",
    prompt_tok=100,
    cost_micro=1234,
    currency="USD",
    total_us=120_000,
    status=200,
)


def unescaped(text: str) -> dict[str, str]:
    """The extension of a CEF line as a SIEM reads it."""
    found = re.findall(r"(?:^| )(\w+)=((?:\\.|[^\\=])*?)(?= \w+=|$)", text)
    return {key: re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), value) for key, value in found}


def test_an_entry_as_cef() -> None:
    line = cef.line(FULL, "1.2")
    head, _, extension = line.rpartition("|")
    assert head == "CEF:0|mlxrack|agent|1.2|ended:redact|request ok|1"
    told = unescaped(extension)
    assert told == {
        "rt": "1793000000123",
        "externalId": FULL.request,
        "dvchost": "n1",
        "act": "redact",
        "outcome": "ok",
        "suser": "team",
        "cs1Label": "taskClass",
        "cs1": "REASONING",
        "cs2Label": "model",
        "cs2": "chat",
        "cs3Label": "sensitive",
        "cs3": "label,taint",
        "cs4Label": "policy",
        "cs4": "2026-12-01/abababababab",
        "cs5Label": "place",
        "cs5": "outside",
        "dhost": "openai",
        "destinationServiceName": "gpt-x",
        "cs6Label": "fallback",
        "cs6": "full",
        "cn1Label": "promptTokens",
        "cn1": "100",
        "cn3Label": "redactions",
        "cn3": "3",
        "cfp1Label": "cost",
        "cfp1": "0.001234",
        "start": "1793000000003",
        "end": "1793000000123",
    }
    refused = Entry(
        kind="ended", t_ms=1, request="", node="n1", code="audit_unavailable", outcome="refused", status=503
    )
    assert cef.line(refused, "1").startswith("CEF:0|mlxrack|agent|1|ended:audit_unavailable|request refused|8|rt=1 ")


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_a_file_was_made_to_say_is_one_line_with_its_fields(name: str, code: str) -> None:
    """What verify would find may be exported before."""
    entry = msgspec.structs.replace(FULL, code=code, answered=Answered(category="rack", node=name))
    line = cef.line(entry, "1|2")
    assert "\n" not in line
    assert "\r" not in line
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", line)
    assert len(parts) >= 8
    extension = line[re.match(r"CEF:0(?:\|(?:\\.|[^\\|])*){6}\|", line).end() :]  # type: ignore[union-attr]
    assert extension.startswith("rt=1793000000123 ")
    for value in re.findall(r"(?<!\\)(?:\\\\)*=", extension):
        assert value
