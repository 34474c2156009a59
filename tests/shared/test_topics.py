"""Documentation as topics of `help`, and as plain text."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli as agent_cli
from aggregator import cli as aggregator_cli
from shared.manual.topics import asked, named, near, plain, slug, topics
from shared.resources import FILES, pages, resource

ROOT = Path(__file__).parents[2]
KNOWN = topics(pages())
MAINS = {"mlxrack-agent": agent_cli.main, "mlxrack-aggregator": aggregator_cli.main}


@pytest.mark.parametrize(
    "said",
    [
        *("node-down", "node down", "Node Down", "docs/runbooks.md#node-down", "runbooks.md#node-down", "#node-down"),
        *("`node-down`", "https://wiki.example/docs/runbooks.md#node-down"),
        "Node down: peers report missed heartbeats",
    ],
)
def test_a_topic_is_found_however_it_is_written(said: str) -> None:
    assert asked([said]) == asked(said.split()) == "node-down"


@pytest.mark.parametrize("said", ["tls", "tls.md", "docs/tls.md", "TLS", "docs/tls.md#"])
def test_a_page_is_found_however_it_is_written(said: str) -> None:
    assert KNOWN[asked([said])].name == "tls"
    assert KNOWN["tls"].text == (ROOT / "docs/tls.md").read_text(encoding="utf-8")


def test_every_page_and_every_section_of_the_runbooks_is_a_topic() -> None:
    for page, text in pages().items():
        assert KNOWN[page].page == page
        if page in ("runbooks", "operating"):
            titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
            assert titles
            assert set(titles) <= {one.title for one in KNOWN.values() if one.page == page}


def test_sections_end_where_the_next_begins_and_code_has_no_headings() -> None:
    text = (
        '# P\n\n## One: x\n\na\n\n```sh\n## no heading\n```\n\n### Inner\n\nb\n\n<a id="second"></a>\n\n## Two\n\nc\n'
    )
    found = topics({"p": text})
    assert set(found) == {"p", "one", "inner", "second"}
    assert found["one"].text.count("no heading") == 1
    assert "b" in found["one"].text
    assert "Two" not in found["one"].text
    assert found["second"].text == "## Two\n\nc\n"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("nodedown", "node-down"),
        ("certifcate", "certificate-expires"),
        ("429", "requests-return-429"),
        ("throtling", "throttling"),
        ("configuraton", "configuration"),
        ("heat", "throttling"),
        ("runbook", "runbooks"),
    ],
)
def test_near_topics_are_suggested(wrong: str, right: str) -> None:
    assert right in near(wrong, KNOWN)


MARKDOWN = """# Title

*Some `code*x` here*, **bold** and [tls.md](tls.md), [x](runbooks.md#node-down),
[y](https://z.example).
- one
- two
  more

| a | b |
|---|---|
| `x` | y |

```sh
run *this* [as](is.md)
```
<!-- gone -->
2 * 3 * 4
"""
PLAIN = """Title
=====

Some `code*x` here, bold and `p help tls`, x (`p help node-down`), y (https://z.example).

- one
- two more

a    b
`x`  y

    run *this* [as](is.md)

2 * 3 * 4
"""


def test_markdown_becomes_plain_text() -> None:
    assert plain(MARKDOWN, "p") == PLAIN


def test_a_wide_table_becomes_a_list() -> None:
    text = f"| key | value | default |\n|---|---|---|\n| `k` | {'long ' * 30} | 7 |\n"
    shown = plain(text, "p", 60)
    assert shown.startswith("key: `k`\n    value: long")
    assert "    default: 7\n" in shown


@pytest.mark.parametrize("name", KNOWN)
def test_every_topic_is_readable_and_loses_no_word(name: str) -> None:
    text = KNOWN[name].text
    shown = plain(text, "mlxrack-agent", 80)
    assert not re.search(
        r"\]\([^)]*\.md|<a id|<!--|^#|\*\*|\0", re.sub(r"`[^`]*`|^    .*$", "", shown, flags=re.M), re.M
    )
    files = {path.rpartition("/")[2] for path in FILES}
    words = set(
        re.findall(
            r"[A-Za-z]{3,}", re.sub(r"<[^>\n]*>|\[[\w-]+\.md\]\([^)]*\)|\]\([^)]*\)|^ *```[a-z]*", "", text, flags=re.M)
        )
    )
    assert words - set(re.findall(r"[A-Za-z]{3,}", shown)) == set()
    for found in re.findall(r"`mlxrack-agent help ([^`]+)`", shown):
        name = found.partition(" >")[0]
        assert named(asked([name]), KNOWN) or name in files, found


@given(st.text(alphabet="ab #|-*`[]()\n1.:\\<>\0", max_size=80))
def test_any_text_can_be_shown(text: str) -> None:
    topics({"p": text})
    plain(text, "p", 20)
    near(asked([text]), KNOWN)
    slug(text)


@pytest.mark.parametrize("program", MAINS)
def test_help_lists_and_shows(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = MAINS[program]
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    for name in (*(f"  {one}  " for one in ("node-down", "tls", "configuration")), "  aggregator.cron\n"):
        assert name in listed
    assert main(["help", "node", "down"]) == 0
    assert "Reach the machine." in capsys.readouterr().out
    for name in FILES:
        assert main(["help", name.rpartition("/")[2]]) == 0
        assert capsys.readouterr().out.strip() == resource(name).read_text(encoding="utf-8").strip()
    assert main(["help", "check-config"]) == 0
    assert f"usage: {program} check-config" in capsys.readouterr().out
    assert main(["help", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in told["topics"]} == set(KNOWN)
    assert all(Path(path).is_file() for path in told["files"].values())
    assert main(["help", "nodedown"]) == os.EX_USAGE
    assert "did you mean node-down" in capsys.readouterr().err
    assert main(["help", "../../etc/passwd"]) == os.EX_USAGE


@pytest.mark.parametrize("columns", [80, 40])
def test_help_pages_on_a_terminal(columns: int, tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\necho PAGED; cat\n")
    pager.chmod(0o755)
    environ = {**os.environ, "PAGER": str(pager), "TERM": "xterm", "COLUMNS": str(columns), "LINES": "10"}
    inner, outer = pty.openpty()
    with os.fdopen(inner, "rb") as reading:
        run = subprocess.Popen(
            [sys.executable, "-P", "-m", "agent", "help", "runbooks"], stdin=outer, stdout=outer, env=environ, cwd=ROOT
        )
        os.close(outer)
        said = b""
        try:
            while piece := os.read(reading.fileno(), 65536):
                said += piece
        except OSError:  # the terminal is closed
            pass
    assert run.wait(60) == 0
    lines = said.decode().replace("\r", "").splitlines()
    assert lines[0] == "PAGED"
    assert len(lines) > 50
