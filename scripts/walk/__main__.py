"""``make walk``: does what README.md and docs/operating.md tell a newcomer to do, and times it.

The commands are those of the pages, block by block, in an empty folder, with a wheel that is built and installed as
README says. Several machines are played by folders of this one; what else is replaced is printed first. It ends at the
first block that fails, with its output, and ends only processes that it started. On a Mac give loopback more addresses
first: sudo ifconfig lo0 alias 127.0.0.2 (to 127.0.0.4).
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from scripts.common import parser
from scripts.fetch_demo_model import MAIN, default_folder
from scripts.walk import machines, stand_ins
from scripts.walk.blocks import Block, blocks
from scripts.walk.machines import NAMES, REPLACED, STORE_PORT, Machine
from scripts.walk.terminal import Ran, Terminal
from tests.rack.stand_in_hub import Repo, StandInHub
from tests.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/operating.md")
BLOCK_S = 420.0
"""The longest that one block may take."""
MILESTONES = {
    "One node": "first token",
    "Three nodes with TLS": "rack of three with TLS",
    "First report": "first report",
}
"""Sections whose end is what a newcomer waits for."""
MACHINE_SCENES = ("dies", "is a new machine")
"""What may happen to a machine: its service is killed; nothing is left of it but its name and the installation."""
STORE_SCENES = ("the store stops", "the store starts")
SHARED = "mlxrack/venv"
"""The installation in a machine's home; the first machine's is used by all."""


Say = Callable[[str], None]
Edit = Callable[[Block], Block]


class Step(NamedTuple):
    """A block that was run."""

    block: Block
    seconds: float


class Failure(Exception):
    """A block that did not do what its page says."""

    def __init__(self, block: Block, why: str, output: str) -> None:
        super().__init__(f"{block.where} ({block.section}): {why}")
        self.block, self.output = block, output
        self.add_note(output[-2000:])


class Walk:
    """A newcomer at the first machine. ``edit`` may change a block before it is run, ``told`` gets what happens."""

    def __init__(self, all_machines: Sequence[Machine], told: Say, edit: Edit = lambda block: block) -> None:
        self.machines = all_machines
        self.terminal = Terminal(all_machines[0], told)
        self.steps: list[Step] = []
        self._lasting: list[Block] = []
        self.after: dict[str, Callable[[], None]] = {}
        """What happens elsewhere when a section has ended."""
        self._told, self._edit = told, edit

    def run(self, todo: Sequence[Block]) -> None:
        """Run blocks one after another. Raises Failure."""
        section = ""
        for block in todo:
            if block.section != section:
                self.terminal.close(everything=False)
                self.after.get(section, lambda: None)()
                section = block.section
                self._told(f"== {block.page}: {section}")
            self.step(block)

    def activate(self) -> None:
        """What README's installation ends with, for a walk that installs nothing."""
        self.terminal.run(f". ~/{SHARED}/bin/activate", "sh", BLOCK_S)

    def step(self, block: Block) -> None:
        """Run one block, after what happens before it. Raises Failure."""
        for scene in block.scenes:
            self._told(f"-- {scene}")
            self._scene(scene)
        block = self._edit(self._on_loopback(block))
        for line in block.text.splitlines():
            self._told(f"   $ {line}")
        ran = self._run(block)
        if block.lasts:
            self._lasting.append(block)
        if ran.status is None:
            raise Failure(block, f"has not ended after {BLOCK_S:.0f} s", ran.output)
        if ran.status:
            raise Failure(block, f"ended with {ran.status}", ran.output)
        for wanted in block.expect:
            if not re.search(wanted, ran.output):
                raise Failure(block, f"its output has no {wanted!r}", ran.output)
        self.steps.append(Step(block, ran.seconds))

    def _run(self, block: Block) -> Ran:
        if block.terminal:
            return self.terminal.open(block.text, block.terminal, BLOCK_S, lasts=block.lasts)
        return self.terminal.run(block.text, block.language, BLOCK_S)

    def _on_loopback(self, block: Block) -> Block:
        """A store that is to be reached from everywhere is a program that the stand-ins do not reach."""
        here, ports = self.machines[0].address, self.machines[0].ports
        return block._replace(text=block.text.replace("--host 0.0.0.0", f"--host {here} --port {ports[STORE_PORT]}"))

    @staticmethod
    def plays(scene: str) -> bool:
        """Whether the walk knows what happens in a scene."""
        name, _, what = scene.partition(" ")
        return scene in STORE_SCENES or (name in NAMES and what in MACHINE_SCENES)

    def _scene(self, scene: str) -> None:
        if not self.plays(scene):
            raise ValueError(f"scene {scene!r} is not one that the walk can play")
        if scene in STORE_SCENES:
            self._play_store(scene)
            return
        name, _, what = scene.partition(" ")
        machine = self.machines[NAMES.index(name)]
        stand_ins.kill(machine)
        if what == "is a new machine":
            self._renew(machine)

    def _play_store(self, scene: str) -> None:
        if scene == "the store stops":
            self.terminal.close()
        else:
            for block in self._lasting:
                self._run(block)

    def _renew(self, machine: Machine) -> None:
        venv = (machine.home / SHARED).resolve()
        shutil.rmtree(machine.home)
        machine.services.unlink(missing_ok=True)
        share([machine], venv)

    def close(self) -> None:
        """End everything that was started."""
        self.terminal.close()
        for machine in self.machines:
            stand_ins.kill(machine)


def todo(*, installs: bool) -> list[Block]:
    """The blocks that are run; without those that install something, which in a walk through this project's own
    environment would change it, and without the sections that depend on them."""
    found = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text(encoding="utf-8")) if block.runs]
    installing = {block.section for block in found if "pip install" in block.text}
    return [block for block in found if installs or block.section not in installing]


@contextmanager
def ready(root: Path, model: Path, told: Say, edit: Edit = lambda block: block) -> Iterator[Walk]:
    """The machines, under ``root``, and a hub that gives out ``model`` for one node under every name, a tiny one for a
    rack of several, which is all that one machine can compute."""
    hub = StandInHub()
    names = sorted(_models_named())

    def give(folder: Path) -> None:
        hub.repos.update({name: Repo.of_folder(folder) for name in names})

    give(model)
    with ExitStack() as stack:
        stack.enter_context(hub.running())
        made = machines.make(root, hub.endpoint, (str(Path(sys.base_prefix) / "bin"),))
        walk = Walk(made, told, edit)
        walk.after = {"One node": lambda: give(tiny(root))}
        stack.callback(walk.close)
        yield walk


def tiny(root: Path) -> Path:
    """A model of a hundred kilobytes, with random weights."""
    folder = root / "tiny"
    if not folder.exists():
        write_tiny_model(folder, seed=1)
    return folder


def share(some: Sequence[Machine], venv: Path) -> None:
    """Give machines an installation."""
    for machine in some:
        place = machine.home / SHARED
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(venv)


def _models_named() -> set[str]:
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return set(re.findall(r"\bmlx-community/[A-Za-z0-9._-]+", text))


def build_wheel(into: Path) -> None:
    """What `make dist` builds, in ``into``."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "--wheel-dir", str(into), str(ROOT)], check=True, stdin=subprocess.DEVNULL)


class Row(NamedTuple):
    """A section: how many blocks it ran, its seconds, and seconds from the beginning to its end."""

    page: str
    section: str
    blocks: int
    seconds: float
    since_start: float

    @property
    def milestone(self) -> str:
        """What a newcomer has at its end."""
        return MILESTONES.get(self.section, "")


def table(steps: Sequence[Step]) -> list[Row]:
    """A row for each section, in order."""
    rows, total = list[Row](), 0.0
    for (page, section), some in groupby(steps, lambda step: (step.block.page, step.block.section)):
        seconds = [step.seconds for step in some]
        total += sum(seconds)
        rows.append(Row(page, section, len(seconds), round(sum(seconds), 1), round(total, 1)))
    return rows


def main() -> int:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--json", action="store_true", help="print the table as JSON")
    options.add_argument("--keep", action="store_true", help="keep the machines' folders, and print where they are")
    options.add_argument("--quiet", action="store_true", help="print the table alone, and what fails")
    options.add_argument("--tiny", action="store_true", help="use a tiny random model, not the demo's")
    options.add_argument("--project", action="store_true", help="use this project's environment: installs nothing")
    args = options.parse_args()
    quiet = args.quiet or args.json
    # whoever is told to end has to end what it has started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    told: Say = (lambda _: None) if quiet else (lambda line: print(line, flush=True))
    demo = default_folder() / MAIN
    began, failed = time.monotonic(), None
    with _folder(keep=args.keep) as root:
        for line in REPLACED:
            told(f"replaced: {line}")
        with ready(root, tiny(root) if args.tiny or not demo.is_dir() else demo, told) as walk:
            first = walk.machines[0].home
            if args.project:
                share(walk.machines, Path(sys.prefix))
                walk.activate()
            else:
                build_wheel(first)
                share(walk.machines[1:], first / SHARED)
            try:
                walk.run(todo(installs=not args.project))
            except Failure as failure:
                failed = failure
            rows = table(walk.steps)
    seconds = round(time.monotonic() - began, 1)
    _print(rows, seconds, failed, as_json=args.json)
    return 1 if failed else 0


@contextmanager
def _folder(*, keep: bool) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="walk"))
    try:
        yield root
    finally:
        if keep:
            print(f"kept: {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)


def _print(rows: Sequence[Row], seconds: float, failed: Failure | None, *, as_json: bool) -> None:
    if as_json:
        fault = {"where": failed.block.where, "why": str(failed), "output": failed.output} if failed else None
        sections = [row._asdict() | {"milestone": row.milestone} for row in rows]
        print(json.dumps({"seconds": seconds, "sections": sections, "replaced": REPLACED, "failed": fault}, indent=2))
        return
    print(f"\n{'PAGE':<20}{'SECTION':<52}{'BLOCKS':>7}{'SECONDS':>9}{'IN ALL':>9}  MILESTONE")
    for row in rows:
        figures = f"{row.blocks:>7}{row.seconds:>9.1f}{row.since_start:>9.1f}"
        print(f"{row.page:<20}{row.section[:50]:<52}{figures}  {row.milestone}".rstrip())
    print(f"{seconds:.0f} s with the building of the wheel and the end of everything that was started")
    if failed:
        print(f"\nFAILED: {failed}\n{failed.output[-4000:]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
