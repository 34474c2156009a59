"""Every command that code or documentation tells somebody to run exists, with its options."""

import argparse
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cli as agent_cli
from aggregator import cli as aggregator_cli

ROOT = Path(__file__).parent.parent
CODE = [path for name in ("agent", "aggregator", "shared") for path in sorted((ROOT / name).rglob("*.py"))]
TEXTS = [*CODE, *sorted(ROOT.glob("a*/DESIGN.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
PARSERS = {"mlxrack-agent": agent_cli._parser(), "mlxrack-aggregator": aggregator_cli._parser()}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

COMMAND = re.compile(r"(?:^|[`/ ])(mlxrack-(?:agent|aggregator)) +([a-z][^`\"'\n;|>&#()]*)", re.MULTILINE)
MAKE = re.compile(r"(?:`|^)make ([a-z-]+)(?!\*)", re.MULTILINE)
PIP = re.compile(r"pip install ([^`\"\n)]+)")


def hints(pattern: re.Pattern[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where it stands, and the groups of each match."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for found in pattern.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path.relative_to(ROOT)}:{line}", found.groups()


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def fault(program: str, words: list[str]) -> str:
    """What is wrong with a command; "" when its verbs and options exist."""
    parser = PARSERS[program]
    options: set[str] = set(parser._option_string_actions)
    for word in words:
        inner = subparsers(parser)
        if word.startswith("-") and word.rstrip(",.") not in options:
            return f"no option {word}"
        if inner and re.fullmatch(r"[a-z][a-z-]*", word):
            if word not in inner:
                return f"no verb {word}"
            parser = inner[word]
            options |= set(parser._option_string_actions)
    return ""


def test_every_verb_and_option_that_is_named_exists() -> None:
    found = [(where, program, rest.split()) for where, (program, rest) in hints(COMMAND)]
    assert len(found) > 50
    wrong = {f"{where}: {program} {' '.join(words)}": fault(program, words) for where, program, words in found}
    assert {command: why for command, why in wrong.items() if why} == {}


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("mlxrack-agent models pull FOLDER --name NAME", ""),
        ("mlxrack-agent models pull FOLDER --called NAME", "no option --called"),
        ("mlxrack-agent models fetch FOLDER", "no verb fetch"),
        ("mlxrack-aggregator week", "no verb week"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, why: str) -> None:
    program, *words = command.split()
    assert fault(program, words) == why


def test_every_make_target_that_is_named_exists() -> None:
    found = {(where, target) for where, (target,) in hints(MAKE)}
    assert len(found) > 10
    assert {one for one in found if one[1] not in TARGETS} == set()


def test_every_package_that_is_named_for_pip_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    found = [(where, rest.split()[-1].strip("'")) for where, (rest,) in hints(PIP)]
    assert found
    for where, package in found:
        name, _, extra = package.rstrip("]").partition("[")
        if name.startswith("mlxrack"):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), where
        else:
            assert re.search(rf"import {name.replace('-', '_')}\b", imported), f"{where}: nothing imports {name}"
