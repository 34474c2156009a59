"""The commands of README.md and docs/operating.md, run as they stand, on a rack with the fake engine.

`make walk` runs all of them with an installed wheel and a model; here the sections that an operator needs most, in this
project's environment.
"""

import re
import sys
from pathlib import Path

from scripts.walk.__main__ import ready, share, table, todo
from scripts.walk.blocks import Block

SECTIONS = ("Three nodes with TLS", "First report", "Add a node", "Change what a node serves", "Back up and restore")
"""Their titles up to a colon."""


def title(block: Block) -> str:
    """What its section is called."""
    return block.section.partition(":")[0]


def small(folder: Path, block: Block) -> Block:
    """Two nodes at first, without a model to pull, and with a folder as the store of all."""
    store = f'[store]\nkind = "directory"\npath = "{folder}/bucket"\n'
    text = re.sub(r"\[store\]\nkind = \"s3\"\n(?:\w+ = .*\n)+", lambda _: store, block.text)
    if "store serve" in text:
        text = "mkdir -p ~/rack/store && touch ~/rack/store/access.key\n"
    text = text.replace('path = "store:Qwen3-8B-4bit"', 'engine = "fake"\nneed_bytes = 10')
    text = re.sub(r"venv/bin/mlxrack-agent models pull .*?'", "true'", text)
    text = text.replace("mini-1 mini-2 mini-3 > nodes", "mini-1 mini-2 > nodes")
    expect = tuple(one.replace("mini-3", "mini-2") for one in block.expect)
    return block._replace(text=text, expect=expect, terminal="", lasts=False)


def test_an_operator_s_commands_do_what_the_pages_say(tmp_path: Path) -> None:
    said: list[str] = []
    root, model = tmp_path / "walk", tmp_path / "not pulled"
    root.mkdir()
    model.mkdir()
    some = [block for block in todo(installs=False) if title(block) in SECTIONS]
    assert {title(block) for block in some} == set(SECTIONS)
    with ready(root, model, said.append, lambda block: small(root, block)) as walk:
        share(walk.machines, Path(sys.prefix))
        walk.activate()
        walk.run(some)
    assert len(walk.steps) == len(some)
    print("\n".join(map(str, table(walk.steps))))
