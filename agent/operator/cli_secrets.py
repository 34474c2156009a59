"""mlxrack-agent secrets and new-key: replace the rack's secret node by node, make keys for clients."""

import argparse
import difflib
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from agent.config import AgentConfig, Peers, hash_key
from agent.config_checks import check
from agent.operator.admin_client import AdminClient
from agent.operator.cli_reload import lines, reloaded
from agent.operator.statusview import table
from agent.policy.checking import check as check_policy
from agent.policy.classes import CLASSES
from agent.policy.rules import ANY, KeyPolicy, Money, Rules
from shared.config import parse
from shared.durable import created, write_whole
from shared.errors import RackError, Refused, Retryable
from shared.keys import check_name
from shared.secrets import strong

Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""
_HEAD = ("NODE", "STATE", "SECRET")


class _Node(NamedTuple):
    """What a command works on: the configuration and its file, the running agent."""

    config: AgentConfig
    file: Path
    client: AdminClient


def add(outer: Outer, load: Load, path_of: Callable[[argparse.Namespace], Path], common: Callable[..., None]) -> None:
    """Add ``new-key``, and ``secrets`` with its verb; without one it shows who has which."""
    new_key = outer("new-key", "Create an API key; prints it once, with the lines for agent.toml.", _new_key)
    new_key.add_argument("name", help="the client's name as reports show it; its prompt cache is its own")
    new_key.add_argument("--cache-group", default="", help="a group of keys that share one instead")
    _add_policy(new_key)

    def node(args: argparse.Namespace) -> _Node:
        config, state = load(args)
        return _Node(config, path_of(args), AdminClient(config, state))

    text = "Show which nodes have the newest rack secret; replace it without splitting the rack."
    shown = outer("secrets", text, lambda args: _show(args, node(args)))
    shown.add_argument("--json", action="store_true", help="print JSON")
    verbs = shown.add_subparsers(metavar="VERB")
    text = "Replace the rack secret: on one node, then --with its file on each other one, then --finish on each."
    rotate = verbs.add_parser("rotate", help=text, description=text)
    common(rotate)
    how = rotate.add_mutually_exclusive_group()
    how.add_argument("--with", dest="given", metavar="FILE", type=Path, help="the new secret, from the first node")
    how.add_argument("--finish", action="store_true", help="forget the old secret, when no node needs it any more")
    rotate.add_argument("--dry-run", action="store_true", help="show the edit of agent.toml, and change nothing")
    rotate.set_defaults(run=lambda args: _rotate(args, node(args)))


def _new_key(args: argparse.Namespace) -> int:
    check_name(args.name, "new-key: the name")
    if args.cache_group:
        check_name(args.cache_group, "new-key: the cache group")
    policy = _policy(args)
    key = f"mlxr-{secrets.token_urlsafe(32)}"
    print(f"API key for {args.name} (shown once, not stored): {key}\n")
    print(f'[[keys]]\nid = "{args.name}"\nsha256 = "{hash_key(key)}"')
    if args.cache_group:
        print(f'cache_group = "{args.cache_group}"')
    print("\n# put it into agent.toml on every node, then run `mlxrack-agent reload` there")
    print(f"# to replace a key of {args.name}, leave its table, too, until the client uses this one: both are its own")
    if lines_ := policy_lines(policy):
        print(f"\n# policy.toml, the same on every node: what {args.name} may do\n{lines_}")
    return 0


def _add_policy(parser: argparse.ArgumentParser) -> None:
    """What the key may do, as options."""
    more = parser.add_argument_group("what the key may do; prints its table for policy.toml, too")
    more.add_argument("--class", dest="classes", action="append", choices=CLASSES, help="only requests of this class")
    more.add_argument("--model", dest="models", action="append", metavar="NAME", help="only this served name")
    more.add_argument("--expires", default="", metavar="DAY", help="the last day on which it counts, like 2027-01-31")
    more.add_argument("--requests-per-minute", type=int, default=0, metavar="N")
    more.add_argument("--tokens-per-minute", type=int, default=0, metavar="N")
    more.add_argument("--usd-per-day", default="", metavar="USD", help="a budget, like 5.00")
    more.add_argument("--usd-per-month", default="", metavar="USD")
    more.add_argument("--sensitive", action="store_true", help="all of its requests are SENSITIVE")
    more.add_argument(
        "--inside", action="store_true", help="nothing of it leaves the premises, whatever else is allowed"
    )


def _policy(args: argparse.Namespace) -> KeyPolicy:
    """Raises Refused for what the policy file would refuse."""
    made = KeyPolicy(
        id=args.name,
        models=tuple(args.models or (ANY,)),
        classes=tuple(args.classes or CLASSES),
        expires=args.expires,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        day=Money(usd=args.usd_per_day),
        month=Money(usd=args.usd_per_month),
        sensitive=args.sensitive,
        outside=not args.inside,
    )
    for name in args.models or ():
        check_name(name, "new-key: the model")
    try:
        msgspec.convert(msgspec.to_builtins(made), KeyPolicy)
    except msgspec.ValidationError as error:
        raise Refused(f"new-key: {error}") from None
    if problems := check_policy(Rules(keys=(made,))):
        raise Refused(f"new-key: {'; '.join(problems)}")
    return made


def policy_lines(policy: KeyPolicy) -> str:
    """A key's table for policy.toml; "" for one that may do everything."""
    plain, usual = (msgspec.to_builtins(one) for one in (policy, KeyPolicy(id=policy.id)))
    said = {name: value for name, value in plain.items() if value != usual[name]}
    if not said:
        return ""
    lines = [f"{name} = {json.dumps(value)}" for name, value in said.items() if not isinstance(value, dict)]
    lines += [f"{name}.usd = {json.dumps(value['usd'])}" for name, value in said.items() if isinstance(value, dict)]
    return "\n".join(["[[keys]]", f"id = {json.dumps(policy.id)}", *lines])


# ---- who has which ----


def _show(args: argparse.Namespace, node: _Node) -> int:
    status = node.client.status()
    if args.json:
        peers = {peer["node"]: peer["needs_old_secret"] for peer in status["peers"]}
        print(json.dumps({"secrets": status["rack_secrets"], "needs_old_secret": peers}, indent=2))
        return 0
    how_many = {0: "no secret", 1: "one secret"}.get(status["rack_secrets"], "the new secret and the old one")
    print(f"{status['node']} accepts {how_many}")
    if status["peers"]:
        print(table(_HEAD, [(p["node"], p["state"], _has(p["needs_old_secret"])) for p in status["peers"]]))
    return 0


def _has(needs_old: bool | None) -> str:
    return "unknown" if needs_old is None else "the old one only" if needs_old else "the newest"


# ---- rotation ----


def _rotate(args: argparse.Namespace, node: _Node) -> int:
    peers = node.config.peers
    if not peers.secret:
        raise Refused("secrets rotate: there is no peers.secret; make one with `mlxrack-agent new-secret`")
    return _finish(args, node, peers) if args.finish else _begin(args, node, peers)


def _begin(args: argparse.Namespace, node: _Node, peers: Peers) -> int:
    if peers.old_secret:
        why = f"peers.old_secret is set, so a rotation is under way; {_next_steps(peers.secret)}"
        raise Refused(f"secrets rotate: {why}", code="conflict")
    _check_versions(node)
    if not peers.secret.startswith("file:"):
        raise Refused(f"secrets rotate: {_by_hand(peers.secret)}", code="conflict")
    old = Path(_bare(peers.secret))
    new = args.given.absolute() if args.given is not None else _next_name(old)
    if args.given is not None:
        _check_given(new, strong(f"file:{new}", "the new secret", os.environ), peers.secret)
    edited = with_both(node.file.read_text(encoding="utf-8"), peers.secret, f"file:{new}")
    if _shown(args, node.file, edited):
        return 0
    if args.given is None:
        strong(peers.secret, "peers.secret", os.environ)  # who cannot read it is not the agent's user
        _write_secret(new, beside=old)
    try:
        _put(args, node, edited)
    except RackError:
        if args.given is None:
            new.unlink(missing_ok=True)  # nobody has it, and the next attempt makes another one
        raise
    if not args.json:
        print(f"\nthe new secret is in {new}; every node must accept both before any forgets the old one")
        print(_next_steps(new))
    return 0


def _check_given(file: Path, secret: str, reference: str) -> None:
    """Raises Refused for the secret that is to be replaced."""
    if secret == strong(reference, "peers.secret", os.environ):
        why = f"{file} holds the secret that this node has already; give the file that the first node has made"
        raise Refused(f"secrets rotate: {why}", code="conflict")


def _bare(reference: str) -> str:
    return reference.removeprefix("file:")


def _next_steps(reference: str | Path) -> str:
    file = _bare(str(reference))
    return (
        f"on each other node: copy {file} there (mode 0600) and run `mlxrack-agent secrets rotate --with {file}`; when "
        "`mlxrack-agent secrets` shows the newest for all: `mlxrack-agent secrets rotate --finish` on each"
    )


def _by_hand(reference: str) -> str:
    how = (
        f"peers.secret is {reference}, which this program cannot renew; make one (`mlxrack-agent new-secret`), "
        "on every node set peers.secret to it and peers.old_secret to this one and run `mlxrack-agent reload`; last "
        "`mlxrack-agent secrets rotate --finish`"
    )
    env = "; a running agent cannot see a new env: variable, so use file: for the new one"
    return how + (env if reference.startswith("env:") else "")


def _check_versions(node: _Node) -> None:
    """A node of a version that knows one secret would be left alone. Raises Refused. An agent that is not running can
    tell nothing."""
    try:
        peers = node.client.status()["peers"]
    except Retryable:
        return
    if old := [p["node"] for p in peers if p["needs_old_secret"] is None and p["state"] == "up"]:
        raise Refused(f"secrets rotate: {', '.join(old)}: this version knows one secret only; upgrade it first")


def _finish(args: argparse.Namespace, node: _Node, peers: Peers) -> int:
    if not peers.old_secret:
        raise Refused("secrets rotate --finish: there is no peers.old_secret; nothing is left to do", code="conflict")
    if why := needed_by(node.client.status()["peers"], peers.secret):
        raise Refused(f"secrets rotate --finish: {why}", code="conflict")
    edited = without_old(node.file.read_text(encoding="utf-8"), peers.old_secret)
    if _shown(args, node.file, edited):
        return 0
    _put(args, node, edited)
    if not args.json:
        print(f"\nthis node accepts the new secret alone; once every node does, delete {_bare(peers.old_secret)}")
    return 0


def needed_by(peers: Sequence[dict[str, Any]], secret: str) -> str:
    """Why the old secret is still needed, by what the agent knows of its peers; "" when it is not."""
    needing = [p["node"] for p in peers if p["needs_old_secret"]]
    if needing:
        return f"{', '.join(needing)} needs the old secret; {_next_steps(secret)}"
    silent = [p["node"] for p in peers if p["needs_old_secret"] is None or p["state"] != "up"]
    if silent:
        return f"{', '.join(silent)} does not say now which secrets it has; start it, or remove it from peers.nodes"
    return ""


def _put(args: argparse.Namespace, node: _Node, edited: str) -> None:
    """The edited file, in force if the agent runs; as it was if the agent refuses it. Raises RackError."""
    before = node.file.read_text(encoding="utf-8")
    _replace(node.file, edited)
    try:
        said = reloaded(node.client)
    except RackError as error:
        if error.code != "not_running":
            _replace(node.file, before)
            raise
        said = {"changed": [], "notes": ["the agent is not running; it reads this when it starts"]}
    print(json.dumps(said, indent=2) if args.json else "\n".join(lines(said) if said["changed"] else said["notes"]))


def _shown(args: argparse.Namespace, file: Path, edited: str) -> bool:
    """Show the edit; whether that is all."""
    before, name = file.read_text(encoding="utf-8").splitlines(), str(file)
    edit = list(difflib.unified_diff(before, edited.splitlines(), name, name, lineterm="", n=1))
    if not args.json:
        print("\n".join(edit))
    elif args.dry_run:
        print(json.dumps({"edit": edit}, indent=2))
    return bool(args.dry_run)


def _replace(file: Path, text: str) -> None:
    """Whole, with the mode it had; through a link to where it is."""
    there = file.resolve()
    seen, temporary = there.stat(), there.with_name(f".{there.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(created(temporary, os.O_WRONLY | os.O_EXCL, mode=0o600), "w", encoding="utf-8") as written:
        written.write(text)
    _like(temporary, seen, seen.st_mode & 0o777)
    os.replace(temporary, there)


def _next_name(old: Path) -> Path:
    """rack.secret, rack.secret-2, rack.secret-3."""
    stem, number = re.sub(r"-\d+$", "", old.name), re.search(r"-(\d+)$", old.name)
    begin = int(number[1]) + 1 if number else 2
    names = (old.with_name(f"{stem}-{count}") for count in itertools.count(begin))
    return next(name for name in names if not name.exists())


def _write_secret(path: Path, *, beside: Path) -> None:
    """For the user who has the one before, whoever makes it."""
    write_whole(path, f"{secrets.token_urlsafe(32)}\n".encode())
    _like(path, beside.stat(), 0o600)


def _like(path: Path, seen: os.stat_result, mode: int) -> None:
    os.chmod(path, mode)
    if os.geteuid() == 0:
        os.chown(path, seen.st_uid, seen.st_gid)


# ---- editing agent.toml ----


def with_both(text: str, old: str, new: str) -> str:
    """agent.toml with ``new`` as the rack's secret and ``old`` as the one before. Raises Refused where a program cannot
    do this safely."""
    found = re.compile(rf"(?<![\w.-])((?:peers\s*\.\s*)?)secret\s*=\s*([\"']){re.escape(old)}\2")
    both = [text.replace("\\", r"\\") for text in (new, old)]
    forms = [rf'\1secret = "{both[0]}"{between}\1old_secret = "{both[1]}"' for between in ("\n", ", ")]
    return _edited(text, found, forms, f'secret = "{new}"\nold_secret = "{old}"', secret=new, old_secret=old)


def without_old(text: str, old: str) -> str:
    """agent.toml without the secret before. Raises Refused where a program cannot do this safely."""
    name, value = r"(?<![\w.-])(?:peers\s*\.\s*)?old_secret", rf"([\"']){re.escape(old)}\1"
    found = re.compile(rf"(?:,\s*)?{name}\s*=\s*{value}[ \t]*(?:\n|,\s*)?")
    return _edited(text, found, ("", ", ", "\n"), "no old_secret", old_secret="")


def _edited(text: str, found: re.Pattern[str], forms: Iterable[str], wanted: str, **peers: str) -> str:
    """The edit that changes these keys and nothing else, as reading it again proves."""
    before = parse(text, AgentConfig, check, source="agent.toml")
    right = msgspec.structs.replace(before, peers=msgspec.structs.replace(before.peers, **peers))
    for place, form in itertools.product(found.finditer(text), tuple(forms)):
        edited = text[: place.start()] + place.expand(form) + text[place.end() :]
        try:
            if parse(edited, AgentConfig, check, source="agent.toml") == right:
                return edited
        except RackError:
            continue
    how = f"edit agent.toml yourself, so that [peers] has:\n{wanted}\nthen run `mlxrack-agent reload`"
    raise Refused(f"secrets rotate: {how}")
