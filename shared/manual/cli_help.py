"""The verb ``help`` of both programs: runbooks, operating tasks, pages, files that come with the program, verbs."""

import argparse
import io
import json
import os
import pydoc
import shutil
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from shared.errors import Refused
from shared.manual.topics import LISTED, WIDTH, Topic, asked, named, near, plain, topics
from shared.resources import FILES, pages, resource

TEXT = "Show the documentation: runbooks, operating tasks, pages; or print a file that comes with the program."


def add(verbs: "argparse._SubParsersAction[Any]", whole: argparse.ArgumentParser) -> None:
    """Add ``help`` to the ``whole`` command line."""
    added = verbs.add_parser("help", help=TEXT, description=TEXT)
    added.add_argument(
        "topic", nargs="*", help="a name in the list that `help` prints, or words of its title; or a verb"
    )
    added.add_argument("--json", action="store_true", help="print JSON")
    added.set_defaults(run=lambda args: _help(args, verbs, whole), log=None, verbose=False)


def _help(args: argparse.Namespace, verbs: "argparse._SubParsersAction[Any]", whole: argparse.ArgumentParser) -> int:
    """Exit status os.EX_USAGE for an unknown topic, which near ones are told for. Raises Refused."""
    known, files = _known(), {PurePosixPath(name).name: name for name in FILES}
    if not args.topic:
        _page(json.dumps(_as_json(known, files), indent=2) if args.json else _list(known, files, whole.prog))
        return os.EX_OK
    name = asked(args.topic)
    if topic := named(name, known):
        text = plain(topic.text, whole.prog, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
        also = f"\nThe verb: {whole.prog} {name} --help\n" if name in verbs.choices else ""
        _page(json.dumps(topic._asdict(), indent=2) if args.json else text + also)
    elif name in files:
        _page(resource(files[name]).read_text(encoding="utf-8"))
    elif name in verbs.choices:
        _page(verbs.choices[name].format_help())
    else:
        print(f"{whole.prog}: {_unknown(name, known, [*files, *verbs.choices], whole.prog)}", file=sys.stderr)
        return os.EX_USAGE
    return os.EX_OK


def _known() -> dict[str, Topic]:
    """Raises Refused where the documentation is not installed."""
    if not (found := pages()):
        raise Refused(
            f"help: {resource('docs')} has no pages; this installation is incomplete, install the wheel again"
        )
    return topics(found)


def _unknown(name: str, known: dict[str, Topic], others: list[str], program: str) -> str:
    likely = near(name, {**known, **{one: Topic(one, one, "", "") for one in others}})
    hint = f"did you mean {', '.join(likely)}? " if likely else ""
    return f"help: there is no such topic; {hint}`{program} help` lists all"


def _as_json(known: dict[str, Topic], files: dict[str, str]) -> dict[str, Any]:
    listed = [{"name": one.name, "title": one.title, "page": one.page} for one in known.values()]
    return {"topics": listed, "files": {name: str(resource(path)) for name, path in files.items()}}


def _list(known: dict[str, Topic], files: dict[str, str], program: str) -> str:
    """The list of topics, in groups."""
    lines = [f"{program} help TOPIC shows one of these; words of a title do, too.", ""]
    for page in LISTED:
        if page in known:
            lines += _group(known[page].title, (one for one in known.values() if one.page == page and one.name != page))
    whole = (one for one in known.values() if one.name == one.page)
    lines += _group("Pages", whole)
    lines += ["Files (printed as they are)", *(f"  {name}" for name in files), ""]
    return "\n".join([*lines, f"{program} VERB --help shows the options of a verb."]) + "\n"


def _group(title: str, found: Iterator[Topic]) -> list[str]:
    rows = [(one.name, one.title) for one in found]
    widest = min(32, max((len(name) for name, _ in rows), default=0))
    return [title, *(f"  {name.ljust(widest)}  {text}" for name, text in rows), ""]


def _page(text: str) -> None:
    """By the user's pager on a terminal that is smaller than the text; else printed."""
    text = text.rstrip("\n") + "\n"
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        os.environ.setdefault("LESS", "FRX")
        pydoc.pager(text)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than the pages
    sys.stdout.write(text)
