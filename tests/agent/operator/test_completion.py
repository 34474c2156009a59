"""Shell completion follows the parser; bash runs it for real, zsh and fish where they are installed."""

import argparse
import shutil
import subprocess

import pytest

from agent import cli
from agent.operator import completion

PARSER = cli._parser()
LEVELS = {level.path: level for level in completion.levels(PARSER)}


def bash(words: str) -> set[str]:
    """What bash offers for a command line."""
    script = completion.script(PARSER, "bash")
    listed = words.split(" ")
    typed = " ".join(f"'{word}'" for word in listed)
    shown = "printf '%s\\n' \"${COMPREPLY[@]}\""
    command = f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(listed) - 1}; _mlxrack_agent; {shown}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert run.stderr == ""
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        ("mlxrack-agent ", {"run", "serve", "models", "--version"}, {"pull"}),
        ("mlxrack-agent sta", {"status"}, {"serve"}),
        ("mlxrack-agent models ", {"pull", "rm", "list", "recommend"}, {"serve"}),
        ("mlxrack-agent models pull --re", {"--revision"}, {"--json"}),
        ("mlxrack-agent models --json pull --o", {"--offline"}, set()),
        ("mlxrack-agent completion ", {"bash", "zsh", "fish"}, {"run"}),
        ("mlxrack-agent logs --level ", {"debug", "error"}, set()),
    ],
)
def test_bash_completes(words: str, offered: set[str], not_offered: set[str]) -> None:
    found = bash(words)
    assert offered <= found
    assert not not_offered & found


def test_every_verb_and_option_of_the_parser_is_in_every_script() -> None:
    for shell in completion.SHELLS:
        script = completion.script(PARSER, shell)
        for level in LEVELS.values():
            words = [*level.verbs, *(option.removeprefix("--") for option in level.options)]
            assert [word for word in words if word not in script] == []
    assert ("models", "pull") in LEVELS


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_script(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    run = subprocess.run(
        [shell, "-n"], input=completion.script(PARSER, shell), capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_help_with_quotes_stays_one_word() -> None:
    parser = argparse.ArgumentParser(prog="p")
    parser.add_subparsers().add_parser("v", help="it's a \\ test")
    assert "-a v -d 'it\\'s a \\\\ test'" in completion.script(parser, "fish")


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion.script(PARSER, "bash")
