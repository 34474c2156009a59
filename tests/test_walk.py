"""README.md and docs/operating.md: `make walk` runs every block, or it says why not; each question has a heading."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.operator.recommended import MODELS
from scripts import document_memory
from scripts.walk import machines, stand_ins
from scripts.walk.__main__ import PAGES, Failure, Step, Walk, table
from scripts.walk.blocks import Block, blocks, faults

ROOT = Path(__file__).parent.parent
FOUND = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text(encoding="utf-8"))]
HEADINGS = [
    (page.name, heading.lower())
    for page in sorted((ROOT / "docs").glob("*.md"))
    for heading in re.findall(r"^##+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
QUESTIONS = {
    "add a node": "operating.md",
    "replace": "operating.md",
    "rotate": "operating.md",
    "upgrade": "operating.md",
    "back up": "operating.md",
    "restore": "operating.md",
    "without the store": "operating.md",
    "one address": "operating.md",
    "r2": "operating.md",
    "dns": "operating.md",
    "backup": "operating.md",
    "memory": "operating.md",
    "dashboard": "operating.md",
    "remove": "operating.md",
    "uninstall": "operating.md",
    "undo": "operating.md",
    "sleep": "operating.md",
    "power loss": "operating.md",
    "filevault": "operating.md",
    "firewall": "operating.md",
}
"""The main word of each question that an operator has asked, and the page whose heading answers it."""
MARKED = """# Page

## One

Text.

<!-- walk: macOS only -->
```sh
pmset
```

<!-- expect: a.b -->
<!-- scene: mini-1 dies -->

```sh
echo "```" # not a fence
cat <<END
# no heading
END
```

- a list:

  <!-- terminal: stops -->
  ```sh
  serve
  ```

## Two

<!-- walk: -->
```toml
x = 1
```

<!-- walk: too far away -->
Text.

```json
{}
```
"""


def test_every_block_is_run_or_marked_with_its_reason() -> None:
    assert len([block for block in FOUND if block.runs]) > 25
    assert faults(FOUND) == []


def test_a_reason_that_names_a_test_names_one_that_reads_the_page_or_runs_the_verb() -> None:
    named = [(block, path) for block in FOUND for path in re.findall(r"tests/[\w/]+\.py", block.reason)]
    assert named
    for block, path in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        wanted = Path(block.page).name if "runs it" in block.reason else "--undo"
        assert wanted in text, f"{block.where}: {path}"


def test_marks_are_read() -> None:
    first, second, third, fourth, fifth = blocks("page.md", MARKED)
    assert (first.section, first.runs, first.reason, first.text) == ("One", False, "macOS only", "pmset\n")
    assert (second.expect, second.scenes, second.runs) == (("a.b",), ("mini-1 dies",), True)
    assert second.text == 'echo "```" # not a fence\ncat <<END\n# no heading\nEND\n'
    assert (third.terminal, third.text, third.section) == ("stops", "serve\n", "One")
    assert (fourth.section, fourth.marked, fourth.runs) == ("Two", True, False)
    assert (fifth.line, fifth.marked, fifth.runs) == (39, False, False)
    assert faults([first, second, third]) == []
    assert faults([fourth, fifth]) == [
        "page.md:32: marked as not run, without a reason",
        "page.md:39: a block of json is not run; put <!-- walk: REASON --> before it",
    ]


def test_a_block_that_is_not_run_has_no_other_marks() -> None:
    (one,) = blocks("p", "<!-- walk: no -->\n<!-- expect: x -->\n```sh\nls\n```\n")
    assert faults([one]) == ["p:3: marked as not run, and has other marks"]


@pytest.mark.parametrize("word", QUESTIONS)
def test_each_question_is_answered_by_a_heading(word: str) -> None:
    pages = {page for page, heading in HEADINGS if word in heading}
    assert QUESTIONS[word] in pages, "grep -ri of the word finds it in docs/"


def test_each_section_answers_in_its_first_line() -> None:
    text = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) > 12
    for section in sections:
        heading, rest = section.split("\n", 1)
        first = next(line for line in rest.splitlines() if line.strip())
        assert len(first.split()) >= 8, heading
        assert not first.startswith(("<!--", "```", "#", "|")), heading


def test_the_table_of_memory_is_the_memory_plan_s() -> None:
    assert document_memory.markdown() in document_memory.PAGE.read_text(encoding="utf-8"), "run `make docs`"


def test_the_formula_for_kv_kib_per_tok_gives_the_plan_s_figure() -> None:
    """docs/operating.md: layers x KV heads x head_dim x 4 / 1024, where no layer has a sliding window."""
    checked = 0
    for one in MODELS:
        if one.shape.sliding:
            continue
        config = one.config
        by_hand = config["layers"] * config["kv"] * config["head_dim"] * 4 / 1024  # type: ignore[operator]
        assert document_memory.kv_kib_per_tok(one) == by_hand, one.repo
        checked += 1
    assert checked > 5


def test_a_table_adds_up_each_section() -> None:
    one, two = Block("README.md", 1, "One node", "sh", ""), Block("docs/operating.md", 9, "Undo", "sh", "")
    rows = table([Step(one, 1.0), Step(one, 2.5), Step(two, 0.5)])
    assert [(r.section, r.blocks, r.seconds, r.since_start, r.milestone) for r in rows] == [
        ("One node", 2, 3.5, 3.5, "first token"),
        ("Undo", 1, 0.5, 4.0, ""),
    ]


def test_the_walk_knows_every_scene_of_its_pages() -> None:
    scenes = {scene for block in FOUND for scene in block.scenes}
    assert scenes
    assert {scene for scene in scenes if not Walk.plays(scene)} == set()


# ---- the walk itself ----


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    made = Walk(machines.make(tmp_path / "walk", "http://127.0.0.1:9", ()), lambda _: None)
    yield made
    made.close()


def block(text: str, **more: Any) -> Block:
    return Block("README.md", 1, "One node", "sh", text, **more)


@pytest.mark.parametrize(
    ("text", "expect", "why"),
    [
        ("true\nfalse\necho no", (), "ended with 1"),
        ("for x in 1 2; do (exit $x); done", (), "ended with 1"),
        ("echo one", ("one", "two"), "its output has no 'two'"),
        ("nothing-of-this-name", (), "ended with 127"),
    ],
)
def test_a_block_that_fails_or_says_something_else_ends_the_walk(
    walk: Walk, text: str, expect: tuple[str, ...], why: str
) -> None:
    with pytest.raises(Failure) as failed:
        walk.run([block(text, expect=expect)])
    assert why in str(failed.value)
    assert walk.steps == []


def test_a_block_begins_where_the_one_before_ended(walk: Walk) -> None:
    walk.run(
        [
            block("mkdir -p ~/rack && cd ~/rack\nnode='mini 1'"),
            block('pwd\necho "$node"', expect=("mini-1/home/rack\n", "mini 1\n")),
        ]
    )
    assert len(walk.steps) == 2


def test_another_terminal_runs_until_its_section_ends(walk: Walk) -> None:
    there = walk.machines[0].home / "there"
    serve = f"trap 'rm {there}; exit' INT; touch {there}; echo it runs\nwhile :; do sleep 0.1; done\n"
    walk.run([block(serve, terminal="it runs"), block(f"test -f {there}")])
    walk.run([block(f"test ! -f {there}")._replace(section="Two")])
    with pytest.raises(Failure, match="ended with"):
        walk.run([block("echo it stops", terminal="it runs")])


def test_other_machines_are_reached_as_the_pages_do_it(walk: Walk) -> None:
    first, second = walk.machines[:2]
    walk.run(
        [
            block("ssh mini-2.local 'mkdir -p mlxrack && echo $WALK_MACHINE > mlxrack/name'"),
            block("echo hello > file\nscp -q file mini-2.local:mlxrack/\nscp mini-2.local:mlxrack/name ."),
        ]
    )
    assert (second.home / "mlxrack/file").read_text() == "hello\n"
    assert (first.home / "name").read_text() == "mini-2\n"
    for text in ("ssh mini-9.local true", "scp nothing mini-2.local:", "ssh mini-2.local 'exit 4'"):
        with pytest.raises(Failure):
            walk.run([block(text)])
    with pytest.raises(Failure, match=f"ended with {stand_ins.NOT_FOUND}"):
        walk.run([block("ssh -t mini-2.local 'sudo launchctl print system/dev.mlxrack.agent'")])


# ---- links ----


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings as GitHub names them, and anchors of its own."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles} | set(
        re.findall(r'<a id="([^"]+)">', text)
    )


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if "://" in target:
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []
