"""A package that is missing or broken ends every verb of both programs in one sentence, never in a traceback."""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from agent import cli as agent_cli
from aggregator import cli as aggregator_cli
from shared.missing import Main, broken_import, guarded, pip_line, sentence

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARSERS = {"agent": agent_cli._parser(), "aggregator": aggregator_cli._parser()}
MODULES = {"prometheus-client": "prometheus_client", "huggingface-hub": "huggingface_hub", "mlx-lm": "mlx_lm"}
WRONG = "a shared library is missing"
ARGUMENTS = {
    "--config": ["missing.toml"],
    "--to": ["missing.toml"],
    "--from": ["missing.toml"],
    "--intake": ["i.toml"],
    "--inventory": ["i.toml"],
    "--api-spend": ["1"],
    "--nodes": ["1"],
}


def packages(extra: str) -> list[str]:
    """The modules of what an extra, or ``base``, asks for directly."""
    texts = PROJECT["dependencies"] if extra == "base" else PROJECT["optional-dependencies"][extra]
    names = (canonicalize_name(Requirement(text).name) for text in texts)
    return [MODULES.get(name, name.replace("-", "_")) for name in names]


def verbs(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """Each verb of a parser with arguments that it takes, inner verbs included."""
    inner = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not inner or not inner[0].required:
        yield list(_arguments(parser))
    for name, below in (item for one in inner for item in one.choices.items()):
        yield from ([name, *rest] for rest in verbs(below))


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.option_strings and action.required:
            yield from (action.option_strings[-1], *ARGUMENTS[action.option_strings[-1]])
        elif not action.option_strings and action.nargs in (None, "+"):
            yield str(next(iter(action.choices))) if action.choices else "x"


CHILD = """
import importlib.abc, io, json, os, sys
program, cases = json.load(sys.stdin)
class Hidden(importlib.abc.MetaPathFinder):
    def __init__(self, names, wrong): self.names, self.wrong = names, wrong
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            if self.wrong: raise self.made(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    def made(self, name):
        return ImportError(self.wrong, name=name)
for verb, names, wrong in cases:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writing, 1); os.dup2(writing, 2)
        sys.meta_path.insert(0, Hidden(names, wrong))
        sys.argv = [program, *verb]
        try:
            import importlib
            status = importlib.import_module(program + ".__main__").main(verb)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback; traceback.print_exc(); status = 99
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as said: text = said.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""
Case = tuple[list[str], list[str], str]


def ran(program: str, cases: list[Case], folder: Path) -> list[tuple[int, str]]:
    """Exit status and output of each case: a verb, the modules that cannot be imported, and why ("": not there). Each
    is a process of its own, forked from one that has imported nothing."""
    (folder / "agent.toml").write_text(
        f'[node]\nid = "n1"\nrack = "r"\n[listen]\nport = 0\n[paths]\nstate = {json.dumps(str(folder / "s"))}\n'
    )
    (folder / "aggregator.toml").write_text(
        'rack = "r"\n[store]\nkind = "s3"\nendpoint = "http://127.0.0.1:9"\nbucket = "rack"\n'
        'access_key = "env:HOME"\nsecret_key = "env:HOME"\n'
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", CHILD],
        input=json.dumps((program, cases)),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=240,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(cases)
    return [(status, text) for status, text in found]


@pytest.mark.parametrize("program", PARSERS)
def test_every_verb_without_the_extra_says_which(program: str, tmp_path: Path) -> None:
    hidden = sorted({*packages("agent"), *packages("aggregator")} - {"urllib3"})  # which boto3 brings
    tried = [verb for verb in verbs(PARSERS[program]) if verb != ["store", "serve"]]  # it would serve
    cases = [(verb, hidden, ("", WRONG)[n % 2]) for n, verb in enumerate(tried)]
    assert len(cases) >= 10
    told = 0
    for (verb, _, wrong), (status, text) in zip(cases, ran(program, cases, tmp_path), strict=True):
        assert "Traceback" not in text, (verb, text)
        assert status != 99, (verb, text)
        if "mlxrack[" in text:
            assert status == os.EX_UNAVAILABLE, (verb, text)
            assert text.count("\n") == 1, (verb, text)
            assert f"mlxrack-{program}: the package " in text
            assert text.strip().endswith(f"-m pip install 'mlxrack[{program}]'")
            assert ("is not installed" in text) == (not wrong)
            assert (WRONG in text) == bool(wrong)
            told += 1
    assert told >= 6  # the others work without


@pytest.mark.parametrize(("program", "verb"), [("agent", "run"), ("aggregator", "rollup")])
def test_each_package_that_a_verb_needs_is_named(program: str, verb: str, tmp_path: Path) -> None:
    needed = {"agent": "agent.daemon", "aggregator": "aggregator.commands.rollup, aggregator.cli, shared.store_s3"}[
        program
    ]
    code = f"import json, sys, {needed}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(json.loads(run.stdout))
    names = [
        name
        for name in (*packages("base"), *packages(program))
        if name in loaded and (program, name) != ("agent", "boto3")
    ]
    assert len(names) >= (7 if program == "agent" else 5), names
    cases = [([verb], [name], ("", WRONG)[n % 2]) for n, name in enumerate(names)]
    for (_, (name,), wrong), (status, text) in zip(cases, ran(program, cases, tmp_path), strict=True):
        assert status == os.EX_UNAVAILABLE, (name, text)
        assert name in text
        assert wrong in text
        assert "Traceback" not in text


def test_a_dependency_that_breaks_while_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_here.py").write_text("import ctypes\nctypes.CDLL('libnot_there.so.9')\n")
    (tmp_path / "outer_one.py").write_text("import broken_here\n")
    (tmp_path / "odd_one.py").write_text("1 / 0\n")
    (tmp_path / "bad_syntax.py").write_text("def\n")
    (tmp_path / "half.py").write_text("")
    (tmp_path / "needs_another.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    for code, package, why in (
        ("import outer_one", "outer_one", "libnot_there"),
        ("import odd_one", "odd_one", "division by zero"),
        ("from half import missing", "half", "cannot import name"),
        ("import needs_another", "needs_another", "not_there_at_all"),
        ("import not_there_at_all", "not_there_at_all", ""),
        ("import not_there_at_all.inner", "not_there_at_all", ""),
    ):
        with pytest.raises(Exception) as caught:
            exec(compile(code, "<verb>", "exec"), {"__name__": "agent.verb"})
        found = broken_import(caught.value)
        assert found is not None, code
        assert found[0] == package, code
        assert why in found[1], code
        assert bool(found[1]) == bool(why), code


def raising(error: Exception) -> Main:
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), ImportError("ours", name="agent.cli"), ImportError()])
def test_other_errors_pass_the_guard(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded("p", "agent")(raising(error))([])


def test_the_sentence_names_package_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sentence("duckdb", "", "p", "pip") == "the package duckdb is not installed; p needs it: pip"
    assert "cannot be imported (no lib)" in sentence("duckdb", "no lib", "p", "pip")
    monkeypatch.setattr(sys, "executable", "/a b/python")
    assert pip_line("agent") == "'/a b/python' -m pip install 'mlxrack[agent]'"
