"""mlxrack-agent tls and new-secret: the rack's certificate authority (CA), its nodes' certificates, and secrets."""

import argparse
import json
import os
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from agent.config import AgentConfig
from agent.mesh.node_names import uri_of
from agent.operator.statusview import table
from shared.durable import created
from shared.errors import RackError, Refused
from shared.keys import check_name
from shared.regular_file import MOST_PEM_BYTES, read_file

CA = "ca"
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""
Verb = Callable[[argparse.Namespace, AgentConfig, Path], int]
_HEAD = ("FILE", "OF", "NAMES", "EXPIRES", "DAYS LEFT")


def add(outer: Outer, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add ``new-secret``, and ``tls`` with its verbs; without one it shows what there is."""
    outer("new-secret", "Print a random secret for peers.secret or disk_cache.secret.", _new_secret)
    text = "Show certificates; make the rack's CA and issue its nodes' certificates."
    tls = outer("tls", text, lambda args: _show(args, *load(args)))
    tls.add_argument("--json", action="store_true", help="print JSON")
    tls.set_defaults(files=[], folder=None)
    verbs = tls.add_subparsers(metavar="VERB")

    def verb(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        common(added)
        added.add_argument(
            "--folder", type=Path, default=None, help="folder of the CA (default: tls in the state folder)"
        )
        added.set_defaults(run=lambda args: run(args, *load(args)))
        return added

    init = verb("init", "Make the rack's CA: ca.pem for all nodes and clients, and ca.key, which stays here.", _init)
    init.add_argument("--rack", default="", help="name of the rack (default: the configured one)")
    init.add_argument("--days", type=_days, default=None, help="validity (default: 3650 days)")
    issue = verb("issue", "Issue a node's certificate and key, signed by the rack's CA.", _issue)
    issue.add_argument("node", help="node id, as in [node] id")
    issue.add_argument("--rack", default="", help="name of the rack (default: the configured one)")
    issue.add_argument("--name", action="append", default=[], help="DNS name that clients use; may be repeated")
    issue.add_argument("--ip", action="append", default=[], help="address that clients use; may be repeated")
    issue.add_argument("--days", type=_days, default=None, help="validity (default: 398 days)")
    issue.add_argument("--renew", action="store_true", help="replace this node's certificate and key")
    show = verb("show", "Show certificates: whose they are, their names, and when they expire.", _show)
    show.add_argument(
        "files", nargs="*", type=Path, help="files in PEM (default: those configured, and the CA's folder)"
    )


def _new_secret(_: argparse.Namespace) -> int:
    print(secrets.token_urlsafe(32))
    return 0


def _init(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    from agent.mesh.certificates import CA_DAYS, make_authority

    folder, rack = _folder(args, state), _rack(args, config)
    certificate, key = folder / f"{CA}.pem", folder / f"{CA}.key"
    for path in (certificate, key):
        _absent(path, "a CA exists; another one would make every certificate that it has signed invalid")
    pair = make_authority(rack, now=datetime.now(UTC), days=args.days or CA_DAYS)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(key, pair.key, 0o600)
    _write(certificate, pair.certificate, 0o644)
    if args.json:
        print(json.dumps({"rack": rack, "certificate": str(certificate), "key": str(key)}))
        return 0
    print(f"CA of rack {rack}: {certificate} (for every node and client)")
    print(f"its key: {key} (mode 0600; keep it here or offline, who has it can be any node)")
    print("next: `mlxrack-agent tls issue NODE --name NODE.local` for each node")
    return 0


def _issue(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    from agent.mesh.certificates import NODE_DAYS, Pair, issue

    folder, rack, node = _folder(args, state), _rack(args, config), check_name(args.node, "node id")
    if node == CA:
        raise Refused(f"tls issue: {node!r} is the name of the CA's files; choose another --folder for this node")
    certificate, key = folder / f"{node}.pem", folder / f"{node}.key"
    if not args.renew:
        for path in (certificate, key):
            _absent(path, "replace it with --renew")
    authority = Pair(_read(folder / f"{CA}.pem"), _read(folder / f"{CA}.key"))
    pair = issue(
        *(authority,),
        rack=rack,
        node=node,
        names=args.name,
        addresses=args.ip,
        now=datetime.now(UTC),
        days=args.days or NODE_DAYS,
    )
    _write(key, pair.key, 0o600)
    _write(certificate, pair.certificate, 0o644)
    if args.json:
        files = {"certificate": str(certificate), "key": str(key), "ca": str(folder / f"{CA}.pem")}
        print(json.dumps({"node": node, "rack": rack, **files}))
        return 0
    print(f"certificate of {uri_of(rack, node)}: {certificate}, key {key} (mode 0600)")
    print(f"copy both and ca.pem to {node}, and tell its agent.toml where they are:\n")
    print(f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\nca = "{folder / f"{CA}.pem"}"')
    return 0


def _show(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    from agent.mesh.certificates import describe

    rows, now_ms = [], datetime.now(UTC).timestamp() * 1000
    for path in args.files or _known(config, _folder(args, state)):
        try:
            found = describe(_read(path))
        except RackError as error:
            raise Refused(f"tls show: {path}: {error.message.removeprefix(f'{path}: ')}") from None
        ends = datetime.fromtimestamp(found.not_after_ms / 1000, UTC)
        days = int((found.not_after_ms - now_ms) // 86_400_000)
        rows.append((str(path), found.subject, list(found.names), f"{ends:%Y-%m-%d %H:%M}", days))
    if args.json:
        names = ("file", "subject", "names", "expires", "days_left")
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
    elif rows:
        print(table(_HEAD, [(*row[:2], ", ".join(row[2]) or "-", *row[3:]) for row in rows]))
    else:
        print(
            f"no certificates are configured, and {_folder(args, state)} has none; `mlxrack-agent tls init` makes a CA"
        )
    return 0


def _known(config: AgentConfig, folder: Path) -> Sequence[Path]:
    """Configured certificates, and those in the CA's folder."""
    tls = config.tls
    named = [Path(text).expanduser() for text in (tls.certificate, tls.node_certificate, tls.ca) if text]
    return list(dict.fromkeys([*named, *sorted(folder.glob("*.pem"))]))


def _folder(args: argparse.Namespace, state: Path) -> Path:
    return args.folder.expanduser() if args.folder is not None else state / "tls"


def _rack(args: argparse.Namespace, config: AgentConfig) -> str:
    return check_name(args.rack or config.node.rack, "rack")


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 36_500:
        raise argparse.ArgumentTypeError("expected a number of days, at least 1")
    return int(text)


def _absent(path: Path, remedy: str) -> None:
    if path.exists() or path.is_symlink():
        raise Refused(f"tls: {path} exists and is not overwritten; {remedy}", code="conflict")


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MOST_PEM_BYTES)
    except FileNotFoundError:
        remedy = "; `mlxrack-agent tls init` makes the CA" if path.stem == CA else ""
        raise Refused(f"{path}: no such file{remedy}") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from None


def _write(path: Path, body: bytes, mode: int) -> None:
    """Whole and with its mode from the first byte on; a running agent may read it at any time."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(created(temporary, os.O_WRONLY | os.O_EXCL, mode=mode), "wb") as file:
        file.write(body)
    os.replace(temporary, path)
