"""mlxrack-agent audit: what the audit log holds, whether it is whole, and its entries for an auditor and a SIEM. Works
beside a running agent and, with FOLDER, on a copy of its folder."""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from agent.audit import cef, chain, disk, shipping
from agent.audit.chain import Fault, Verdict
from agent.audit.entry import Entry
from agent.audit.service import FOLDER
from agent.config import AgentConfig
from agent.operator.admin_client import AdminClient
from agent.operator.cli_policy import Recorded, Records, read_lines
from agent.operator.logview import parse_since
from agent.operator.statusview import audit_lines
from agent.policy.replay import Outcome
from shared import __version__
from shared.errors import RackError, Refused
from shared.store_open import open_store

POLL_S = 0.5
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""
Verb = Callable[[argparse.Namespace, AgentConfig, Path], int]


def add(outer: Outer, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add ``audit``, which shows what there is, and its verbs."""
    text = "Show the audit log: its entries, what of it is in the bucket, and whether it can be written."
    audit = outer("audit", text, lambda args: _summary(args, *load(args)))
    audit.add_argument("--json", action="store_true", help="print JSON")
    verbs = audit.add_subparsers(metavar="VERB")

    def verb(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        common(added)
        added.set_defaults(run=lambda args: run(args, *load(args)))
        return added

    verify = verb("verify", "Check the hash chain; name the first line that was changed, dropped or added.", _verify)
    verify.add_argument("folder", nargs="?", type=Path, default=None, help="a copy of an audit folder")
    verify.add_argument("--bucket", action="store_true", help="compare it with what was shipped to the bucket, too")
    export = verb("export", "Print entries as JSON lines or in the Common Event Format (CEF).", _export)
    export.add_argument("folder", nargs="?", type=Path, default=None, help="a copy of an audit folder")
    export.add_argument("--since", default="7d", help="90s, 15m, 1h, 7d, or a time like 2026-11-20T08:00 (default: 7d)")
    export.add_argument("--format", choices=("json", "cef"), default="json", help="default: json")
    export.add_argument("--follow", "-f", action="store_true", help="keep printing new entries")
    show = verb("show", "Print the entries of one request.", _show)
    show.add_argument("request", help="its X-Mlxrack-Request-Id")
    show.add_argument("folder", nargs="?", type=Path, default=None, help="a copy of an audit folder")
    verb("seal", "Have the running agent close the file that it writes to, and ship it now.", _seal)


def _folder(args: argparse.Namespace, state: Path) -> Path:
    folder: Path = getattr(args, "folder", None) or state / FOLDER
    if not folder.is_dir():
        raise Refused(f"audit log {folder} does not exist; has this agent been started with this configuration?")
    return folder


def _summary(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    folder = _folder(args, state)
    found, shipped = disk.segments(folder), shipping.shipped(folder)
    entries, first_ms, last_ms = _range(folder)
    told: dict[str, Any] = {}
    with contextlib.suppress(RackError):  # without the agent only its files are known
        told = AdminClient(config, state).status().get("audit", {})
    said = {
        "folder": str(folder),
        "files": len(found),
        "bytes": sum(one.size for one in found),
        "entries": entries,
        "first_ms": first_ms,
        "last_ms": last_ms,
        "shipped": msgspec.to_builtins(shipped),
        "agent": told,
    }
    if args.json:
        print(json.dumps(said))
        return 0
    print(f"{folder}: {entries} entries in {len(found)} files, {said['bytes'] / 1e6:.1f} MB")
    if entries:
        print(f"from {_time(first_ms)} to {_time(last_ms)}")
    print(f"last shipped {_time(shipped.t_ms)}, up to line {shipped.seq}" if shipped.seq else "nothing shipped yet")
    print("\n".join(audit_lines(told)) if told else "the agent is not running, or cannot be asked")
    return 0


def _range(folder: Path) -> tuple[int, int, int]:
    """How many entries there are, and the times of the first and the last."""
    count, first_ms, last_ms = 0, 0, 0
    for _, content in disk.contents(folder):
        if here := content.count(b'"line":"entry"'):
            first_ms = first_ms or next((one.t_ms for one in disk.entries(content)), 0)
            count, last = count + here, content
    if count:
        last_ms = [one.t_ms for one in disk.entries(last)][-1]
    return count, first_ms, last_ms


def _time(t_ms: int) -> str:
    return f"{datetime.fromtimestamp(t_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


# ---- verify ----


def verified(folder: Path) -> Verdict:
    """Whether a folder holds a whole log. Lines that a running agent writes meanwhile are not missed."""
    tip = disk.known_tip(folder)
    verdict = chain.verify(disk.contents(folder), tip=tip or chain.NOTHING)
    if verdict.fault is not None:
        return verdict
    if found := disk.strange(folder):
        return verdict._replace(fault=Fault(found[0], 0, "is not a file of this log"))
    if tip is None and verdict.lines > 1:
        return verdict._replace(fault=Fault(disk.TIP, 0, "is missing: whether the end was cut off cannot be told"))
    return verdict


def _verify(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    folder = _folder(args, state)
    verdict = verified(folder)
    notes = list[str]()
    if args.bucket and verdict.fault is None:
        verdict, notes = _with_bucket(config, folder, verdict)
    if args.json:
        fault = verdict.fault._asdict() if verdict.fault else None
        said = {"ok": fault is None, "fault": fault, "files": verdict.files, "lines": verdict.lines, "notes": notes}
        print(json.dumps({**said, "chain": verdict.chain, "first": verdict.first, "last": verdict.last.seq}))
    elif verdict.fault is not None:
        print(verdict.fault.text())
    else:
        torn = f"; {verdict.torn} bytes of an unfinished line at the end" if verdict.torn else ""
        where = " here and in the bucket" if args.bucket else ""
        print(f"whole{where}: lines {verdict.first} to {verdict.last.seq} in {verdict.files} files{torn}")
    if not args.json:
        print("\n".join(notes), end="\n" if notes else "")
    return 1 if verdict.fault else 0


def _with_bucket(config: AgentConfig, folder: Path, here: Verdict) -> tuple[Verdict, list[str]]:
    """Each log of this node in the bucket by itself, and the one that is here line by line; a file at a time."""
    store = open_store(config.store, os.environ, attempts=2)
    logs, differ = shipping.in_bucket(store, config.node.id), list[Fault]()

    def watched(name: str) -> Iterator[tuple[str, bytes]]:
        for file, content in shipping.fetched(store, logs[name]):
            with contextlib.suppress(FileNotFoundError):
                if name == here.chain and (fault := chain.compare(file, (folder / file).read_bytes(), content)):
                    differ.append(fault)
            yield file, content

    for name in logs:
        there = chain.verify(watched(name), alone=False)
        fault = there.fault and there.fault._replace(file=f"bucket: {name}/{there.fault.file}")
        if name == here.chain:
            fault = next(iter(differ), fault or _behind(here, there))
        if fault is not None:
            return here._replace(fault=fault), []
    others, why = [name for name in logs if name != here.chain], "whose folder was lost or replaced"
    return here, [f"the bucket holds another log of this node, {name}, {why}" for name in others]


def _behind(here: Verdict, there: Verdict) -> Fault | None:
    if there.last.seq > here.last.seq:
        return Fault("the folder", 0, f"lines {here.last.seq + 1} to {there.last.seq} are in the bucket and not here")
    return None


# ---- entries ----


def _export(args: argparse.Namespace, _: AgentConfig, state: Path) -> int:
    since_ms = int(parse_since(args.since, datetime.now(UTC)).timestamp() * 1000)
    for entry in _entries(_folder(args, state), since_ms, follow=args.follow):
        print(cef.line(entry, __version__) if args.format == "cef" else _json(entry), flush=args.follow)
    return 0


def _entries(folder: Path, since_ms: int, *, follow: bool) -> Iterator[Entry]:
    if not follow:
        yield from disk.read(folder, since_ms)
        return
    done: dict[Path, int] = {}
    while True:
        for segment in disk.segments(folder):
            if segment.size > done.get(segment.path, 0):
                content = segment.path.read_bytes()
                yield from disk.entries(content[done.get(segment.path, 0) :], since_ms)
                done[segment.path] = content.rfind(b"\n") + 1
        time.sleep(POLL_S)


def recorded(source: Path, since_ms: int) -> Records:
    """The decisions in an audit folder, or a file of one, for ``policy replay``; in other files or folders those of
    JSON lines. Raises Refused when there are none."""
    if source.is_dir() and disk.segments(source):
        entries: Iterator[Entry] = disk.read(source, since_ms)
    elif source.is_file() and chain.first_seq(source.name) is not None:
        entries = disk.entries(source.read_bytes(), since_ms)
    else:
        return read_lines(source, since_ms)
    # one that was refused before it was decided has no facts, and no policy would have changed it
    found = [
        Recorded(t_ms=one.t_ms, facts=one.facts, outcome=_outcome(one))
        for one in entries
        if one.kind == "ended" and one.facts is not None
    ]
    if not found:
        raise Refused(f"policy replay: no decisions recorded in {source} since then; name others with --from")
    return Records(found, 0)


def _outcome(entry: Entry) -> Outcome:
    at = entry.answered
    priced = entry.cost_micro or entry.currency
    return Outcome(
        request_id=entry.request,
        category=at.category if at is not None else None,
        provider=at.provider if at is not None else "",
        model=at.model if at is not None else "",
        refused="" if at is not None else entry.code,
        prompt_tok=entry.prompt_tok,
        completion_tok=entry.completion_tok,
        usd=f"{Decimal(entry.cost_micro) / 1_000_000:f}" if priced else "",
    )


def _show(args: argparse.Namespace, _: AgentConfig, state: Path) -> int:
    holding = (content for _, content in disk.contents(_folder(args, state)) if args.request.encode() in content)
    found = [one for content in holding for one in disk.entries(content) if one.request == args.request]
    if not found:
        raise Refused(f"audit show: no entry of request {args.request!r} is in this log", code="not_found")
    for entry in found:
        print(_json(entry) if args.json else msgspec.json.format(_json(entry), indent=2))
    return 0


def _json(entry: Entry) -> str:
    return msgspec.json.encode(entry).decode()


def _seal(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    said = AdminClient(config, state).order("seal")["audit"]
    print(json.dumps(said) if args.json else "\n".join(audit_lines(said)))
    return 1 if said["problem"] or said["shipped"]["problem"] else 0
