"""mlxrack-agent policy: check a policy file, show the one in force, explain a decision, replay last week's."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent.config import AgentConfig, Api, key_ids
from agent.operator import logview
from agent.operator.admin_client import AdminClient
from agent.operator.cli_doctor import width_of
from agent.operator.statusview import fold, table
from agent.policy.classes import CLASSES, HEADER, SENSITIVE, Declared, TaskClass, declared
from agent.policy.classing import class_of
from agent.policy.explaining import Explained, explain, limits
from agent.policy.facts import DEFAULT_ANSWER_TOK, Facts
from agent.policy.replay import Changes, Outcome, Spent, replay
from agent.policy.rules import Rules, digest
from shared.errors import Refused, Retryable

Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""
Verb = Callable[[argparse.Namespace, AgentConfig, Path], int]
Stated = Callable[[bytes, Mapping[str, str], Api], tuple[Facts, Declared, Declared, TaskClass]]
"""A request's facts, what its header and its body declare, and the guess, from its body and headers. Raises Refused."""
MOST_BODY_BYTES = 16 << 20


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a file of recorded decisions: when (Unix time), the facts, and what became of the request."""

    t_ms: int
    facts: Facts
    outcome: Outcome = Outcome()


class Records(NamedTuple):
    """Recorded decisions, and how many lines could not be read."""

    found: Sequence[Recorded]
    unread: int


Reader = Callable[[Path, int], Records]
"""Recorded decisions in a folder or file since a time (Unix, milliseconds). Raises Refused when there are none."""


def add(
    outer: Outer,
    load: Load,
    common: Callable[[argparse.ArgumentParser], None],
    stated: Stated,
    records: Reader | None = None,
) -> None:
    """Add ``policy`` with its verbs; without one it shows the policy in force. ``records`` reads what ``--from`` names;
    by default files of JSON lines."""
    text = "Check, show and explain the policy: what may be done with a request, and where."
    policy = outer("policy", text, lambda args: _show(args, *load(args)))
    policy.set_defaults(json=False)
    policy.add_argument("--json", action="store_true", help="print JSON")
    verbs = policy.add_subparsers(metavar="VERB")

    def verb(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        common(added)
        added.set_defaults(run=lambda args: run(args, *load(args)))
        return added

    check = verb("check", "Say everything that is wrong with a policy file; exits 78 if anything is.", _check)
    check.add_argument("file", nargs="?", type=Path, default=None, help="policy file (default: policy.path)")
    verb("show", "Show the policy that the running agent decides by.", _show)
    _explain_options(
        verb(
            "explain",
            "Say what would happen to a request and why; sends nothing.",
            lambda args, config, state: _explain(args, config, state, stated),
        )
    )
    again = verb(
        "replay",
        "Play recorded decisions under another policy: what changes in places, cost and refusals.",
        lambda args, config, state: _replay(args, config, state, records or read_lines),
    )
    again.add_argument("--since", default="7d", help="90s, 15m, 1h, 2d, or a time like 2026-11-20T08:00 (default: 7d)")
    again.add_argument("--policy", type=Path, default=None, help="the other policy (default: policy.path)")
    again.add_argument("--from", dest="source", type=Path, default=None, help="folder or file (default: the agent's)")


def _explain_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("--key", default="", help="id of the API key, as in [[keys]] (default: none)")
    added.add_argument("--model", default="", help='served name, "auto" or "class:routine" (default: that of --file)')
    added.add_argument("--class", dest="task_class", default="", metavar="CLASS", help=f"one of {', '.join(CLASSES)}")
    added.add_argument("--sensitive", action="store_true", help=f"as if its caller said {SENSITIVE}")
    added.add_argument("--prompt-tok", type=int, default=None, help="prompt tokens (default: estimated from --file)")
    added.add_argument("--file", type=Path, default=None, help="body of a request, as JSON")
    added.add_argument("--header", action="append", default=[], help="'Name: value', as it would be sent; may repeat")
    added.add_argument("--policy", type=Path, default=None, help="policy file (default: the one in force)")


# ---- check ----


def _check(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    from agent.policy.doubts import Known, doubts  # with it comes an engine for patterns, which no other verb needs

    path = _path(args.file, config)
    rules = _read(path)
    # the models of other nodes are not known here, so nothing is said of models
    found = doubts(rules, Known(keys=key_ids(config)))
    if args.json:
        return _json({"path": path, "version": rules.version, "digest": digest(rules), "warnings": found})
    counts = {"key": rules.keys, "route": rules.routes, "provider": rules.providers, "permission": rules.allow}
    told = ", ".join(f"{len(some)} {name}{'' if len(some) == 1 else 's'}" for name, some in counts.items())
    print(f"{path}: valid; version {rules.version} ({digest(rules)}), {told}")
    for one in found:
        print(fold(f"warning: {one}", _width()))
    return 0


def _path(given: Path | None, config: AgentConfig) -> str:
    if given is None and not config.policy.path:
        raise Refused("policy: agent.toml names no policy file ([policy] path), and none is given; name one")
    return str(given or config.policy.path)


def _read(path: str) -> Rules:
    from agent.policy.reading import read

    return read(path).rules


def _json(found: object) -> int:
    print(json.dumps(msgspec.to_builtins(found), indent=2))
    return 0


# ---- show ----


def _show(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    told = AdminClient(config, state).policy()
    if args.json:
        return _json(told)
    since = datetime.fromtimestamp(told["since_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    source = told["path"] or "none: every key may use every model, and nothing leaves the premises"
    print(f"version {told['version']} ({told['digest']}), in force since {since}\nfile {source}")
    for one in told["warnings"]:
        print(fold(f"warning: {one}", _width()))
    rules = _told(told["rules"])
    for rows in (_keys(rules), _providers(rules), _permissions(rules)):
        if len(rows) > 1:
            print(f"\n{table(rows[0], rows[1:], _width())}")
    return 0


def _keys(rules: Rules) -> list[tuple[str, ...]]:
    rows = [(one.id, _all(one.classes), _all(one.models), "; ".join(limits(one)) or "-") for one in rules.keys]
    return [("KEY", "CLASSES", "MODELS", "LIMITS"), *rows]


def _providers(rules: Rules) -> list[tuple[str, ...]]:
    rows = [
        (one.name, one.category, one.base_url, one.usd_per_day or "-", one.usd_per_month or "-")
        for one in rules.providers
    ]
    return [("PROVIDER", "CATEGORY", "URL", "USD A DAY", "USD A MONTH"), *rows]


def _permissions(rules: Rules) -> list[tuple[str, ...]]:
    rows = [
        (str(n), one.provider, one.use, _all(one.keys), _all(one.classes), _all(one.models), one.when)
        for n, one in enumerate(rules.allow)
    ]
    return [("ALLOW", "PROVIDER", "ITS MODEL", "KEYS", "CLASSES", "MODELS", "WHEN"), *rows]


def _all(names: Sequence[str]) -> str:
    return "all" if set(names) in ({"*"}, set(CLASSES)) else ", ".join(names)


# ---- explain ----


def _explain(args: argparse.Namespace, config: AgentConfig, state: Path, stated: Stated) -> int:
    rules, source = _rules(args.policy, config, state)
    found = explain(_facts(args, config, rules, stated), rules)
    if args.json:
        return _json({"policy": source, **msgspec.structs.asdict(found)})
    print("\n".join(fold(line, _width()) for line in _said(found, source)))
    return 0


def _rules(given: Path | None, config: AgentConfig, state: Path) -> tuple[Rules, str]:
    """The rules to explain by, and where they are from: those in force, if an agent runs that says so."""
    if given is None:
        try:
            told = AdminClient(config, state).policy()
            return _told(told["rules"]), f"in force: version {told['version']} ({told['digest']})"
        except (Retryable, KeyError):
            pass
    path = str(given or config.policy.path)
    rules = _read(path)
    return rules, f"{path or 'no policy file'}: version {rules.version} ({digest(rules)})"


def _told(rules: object) -> Rules:
    """Rules as the running agent tells them. Raises Refused."""
    try:
        return msgspec.convert(rules, Rules)
    except msgspec.ValidationError as error:
        seen = "the running agent is of another version, and its policy says what this program does not know"
        raise Refused(f"policy: {seen} ({error})") from None


def _facts(args: argparse.Namespace, config: AgentConfig, rules: Rules, stated: Stated) -> Facts:
    headers = dict(_header(one) for one in args.header)
    named = [value for name, value in headers.items() if name.lower() == HEADER.lower()]
    facts, header, body, guessed = Facts(model=args.model, answer_tok=DEFAULT_ANSWER_TOK), *_nothing(named)
    if args.file is not None:
        facts, header, body, guessed = stated(_body(args.file), headers, config.api)
    elif not args.model:
        raise Refused("policy explain: name a request: --model, or --file with its body", code="invalid_value")
    if args.task_class:
        header = declared([args.task_class], "--class")
    model, label = args.model or facts.model, args.sensitive
    said = class_of(header, body, model, args.key, rules, lambda: guessed)
    return msgspec.structs.replace(
        facts,
        key_id=args.key,
        model=model,
        task_class=said.task_class,
        class_from=said.class_from,
        sensitive=(*facts.sensitive, *(("label",) if label or said.sensitive else ())),
        prompt_tok=facts.prompt_tok if args.prompt_tok is None else args.prompt_tok,
        day=datetime.now(UTC).date().isoformat(),
    )


def _nothing(named: Sequence[str]) -> tuple[Declared, Declared, TaskClass]:
    return declared(named, HEADER), Declared(), "ROUTINE"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise Refused("policy explain: a header is given as --header 'Name: value'", code="invalid_value")
    return name.strip(), value.strip()


def _body(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BODY_BYTES)


def _said(found: Explained, source: str) -> Iterator[str]:
    yield f"policy      {source}"
    entry = {"own": "", "*": " (by the entry *)", "none": " (no entry: no limits)"}[found.key_entry]
    yield f"key         {found.key_id or 'none'}{entry}"
    yield f"model       {found.model}"
    yield f"class       {found.task_class}: {found.class_from}"
    reasons = "; ".join(found.sensitive) or "no; detectors and earlier texts are asked only for a real request"
    yield f"SENSITIVE   {'yes: ' if found.sensitive else ''}{reasons}"
    if found.decision == "refuse":
        yield f"decision    refused with {found.code}: {found.message}"
    else:
        leaves = "may leave, redacted" if found.decision == "redact" else "stays on the premises"
        yield f"decision    {leaves}"
        yield from (f"  {n}. {one}" for n, one in enumerate(found.places, 1))
    yield from (f"not         {one}" for one in found.routes)
    for one in found.asked:
        yield f"allow[{one.allow}]    {one.provider} ({one.use}): {one.why or 'permits it'}"
    yield from (f"limit       {one}" for one in found.limits)


# ---- replay ----


def _replay(args: argparse.Namespace, config: AgentConfig, state: Path, records: Reader) -> int:
    since = logview.parse_since(args.since, datetime.now(UTC))
    began = time.monotonic()
    kept = records(args.source or state / "audit", int(since.timestamp() * 1000))
    old, source = _rules(None, config, state)
    new = _read(_path(args.policy, config))
    changes = replay(((one.facts, one.outcome) for one in kept.found), old, new)
    if args.json:
        print(
            json.dumps(
                {**msgspec.to_builtins(changes), "unread": kept.unread, "old": digest(old), "new": digest(new)},
                indent=2,
            )
        )
        return 0
    seconds = time.monotonic() - began
    print(f"{changes.requests:,} requests since {since:%Y-%m-%d %H:%M} UTC, in {seconds:.1f} s")
    if kept.unread:
        print(f"{kept.unread:,} lines could not be read and are left out")
    print(f"before: {source}\nafter:  version {new.version} ({digest(new)})\n")
    print("\n\n".join(_changed(changes)))
    return 0


def _changed(changes: Changes) -> Iterator[str]:
    before, after = ({one.place: one for one in some} for some in (changes.before, changes.after))
    rows = [(place, *_spent(before.get(place)), *_spent(after.get(place))) for place in sorted({**before, **after})]
    yield table(("PLACE", "BEFORE", "USD", "AFTER", "USD"), rows, _width())
    yield f"may leave: {changes.may_leave_before:,} before, {changes.may_leave_after:,} after"
    for title, moves in (("MAY LEAVE NOW", changes.newly), ("GO ELSEWHERE", changes.moves)):
        listed = [
            (f"{one.requests:,}", one.key_id or "-", one.task_class, f"{one.before} -> {one.after}", *one.examples[:1])
            for one in moves
        ]
        if listed:
            yield table(
                ("REQUESTS", "KEY", "CLASS", title, "FOR EXAMPLE"), [(*row, "")[:5] for row in listed], _width()
            )
    if not changes.moves and not changes.newly:
        yield "nothing changes"


def _spent(one: Spent | None) -> tuple[str, str]:
    if one is None:
        return "0", "0"
    return f"{one.requests:,}", f"{one.usd} and {one.unpriced:,} unpriced" if one.unpriced else one.usd


def read_lines(source: Path, since_ms: int) -> Records:
    """Decisions in a file of JSON lines, or in every ``*.jsonl`` of a folder (docs/policy.md). Raises Refused when
    there are none."""
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    found, unread, decoder = list[Recorded](), 0, msgspec.json.Decoder(Recorded)
    for line in _lines(files):
        try:
            one = decoder.decode(line)
        except msgspec.DecodeError:
            unread += 1
            continue
        if one.t_ms >= since_ms:
            found.append(one)
    if not found:
        why = f", and {unread:,} lines could not be read" if unread else ""
        raise Refused(f"policy replay: no decisions recorded in {source} since then{why}; name others with --from")
    return Records(found, unread)


def _lines(files: Iterable[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as lines:
            yield from (line for line in lines if line.strip())


def _width() -> int:
    return width_of(sys.stdout)
