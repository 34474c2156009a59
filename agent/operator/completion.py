"""Shell completion, generated from the command line's own parser: verbs, options and fixed values."""

import argparse
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

SHELLS = ("bash", "zsh", "fish")
HELP = "Print shell completion, to be sourced: source <(mlxrack-agent completion bash)"


class Level(NamedTuple):
    """What may follow a path of verbs: verbs with their help, options, fixed values of arguments."""

    path: tuple[str, ...]
    verbs: dict[str, str]
    options: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def words(self) -> str:
        """All of it."""
        return " ".join((*self.verbs, *self.values, *self.options))


def add(verbs: "argparse._SubParsersAction[Any]", whole: argparse.ArgumentParser) -> None:
    """Add the verb that prints the completion of the ``whole`` command line."""
    added = verbs.add_parser("completion", help=HELP, description=HELP)
    added.add_argument("shell", choices=SHELLS)
    added.set_defaults(run=lambda args: print(script(whole, args.shell), end="") or os.EX_OK)


def levels(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Level]:
    """Every level of the parser, the outermost first."""
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    helps = {choice.dest: choice.help or "" for one in subparsers for choice in one._choices_actions}
    verbs = {name: helps.get(name, "") for one in subparsers for name in one.choices}
    options = tuple(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
    rest = [a for a in parser._actions if a not in subparsers]
    yield Level(path, verbs, options, tuple(str(value) for action in rest for value in action.choices or ()))
    for one in subparsers:
        for name, inner in one.choices.items():
            yield from levels(inner, (*path, name))


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script to be sourced by bash, zsh or fish."""
    found = list(levels(parser))
    return _fish(parser.prog, found) if shell == "fish" else _bash(parser.prog, found, shell)


def _bash(program: str, found: list[Level], shell: str) -> str:
    name = "_" + program.replace("-", "_")
    cases = "\n".join(f"    '{' '.join(level.path)}') echo '{level.words}' ;;" for level in found)
    first = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{first}{name}_words() {{
  case "$1" in
{cases}
    *) return 1 ;;
  esac
}}
{name}() {{
  local at="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    {name}_words "${{at:+$at }}$word" >/dev/null && at="${{at:+$at }}$word"
  done
  COMPREPLY=($(compgen -W "$({name}_words "$at")" -- "${{COMP_WORDS[@]:COMP_CWORD:1}}"))
}}
complete -o default -F {name} {program}
"""


def _fish(program: str, found: list[Level]) -> str:
    lines = [f"complete -c {program} -f"]
    for level in found:
        seen = [f"__fish_seen_subcommand_from {verb}" for verb in level.path]
        if level.verbs:
            seen.append(f"not __fish_seen_subcommand_from {' '.join(level.verbs)}")
        start = f"complete -c {program} -n '{'; and '.join(seen)}'"
        lines += [f"{start} -a {verb} -d {_quoted(text)}" for verb, text in level.verbs.items()]
        lines += [f"{start} -l {option.removeprefix('--')}" for option in level.options]
        lines += [f"{start} -a '{' '.join(level.values)}'"] if level.values else []
        lines += [f"{start} -F"] if not level.verbs and not level.values else []
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
